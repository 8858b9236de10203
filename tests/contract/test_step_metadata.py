# SPDX-License-Identifier: Apache-2.0
"""Which request a token belongs to: vLLM's own method, alone and shared by the groups of a step."""

import contextlib
import copy
import functools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.contract

POISON = -7


@pytest.fixture(scope="module")
def stock():
    """CommonAttentionMetadata, whose mapping a kernel makes in later releases."""
    backend = pytest.importorskip("vllm.v1.attention.backend", reason="asks vLLM's own class")
    if not hasattr(backend.CommonAttentionMetadata, "token_to_req_indices"):
        pytest.skip("before vLLM 0.25 each builder makes its own mapping")
    with pytest.MonkeyPatch.context() as patch:
        # Without a driver no memory can be pinned.
        patch.setattr("vllm.utils.torch_utils.PIN_MEMORY", False)
        try:
            from vllm.v1.attention.ops import metadata
        except ImportError:
            pass
        else:
            patch.setattr(metadata, "compute_token_to_req_indices", in_torch)
        yield backend.CommonAttentionMetadata


def in_torch(starts, out, mapped, tokens):
    """What vLLM's kernel of this name says that it does."""
    lengths = starts.diff().long()
    out[:mapped] = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths)
    out[mapped:tokens] = 0
    return out[:tokens]


@pytest.fixture
def shared(stock):
    """The method with our change around it."""
    from vllm_sm12x.integration.step_metadata import TokenToRequest

    return functools.partial(TokenToRequest(), stock.token_to_req_indices)


def metadata_of(stock, lengths, padding=0):
    """Of a step of len(lengths) requests, and `padding` more tokens of a CUDA graph."""
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    tokens = int(starts[-1]) + padding
    return stock(
        query_start_loc=starts.clone(),
        query_start_loc_cpu=starts,
        seq_lens=torch.full((len(lengths),), 100, dtype=torch.int32),
        num_reqs=len(lengths),
        num_actual_tokens=tokens,
        max_query_len=max(lengths),
        max_seq_len=100,
        block_table_tensor=torch.zeros(len(lengths), 1, dtype=torch.int32),
        slot_mapping=torch.zeros(tokens, dtype=torch.int64),
    )


def expected(lengths, padding=0):
    return [i for i, length in enumerate(lengths) for _ in range(length)] + [0] * padding


def buffers(count, tokens=512):
    return [torch.full((tokens,), POISON, dtype=torch.int32) for _ in range(count)]


def drafted(common, drafts, monkeypatch):
    """The mapping of each draft of vLLM's V1 drafter, whose own code runs but for model and GPU."""
    proposers = pytest.importorskip("vllm.v1.spec_decode.llm_base_proposer")
    mappings, (buffer,) = [], buffers(1)

    requests, tokens = common.num_reqs, common.num_actual_tokens

    class Drafter(proposers.SpecDecodeBaseProposer):
        def __init__(self):
            self.method, self.block_size = "eagle", 64
            self.arange = torch.arange(64, dtype=torch.int32)
            self.token_arange_np = self.arange.numpy()
            self.positions = self.input_ids = torch.zeros(64, dtype=torch.int64)
            self.hidden_states = torch.zeros(64, 8)
            self.model = lambda **inputs: torch.zeros(64, 8)

        def __getattr__(self, name):
            return None

        def set_inputs_first_pass(self, cad, **inputs):
            return tokens, torch.arange(requests), cad

        def build_per_group_and_layer_attn_metadata(self, common_attn_metadata, draft_index=0):
            mappings.append(common_attn_metadata.token_to_req_indices(buffer).tolist())
            return [], {}

        def build_model_inputs_first_pass(self, *sizes):
            return {}, tokens

        def _determine_batch_execution_and_padding(self, count):
            return None, count, None

        def _update_positions_dependent_metadata(self, positions, *sizes):
            return positions

        def _sample_draft_tokens(self, hidden_states, sampling):
            return torch.zeros(requests, dtype=torch.int64), None

        def _get_slot_mapping(self, *sizes):
            return {}

        def _get_positions(self, count):
            return self.positions[:count]

        def model_returns_tuple(self):
            return False

    context = contextlib.nullcontext()
    monkeypatch.setattr(proposers, "set_forward_context", lambda *args, **kwargs: context)
    nothing = dict.fromkeys(
        ("target_token_ids", "target_positions", "target_hidden_states", "next_token_ids",
         "token_indices_to_sample", "sampling_metadata")
    )  # fmt: skip
    Drafter().propose(drafts, common_attn_metadata=common, **nothing)
    return mappings


class Builder:
    """Of one group of KV caches: its metadata is the mapping that it gets."""

    supports_update_block_table = False

    def __init__(self, buffer):
        self.buffer = buffer

    def build(self, common_attn_metadata, *_, **__):
        return common_attn_metadata.token_to_req_indices(self.buffer)

    build_for_cudagraph_capture = build


class Group:
    """As vLLM's AttentionGroup, which in later releases builds by itself."""

    kv_cache_spec = "a cache"

    def __init__(self, name, buffer):
        builder = Builder(buffer)
        self.layer_names, self.get_metadata_builder = (name,), lambda ubatch: builder
        self.build_metadata = self.build_metadata_for_cudagraph_capture = builder.build


def of_groups(buffers):
    """vLLM's list of lists of AttentionGroups, and its KVCacheConfig."""
    groups = [[Group(f"layer {i}", buffer)] for i, buffer in enumerate(buffers)]
    caches = [SimpleNamespace(kv_cache_spec=i) for i in range(len(buffers))]
    return groups, SimpleNamespace(kv_cache_groups=caches)


def v1_mappings(buffers, starts, tokens, capture):
    """Each group's mapping, by the V1 runner's own code."""
    runners = pytest.importorskip("vllm.v1.worker.gpu_model_runner")
    requests = len(starts) - 1
    lengths = starts.diff()

    class Runner(runners.GPUModelRunner):
        def __init__(self):
            counts = torch.zeros(requests, dtype=torch.int32)
            table = SimpleNamespace(get_device_tensor=lambda rows: torch.zeros(rows, 1))
            self.attn_groups, self.kv_cache_config = of_groups(buffers)
            self.input_batch = SimpleNamespace(
                block_table=[table] * len(buffers),
                num_computed_tokens_cpu_tensor=counts,
                num_prompt_tokens_cpu_tensor=counts,
            )
            self.optimistic_seq_lens_cpu = self.seq_lens = counts + 100
            self.query_start_loc = SimpleNamespace(gpu=starts, cpu=starts)
            self.positions = torch.zeros(tokens, dtype=torch.int64)
            self.model_config = SimpleNamespace(rswa_window=None)
            self.cache_config = SimpleNamespace(kv_sharing_fast_prefill=False, use_replayssm=False)
            self.max_model_len, self.dcp_world_size = 4096, 1

        def __getattr__(self, name):
            return None

    metadata, _ = Runner()._build_attention_metadata(
        int(starts[-1]),
        requests,
        int(lengths.max()),
        num_tokens_padded=tokens,
        for_cudagraph_capture=capture,
        slot_mappings=dict.fromkeys(range(len(buffers)), torch.zeros(tokens)),
    )
    return list(metadata.values())


def v2_mappings(buffers, starts, tokens, capture):
    """Each group's mapping, by the V2 runner's own code."""
    attn_utils = pytest.importorskip("vllm.v1.worker.gpu.attn_utils")
    requests = len(starts) - 1
    groups, caches = of_groups(buffers)
    metadata = attn_utils.build_attn_metadata(
        attn_groups=groups,
        num_reqs=requests,
        num_tokens=tokens,
        query_start_loc_gpu=starts,
        query_start_loc_cpu=starts[:],
        max_query_len=int(starts.diff().max()),
        seq_lens=torch.full((requests,), 100, dtype=torch.int32),
        max_seq_len=100,
        block_tables=[torch.zeros(requests, 1, dtype=torch.int32)] * len(buffers),
        slot_mappings=torch.zeros(len(buffers), tokens, dtype=torch.int64),
        kv_cache_config=caches,
        for_cudagraph_capture=capture,
    )
    return list(metadata.values())


@pytest.mark.parametrize("mappings", [v1_mappings, v2_mappings])
def test_a_graph_finds_each_steps_mapping_where_it_was_captured(
    stock, shared, monkeypatch, mappings
):
    monkeypatch.setattr(stock, "token_to_req_indices", lambda *given: shared(*given))
    first, *others = groups = buffers(3)
    # As in vLLM, one buffer that every step writes.
    starts = torch.arange(9, dtype=torch.int32)
    captured = mappings(groups, starts, 8, capture=True)
    assert {mapping.data_ptr() for mapping in captured} == {first.data_ptr()}
    for lengths in ([1] * 8, [2, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 2, 0, 0, 0]):
        starts[1:] = torch.tensor(lengths).cumsum(0)
        first.fill_(POISON)
        for mapping in mappings(groups, starts, 8, capture=False):
            assert mapping.data_ptr() == first.data_ptr()
            assert mapping.tolist() == expected(lengths, padding=8 - sum(lengths))
    assert {value for buffer in others for value in buffer.tolist()} == {POISON}


def test_vllm_alone_maps_for_each_group_and_not_for_a_second_draft(stock, monkeypatch):
    """The change can go when this fails."""
    base = metadata_of(stock, [3, 3])
    first, second = buffers(2)
    copy.copy(base).token_to_req_indices(first)
    copy.copy(base).token_to_req_indices(second)
    assert first[:6].tolist() == second[:6].tolist() == [0, 0, 0, 1, 1, 1]
    assert drafted(base, 3, monkeypatch) == [[0, 0, 0, 1, 1, 1], [0, 0], [0, 0]]


@given(
    steps=st.lists(
        st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(0, 8)),
        min_size=1,
        max_size=4,
    )
)
def test_groups_share_the_mapping_of_their_step(stock, steps):
    from vllm_sm12x.integration.step_metadata import TokenToRequest

    mapping = functools.partial(TokenToRequest(), stock.token_to_req_indices)
    first, second, third = buffers(3)
    for lengths, padding in steps:
        base = metadata_of(stock, lengths, padding)
        for buffer in (first, second, third):
            got = mapping(copy.copy(base), buffer)
            assert got.tolist() == expected(lengths, padding)
            assert got.data_ptr() == first.data_ptr()
    assert second.unique().tolist() == third.unique().tolist() == [POISON]


@pytest.mark.parametrize("requests", [1, 2, 7])
def test_each_draft_has_its_own(stock, shared, monkeypatch, requests):
    monkeypatch.setattr(stock, "token_to_req_indices", lambda *given: shared(*given))
    lengths = [4] * requests
    later = list(range(requests))
    found = drafted(metadata_of(stock, lengths), 3, monkeypatch)
    assert found == [expected(lengths), later, later]


def test_the_benchmark_takes_turns_and_finds_what_is_wrong_without(stock, shared, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import step_metadata

    turns = step_metadata.Turns(shared, stock.token_to_req_indices)
    monkeypatch.setattr(stock, "token_to_req_indices", lambda *given: turns.mapping(*given))
    turns.checking = True
    states = []
    for _ in range(2 * step_metadata.TURN):
        runner = SimpleNamespace(input_batch=SimpleNamespace(num_reqs=2))
        turns.metadata(lambda runner: None, runner)
        states.append(turns.on)
        drafted(metadata_of(stock, [3, 3]), 3, monkeypatch)
    # Three mappings a step, of which two are a first draft's where they should be their own.
    assert turns.asked == {on: 3 * states.count(on) for on in (True, False)}
    assert turns.wrong == {True: 0, False: 2 * states.count(False)}
    assert turns.rows() == []
    turns.checking = False
    for _ in range(2 * step_metadata.ENOUGH_STEPS):
        turns.metadata(lambda runner: None, runner)
    (row,) = turns.rows()
    assert (row["requests"], row["steps"]) == (2, [step_metadata.ENOUGH_STEPS] * 2)


def test_fewer_and_more_tokens_of_the_same_step(stock, shared):
    """The drafter's first pass leaves a CUDA graph's padding out; too short is not shared."""
    first, second = buffers(2)
    common = metadata_of(stock, [2, 1], padding=5)
    shared(common, first)
    common.num_actual_tokens = 3
    assert shared(common, second).tolist() == [0, 0, 1]
    assert second.unique().tolist() == [POISON]
    common.num_actual_tokens = 9
    assert shared(common, second).tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 0]


def test_micro_batches_do_not_share(stock, shared):
    """vLLM's --enable-dbo splits a step: each part has requests of its own."""
    first, second = buffers(2)
    one, two = metadata_of(stock, [2, 2]), metadata_of(stock, [1, 3])
    assert shared(one, first).tolist() == [0, 0, 1, 1]
    assert shared(two, second).tolist() == [0, 1, 1, 1]


def test_a_step_that_is_over_keeps_nothing_alive(stock, shared):
    import gc
    import weakref

    common = metadata_of(stock, [1, 1])
    shared(common, *buffers(1))
    starts = weakref.ref(common.query_start_loc_cpu)
    del common
    gc.collect()
    assert starts() is None

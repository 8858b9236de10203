# SPDX-License-Identifier: Apache-2.0
"""The warm-up's batches: what they cover, that vLLM's runner takes them, and when they run."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_sm12x.integration.warm_up import RESERVE, SAMPLING_KINDS, batches


@pytest.mark.once
class TestBatches:
    @given(
        st.integers(1, 1024),
        st.integers(1, 16384),
        st.integers(32, 200_000),
        st.integers(0, 8),
        st.lists(st.integers(1, 20_000), max_size=5),
        st.lists(st.integers(1, 2000), max_size=5),
    )
    def test_stay_within_the_engines_limits(self, seqs, tokens, length, drafts, prefills, decodes):
        found = batches(
            max_num_seqs=seqs,
            max_num_batched_tokens=tokens,
            max_model_len=length,
            draft_tokens=drafts,
            prefill_tokens=prefills,
            decode_requests=decodes,
        )
        assert len(set(found)) == len(found)
        for batch in found:
            assert 1 <= len(batch.prompts) <= seqs and min(batch.prompts) >= 1
            assert max(*batch.prompts, batch.joining) + RESERVE <= length
            first = batch.first_chunk
            for prompts in [batch.prompts] if first is None else [
                [first for _ in batch.prompts], [prompt - first for prompt in batch.prompts]
            ]:  # fmt: skip
                assert min(prompts) >= 1 and sum(prompts) <= tokens
            if batch.drafts is not None:
                assert len(batch.drafts) == len(batch.prompts)
                assert set(batch.drafts) <= {0, drafts}
                assert len(batch.prompts) + (batch.joining > 0) <= seqs
                assert sum(batch.drafts) + len(batch.prompts) + batch.joining <= tokens
                assert not batch.joining or batch.joining > 1 + drafts
                assert 0 <= batch.staying < len(batch.prompts)

    def test_a_state_is_copied_to_another_block(self):
        limits = {"max_num_seqs": 8, "max_num_batched_tokens": 2048, "draft_tokens": 1}
        plain = batches(max_model_len=4096, **limits)
        (copying,) = set(batches(max_model_len=4096, state_block=544, **limits)) - set(plain)
        assert copying.first_chunk == 544 < copying.prompts[0] <= 2 * 544
        short = {"max_model_len": 512, **limits}
        assert batches(state_block=544, **short) == batches(**short)

    def test_cover_what_triton_and_the_sampler_tell_apart(self):
        found = batches(
            max_num_seqs=64, max_num_batched_tokens=8192, max_model_len=32768, draft_tokens=2,
            prefill_tokens=[77], decode_requests=[11],
        )  # fmt: skip
        prefills = {sum(batch.prompts) for batch in found if batch.drafts is None}
        assert {1, 2, 3, 15, 16, 17, 77, 1024, 8192} <= prefills
        decodes = [batch for batch in found if batch.drafts is not None]
        for requests in (1, 2, 3, 11, 16, 17, 64):
            running = {batch.drafts for batch in decodes if len(batch.prompts) == requests}
            assert {(0,) * requests, (2,) * requests} <= running
            assert requests == 1 or any(len(set(drafts)) == 2 for drafts in running)
            assert requests == 64 or any(
                batch.joining and len(batch.prompts) == requests for batch in decodes
            )
        for kind in SAMPLING_KINDS:
            sizes = {len(batch.prompts) for batch in decodes if batch.sampling == kind}
            assert {1, 3, 8, 16} <= sizes
        assert any(batch.first_chunk for batch in found)
        joining = {batch.joining % 16 for batch in decodes if len(batch.prompts) % 4}
        assert 0 in joining and len(joining) > 1


RUN = """
import inspect
import os
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock
import torch
from vllm.v1.worker import gpu_model_runner, gpu_worker
from vllm.v1.worker.gpu_input_batch import InputBatch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.worker_base import WorkerWrapperBase
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

QUERY, SEQS, TOKENS, LENGTH, BLOCK = 3, 8, 256, 512, 256
config = engine_config(
    MODEL, max_num_seqs=SEQS, max_num_batched_tokens=TOKENS, max_model_len=LENGTH,
    speculative_config={"method": "mtp", "num_speculative_tokens": QUERY - 1},
)
wrapper = WorkerWrapperBase(rpc_rank=0)
wrapper.init_worker([{
    "vllm_config": config, "local_rank": 0, "rank": 0,
    "distributed_init_method": "tcp://127.0.0.1:1", "is_driver_worker": True,
}])
worker = wrapper.worker
happened = []
ONE_RANK = SimpleNamespace(is_first_rank=True, is_last_rank=True, world_size=1)
gpu_model_runner.get_pp_group = gpu_worker.get_pp_group = lambda: ONE_RANK

def unpinned(make):
    return lambda *size, **options: make(*size, **{**options, "pin_memory": False})

# Pinning needs a driver.
for name in ("zeros", "ones", "empty", "full"):
    setattr(torch, name, unpinned(getattr(torch, name)))
torch.Tensor.pin_memory = lambda self, *_: self

def input_batch():
    given = dict(
        max_num_reqs=SEQS, max_model_len=LENGTH, max_num_batched_tokens=TOKENS,
        device=torch.device("cpu"), pin_memory=False, vocab_size=8192, block_sizes=[BLOCK, 64],
        kernel_block_sizes=[BLOCK, 64], max_num_blocks_per_req=[3, 9], num_speculative_tokens=2,
        is_spec_decode=True,
    )
    known = inspect.signature(InputBatch.__init__).parameters
    return InputBatch(**{name: value for name, value in given.items() if name in known})

class Runner:
    # vLLM's own bookkeeping of requests, on a CPU; what it needs a GPU for is left out.
    def __init__(self):
        self.is_pooling_model = False
        spec = lambda size: SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=size))
        groups = [spec(BLOCK), spec(64)]
        self.kv_cache_config = SimpleNamespace(num_blocks=20, kv_cache_groups=groups)
        self.cudagraph_dispatcher = SimpleNamespace(keys_initialized=True)
        self.states = mock.MagicMock(
            requests={}, input_batch=input_batch(), num_prompt_logprobs={}, is_pooling_model=False,
            uses_mrope=False, uses_xdrope_dim=0, use_async_scheduling=False, encoder_cache={},
            use_async_spec_decode=False, speculative_config=None, max_num_reqs=SEQS,
            num_spec_tokens=QUERY - 1,
        )
        self.steps = []
        self.sampled = True
        self.previous = set()
        self.sizes = []

    def load_model(self, **arguments):
        pass

    def execute_model(self, output, intermediate_tensors=None):
        assert self.sampled, "a step began before the last one was sampled"
        assert not self.cudagraph_dispatcher.keys_initialized, "a graph would be replayed"
        scheduled = output.num_scheduled_tokens
        assert output.total_num_scheduled_tokens == sum(scheduled.values()) <= TOKENS
        GPUModelRunner._update_states(self.states, output)
        batch = self.states.input_batch
        assert set(batch.req_id_to_index) == set(scheduled), "the runner holds other requests"
        for name, tokens in scheduled.items():
            state = self.states.requests[name]
            at = state.num_computed_tokens
            known = state.num_tokens + len(output.scheduled_spec_decode_tokens.get(name, []))
            # A token that the runner does not know cannot be its input.
            assert at + tokens <= known, (name, at, tokens, known)
            for blocks, size in zip(state.block_ids, (BLOCK, 64)):
                assert len(blocks) * size >= at + tokens
                assert all(0 < block < 20 for block in blocks)
        if self.previous & scheduled.keys():
            self.sizes.append((len(scheduled), len(self.previous)))
        if scheduled:
            self.steps.append(len(scheduled))
            self.previous = set(scheduled)
            self.sampled = False
            return None
        return EMPTY_MODEL_RUNNER_OUTPUT

    def sample_tokens(self, grammar):
        self.sampled = True
        # As the runner does: each request that has its whole prompt gets a token.
        for index, name in enumerate(self.states.input_batch.req_ids):
            state = self.states.requests[name]
            state.output_token_ids.append(0)
            self.states.input_batch.num_tokens_no_spec[index] += 1
        return EMPTY_MODEL_RUNNER_OUTPUT

worker.model_runner = runner = Runner()
worker.use_v2_model_runner = False
worker.device = torch.device("cpu")
worker.load_model()

from vllm_sm12x.integration import compile_watch, startup, warm_up
from vllm_sm12x.vllm_api import warm_up as steps
launched = []
stock = gpu_worker.Worker.compile_or_warm_up_model
prefill_metadata = []

class Recorded:
    def __getitem__(self, grid):
        def launch(*args, BLOCK_SIZE):
            outputs, seq_lens, starts, prefills, decodes, window = args
            assert len(outputs) >= prefills and len(seq_lens) >= prefills + decodes + 1
            prefill_metadata.append([prefills, decodes, BLOCK_SIZE])
        return launch

has_kernel = hasattr(steps.sparse_swa, "_compute_prefill_metadata_kernel")
if has_kernel:
    steps.sparse_swa._compute_prefill_metadata_kernel = Recorded()

def stock_step(self):
    happened.append(["stock", runner.cudagraph_dispatcher.keys_initialized])
    return "times"

def warmed(setting=None):
    before = len(runner.steps)
    os.environ.pop("VLLM_SM12X_WARMUP", None)
    if setting:
        os.environ["VLLM_SM12X_WARMUP"] = setting
    with mock.patch.object(gpu_worker.Worker, "compile_or_warm_up_model", stock_step), \\
         mock.patch.object(steps, "get_pp_group", lambda: ONE_RANK), \\
         mock.patch.object(steps, "is_global_first_rank", lambda: True), \\
         mock.patch.object(steps, "finish", lambda: happened.append(["finished", True])), \\
         mock.patch.object(warm_up, "multiprocessors", lambda name, device: 188), \\
         mock.patch.object(warm_up, "_launch_long_contexts", lambda *_: launched.append(1)), \\
         mock.patch.object(compile_watch.watch, "arm", lambda: happened.append(["armed", True])), \\
         mock.patch.object(startup, "ready", [lambda: compile_watch.watch.arm()]):
        times = worker.compile_or_warm_up_model()
    return [len(runner.steps) - before, times]

# A hybrid model's runner, with vLLM's own specs and its own reading of a state's blocks.
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MambaSpec,
)

def hybrid(mode, state_tokens):
    attention = FullAttentionSpec(
        block_size=64, num_kv_heads=2, head_size=256, dtype=torch.bfloat16
    )
    state = MambaSpec(
        block_size=state_tokens, shapes=((4, 8),), dtypes=(torch.float32,),
        mamba_cache_mode=mode, num_speculative_blocks=QUERY - 1,
    )
    groups = [KVCacheGroupSpec(["attention"], attention), KVCacheGroupSpec(["gdn"], state)]
    mine = Runner()
    mine.kv_cache_config = KVCacheConfig(
        num_blocks=200, kv_cache_tensors=[], kv_cache_groups=groups
    )
    seen = {"states": [], "zeroed": [], "unzeroed": 0}

    def execute_model(output, intermediate_tensors=None):
        zeroed = set(output.new_block_ids_to_zero or ())
        assert all(0 < block < 200 for block in zeroed)
        if not output.num_scheduled_tokens:
            seen["zeroed"].append(len(zeroed))
        for new in output.scheduled_new_reqs:
            seen["unzeroed"] += len(set(new.block_ids[0]) - zeroed)
            tables[new.req_id] = new.block_ids[1]
        for name, tokens in output.num_scheduled_tokens.items():
            known = dict(zip(output.scheduled_cached_reqs.req_ids,
                             output.scheduled_cached_reqs.num_computed_tokens))
            row = tables[name] + [0] * 8
            after = torch.tensor([known.get(name, 0) + tokens])
            blocks = mamba_get_block_table_tensor(torch.tensor([row]), after, state, mode)
            seen["states"].append([
                len(set(blocks[0, :QUERY].tolist()) - {0}), len(tables[name])
            ])
        return EMPTY_MODEL_RUNNER_OUTPUT

    tables = {}
    mine.execute_model = execute_model
    mine.sample_tokens = lambda grammar: EMPTY_MODEL_RUNNER_OUTPUT
    with mock.patch.object(worker, "model_runner", mine), \
         mock.patch.object(steps, "get_pp_group", lambda: ONE_RANK):
        seen["state_block"] = steps.state_block(worker)
        engine = steps.Engine(worker, warm_up.RESERVE)
        engine.zero_blocks(warm_up.BLOCKS_TO_ZERO)
        engine.run((13, 13), drafts=(2, 0), joining=30, staying=1)
        engine.run((128 + 13,), first_chunk=128, drafts=(2,))
    return seen

hybrids = {"none": hybrid("none", LENGTH), "align": hybrid("align", 128)}

from vllm_sm12x import changes
from vllm_sm12x.vllm_api import graph_capture

(row,) = [one for one in changes.report() if one.change.name == "graph_warm_up"]
captures = []

class Captured(SimpleNamespace):
    def _dummy_run(self, tokens, **arguments):
        captures.append([
            arguments["cudagraph_runtime_mode"].name, arguments.get("is_graph_capturing", False)
        ])

def capture(mode):
    captures.clear()
    runner = Captured(compilation_config=SimpleNamespace(cudagraph_num_of_warmups=1))
    batch = SimpleNamespace(num_tokens=2, uniform=True, num_active_loras=0)
    with mock.patch.object(torch.accelerator, "synchronize", lambda *_: None):
        graph_capture.GPUModelRunner._warmup_and_capture(
            runner, batch, cudagraph_runtime_mode=graph_capture.CUDAGraphMode[mode]
        )
    return list(captures), "_dummy_run" in vars(runner)

capturing = {mode: capture(mode) for mode in ("FULL", "PIECEWISE")}
first = warmed()
order, sizes = list(happened), list(runner.sizes)
again = warmed()
warm_up._done.clear()
config.kv_transfer_config = SimpleNamespace()
transferring = warmed()
config.kv_transfer_config = None
with mock.patch.object(warm_up.selection, "serves", lambda config: False):
    other = [warmed(), warmed("1")]
    warm_up._done.clear()
    text_config = SimpleNamespace(layer_types=["linear_attention", "full_attention"])
    gdn_model = SimpleNamespace(model="gdn", hf_text_config=text_config, is_encoder_decoder=False,
                                max_model_len=LENGTH)
    with mock.patch.object(config, "model_config", gdn_model):
        gdn = warmed()
warm_up._done.clear()
# Forced on a Hopper GPU, where of our ops only the attention is used.
with mock.patch.object(warm_up.providers, "on_sm12x_path", lambda: False), \\
     mock.patch.object(warm_up, "gluon_kernels", lambda device: {"wgmma": True}), \\
     mock.patch.object(warm_up, "multiprocessors", lambda name, device: 132):
    forced = [sum(batch.prompts) for batch in warm_up._plan(worker, True, None)
              if batch.drafts is None]
hopper = warm_up.Target(132, warm_up.launch_policy(), wgmma=True, attention_only=True)
widths = warm_up.Widths.of(config)
own = warm_up.representatives(widths, range(1, TOKENS + 1), hopper)
runner.execute_model = lambda *_: 1 / 0
failed = failure_of(warmed, "1")
answer({
    "first": first, "order": order, "again": again, "transferring": transferring, "other": other,
    "failed": failed, "launched": len(launched), "requests": len(runner.states.requests),
    "gdn": gdn, "hybrids": hybrids, "prefill_metadata": prefill_metadata, "has_kernel": has_kernel,
    "forced": [forced, own],
    "sizes": sizes, "capturing": capturing, "row": [row.state.value, row.detail],
    "graphs": runner.cudagraph_dispatcher.keys_initialized, "most": max(runner.steps),
    "registered": [[step.__qualname__ for step in steps]
                   for steps in (startup.before_capture, startup.ready)],
    "undone": None if changes.undo_all() else capture("FULL")[0],
    "left": len(startup.before_capture + startup.ready + startup.config_complete),
})
"""


@pytest.fixture(scope="module")
def ran(host):
    return host(RUN)


@pytest.mark.contract
class TestOnVllm:
    def test_the_v1_runner_takes_every_batch(self, ran):
        steps, times = ran.answer["first"]
        assert steps > 100 and times == "times"
        assert ran.answer["requests"] == 0 and ran.answer["most"] == 8

    def test_any_numbers_of_prefills_and_decodes_are_compiled(self, ran):
        if not ran.answer["has_kernel"]:
            pytest.skip("this vLLM's kernel is not specialised on them")

        def variant(prefills, decodes, block):
            # As Triton specialises integers: 1, multiples of 16, and others.
            kinds = [(number == 1, number % 16 == 0) for number in (prefills, decodes)]
            return (*kinds, block)

        warmed = {variant(*launch) for launch in ran.answer["prefill_metadata"]}
        for prefills in range(1, 8 + 1):  # SEQS
            for decodes in range(8 + 1 - prefills):
                assert variant(prefills, decodes, 1 << (prefills - 1).bit_length()) in warmed

    def test_torch_compile_has_seen_every_change_of_the_batch(self, ran):
        # What corrects the counts of tokens, by the requests of a step and those of the last one.
        from vllm.v1.spec_decode.utils import update_num_computed_tokens_for_batch_change

        compiles = []

        def compiled(graph, inputs):
            compiles.append(graph)
            return graph

        correct = torch.compile(
            update_num_computed_tokens_for_batch_change.__wrapped__, dynamic=True, backend=compiled
        )
        known, drafted = (torch.zeros(8, dtype=torch.int32) for _ in range(2))

        def step(requests, previous):
            accepted, places = (torch.zeros(requests, dtype=torch.int64) for _ in range(2))
            sampled = torch.zeros(previous, dtype=torch.int32)
            correct(known, accepted, places, sampled, drafted, known[:requests].clone())

        for requests, previous in ran.answer["sizes"]:
            step(requests, previous)
        warm = len(compiles)
        for requests, previous in itertools.product(range(1, 9), repeat=2):
            step(requests, previous)
        assert 1 < warm == len(compiles)

    def test_it_runs_without_graphs_before_vllm_captures_them(self, ran):
        assert ran.answer["order"] == [["finished", True], ["stock", True], ["armed", True]]
        assert ran.answer["graphs"] is True
        assert ran.answer["registered"] == [["warm_up"], ["CompileWatch.arm"]]

    def test_a_full_graph_is_warmed_up_as_it_is_captured(self, ran):
        assert ran.answer["row"][0] == "active", ran.answer["row"][1]
        full, piecewise = ran.answer["capturing"]["FULL"], ran.answer["capturing"]["PIECEWISE"]
        assert full == [[["NONE", True], ["FULL", True]], False]
        assert piecewise == [[["NONE", False], ["PIECEWISE", True]], False]
        assert ran.answer["left"] == 0
        assert ran.answer["undone"] == [["NONE", False], ["FULL", True]]

    def test_once_in_a_process(self, ran):
        assert ran.answer["again"] == [0, "times"]

    def test_an_engine_that_cannot_take_them_says_so(self, ran):
        assert ran.answer["transferring"] == [0, "times"]
        assert "this engine moves its KV cache to other engines" in ran.output

    def test_other_models_only_when_asked(self, ran):
        (unasked, _), (asked, _) = ran.answer["other"]
        assert unasked == 0 and asked > 50

    def test_the_attention_has_its_sizes_where_it_is_forced(self, ran):
        forced, own = ran.answer["forced"]
        assert len(own) > 1 and set(own) <= set(forced)

    def test_models_with_linear_attention_unasked(self, ran):
        steps, _ = ran.answer["gdn"]
        assert steps > 50

    @pytest.mark.parametrize(("mode", "tokens"), [("none", None), ("align", 128)])
    def test_a_state_has_its_blocks_and_those_of_drafts(self, ran, mode, tokens):
        seen = ran.answer["hybrids"][mode]
        assert seen["state_block"] == tokens
        assert {states for states, _ in seen["states"]} == {3}
        # vLLM's table has no room for more in this mode.
        assert mode != "none" or {held for _, held in seen["states"]} == {3}

    def test_blocks_that_states_and_keys_share_are_zeroed(self, ran):
        for seen in ran.answer["hybrids"].values():
            assert seen["zeroed"][:3] == [1, 2, 16] and seen["unzeroed"] == 0

    def test_a_failure_names_the_batch_and_the_way_out(self, ran):
        assert ran.answer["failed"].startswith("RuntimeError: The warm-up failed at Batch(prompts=")
        assert "VLLM_SM12X_WARMUP=0 leaves it out" in ran.answer["failed"]

    def test_the_time_is_said(self, ran):
        assert "Warmed up with" in ran.output

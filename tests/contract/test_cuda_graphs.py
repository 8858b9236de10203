# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs under speculative decoding: sizes, mode, who decides, and where vLLM dispatches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sm12x.integration.cuda_graphs import capture_sizes, request_counts


@pytest.mark.once
class TestSizes:
    def test_every_number_of_requests_up_to_64(self):
        assert request_counts(1) == [1]
        assert request_counts(64) == list(range(1, 65))

    def test_progression_beyond(self):
        assert request_counts(256) == [
            *range(1, 33), *range(36, 65, 4), *range(72, 129, 8), *range(144, 257, 16),
        ]  # fmt: skip
        assert len(request_counts(256)) == 56
        assert request_counts(100)[-3:] == [88, 96, 100]
        assert request_counts(1024)[-2:] == [240, 256]

    def test_what_the_founders_saw_missing(self):
        stock = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40, 48]
        sizes = capture_sizes(max_num_seqs=8, query_len=3, stock=stock, max_num_batched_tokens=2048)
        assert sizes == [1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 32, 40, 48]

    def test_no_batch_is_larger_than_what_is_scheduled(self):
        sizes = capture_sizes(
            max_num_seqs=8, query_len=4, stock=[1, 2, 4, 8], max_num_batched_tokens=9
        )
        assert sizes == [1, 2, 4, 8]
        assert capture_sizes(
            max_num_seqs=8, query_len=4, stock=[1, 2], max_num_batched_tokens=3
        ) == [1, 2]

    @given(
        st.integers(1, 2048),
        st.integers(2, 9),
        st.sets(st.integers(1, 1024)),
        st.integers(16, 16384),
    )
    def test_padding_is_bounded(self, max_num_seqs, query_len, stock, most):
        stock = {size for size in stock if size <= most}
        sizes = capture_sizes(
            max_num_seqs=max_num_seqs, query_len=query_len, stock=stock, max_num_batched_tokens=most
        )
        assert sizes == sorted(set(sizes)) and sizes
        for requests in range(1, min(max_num_seqs, most // query_len, 256) + 1):
            tokens = requests * query_len
            padded = next(size for size in sizes if size >= tokens)
            assert padded % query_len == 0
            assert padded == tokens or (max_num_seqs > 64 and requests > 32)
            assert padded <= tokens * 1.13


CASES = """
import inspect
import os
from types import SimpleNamespace
from unittest import mock
import torch
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.worker.gpu import cudagraph_utils

def spec(k):
    return {"speculative_config": {"method": "mtp", "num_speculative_tokens": k}}

def config(capability=None, allow=None, **arguments):
    for name, value in {"VLLM_SM12X_ASSUME": capability,
                        "VLLM_TRITON_MLA_SPARSE_ALLOW_CUDAGRAPH": allow}.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    return engine_config(MODEL, **{"max_num_batched_tokens": 4096, **arguments})

def on_v1(config, query_len):
    # As GPUModelRunner does once it knows what its attention backends can do.
    if config.compilation_config.cudagraph_mode.decode_mode().name == "FULL":
        adjust = config.compilation_config.adjust_cudagraph_sizes_for_spec_decode
        adjust(*[query_len, 1][: adjust.__code__.co_argcount - 1])
    dispatcher = CudagraphDispatcher(config)
    dispatcher.initialize_cudagraph_keys(config.compilation_config.cudagraph_mode, query_len)
    def dispatch(requests):
        mode, found = dispatcher.dispatch(requests * query_len, uniform_decode=True)
        return [mode.name, found.num_tokens, found.num_reqs]
    return [dispatch(r) for r in range(1, config.scheduler_config.max_num_seqs + 1)]

def on_v2(config, query_len):
    group = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    with mock.patch.object(cudagraph_utils, "get_pp_group", lambda: group), \\
         mock.patch.object(cudagraph_utils.current_platform, "get_global_graph_pool", lambda: None):
        manager = cudagraph_utils.CudaGraphManager(
            config, torch.device("cpu"), config.compilation_config.cudagraph_mode, query_len
        )
    manager._graphs_captured = True
    known = inspect.signature(manager.dispatch).parameters
    more = {"num_active_loras": 0} if "num_active_loras" in known else {}
    def dispatch(requests):
        found = manager.dispatch(requests, requests * query_len, query_len, **more)
        return [found.cg_mode.name, found.num_tokens, found.num_reqs]
    return [dispatch(r) for r in range(1, config.scheduler_config.max_num_seqs + 1)]

def facts(make, query_len=1):
    made = make()
    found = {**config_facts(made), "max": made.compilation_config.max_cudagraph_capture_size}
    if query_len > 1:
        import copy
        found["v1"] = on_v1(copy.deepcopy(made), query_len)
        found["v2"] = on_v2(copy.deepcopy(made), query_len)
    return found

answer({
    **{f"mtp {k}": facts(lambda k=k: config(**spec(k)), 1 + k) for k in (1, 2, 3, 4)},
    "plain": facts(config),
    "256 requests": facts(lambda: config(max_num_seqs=256, **spec(2)), 3),
    "SM121": facts(lambda: config("12.1", **spec(2)), 3),
    "SM121 plain": facts(lambda: config("12.1")),
    "SM121 allowed": facts(lambda: config("12.1", "1", **spec(2))),
    "SM121 own mode": facts(
        lambda: config(
            "12.1", compilation_config={"cudagraph_mode": "FULL_AND_PIECEWISE"}, **spec(2)
        )
    ),
    "own sizes": facts(
        lambda: config(compilation_config={"cudagraph_capture_sizes": [3, 12, 24]}, **spec(2))
    ),
    "own largest": facts(
        lambda: config(compilation_config={"max_cudagraph_capture_size": 16}, **spec(2))
    ),
    "piecewise": facts(
        lambda: config(compilation_config={"cudagraph_mode": "PIECEWISE"}, **spec(2))
    ),
    "eager": facts(lambda: config(enforce_eager=True, **spec(2))),
    "not allowed": facts(lambda: config(allow="0", **spec(2))),
})
"""


@pytest.fixture(scope="module")
def ours(host):
    return host(CASES)


@pytest.mark.contract
class TestOnVllm:
    @pytest.mark.parametrize("k", [1, 2, 3, 4])
    @pytest.mark.parametrize("runner", ["v1", "v2"])
    def test_every_decode_batch_has_its_graph(self, ours, k, runner):
        found = ours.answer[f"mtp {k}"][runner]
        assert found == [["FULL", (1 + k) * r, r] for r in range(1, 9)]

    def test_sizes_and_the_largest_agree(self, ours):
        for case in ours.answer.values():
            assert case["max"] == max(case["capture_sizes"], default=0)

    @pytest.mark.parametrize("runner", ["v1", "v2"])
    def test_many_requests_stay_in_graphs(self, ours, runner):
        found = ours.answer["256 requests"][runner]
        assert found[:32] == [["FULL", 3 * r, r] for r in range(1, 33)]
        assert {mode for mode, _, _ in found} == {"FULL"}
        assert all(tokens == 3 * requests for _, tokens, requests in found)
        assert found[32] == ["FULL", 108, 36] and found[255] == ["FULL", 768, 256]

    def test_without_speculation_vllm_decides(self, ours):
        plain = ours.answer["plain"]
        assert plain["cudagraph_mode"] == "FULL_AND_PIECEWISE"
        assert {1, 2, 4, 8, 16} <= set(plain["capture_sizes"]) and 3 not in plain["capture_sizes"]
        assert ours.answer["SM121 plain"] == plain

    def test_the_mode_is_vllms_on_sm120_and_decode_only_on_sm121(self, ours, vllm_version):
        assert ours.answer["mtp 2"]["cudagraph_mode"] == "FULL_AND_PIECEWISE"
        assert ours.answer["SM121"]["cudagraph_mode"] == "FULL_DECODE_ONLY"
        assert ours.answer["SM121 allowed"]["cudagraph_mode"] == "FULL_AND_PIECEWISE"
        assert ours.answer["SM121 own mode"]["cudagraph_mode"] == "FULL_AND_PIECEWISE"
        assert ours.answer["SM121"]["v1"] == ours.answer["mtp 2"]["v1"]

    def test_the_users_sizes_stand(self, ours):
        assert ours.answer["own sizes"]["capture_sizes"] == [3, 12, 24]
        assert ours.answer["own largest"]["max"] == 16
        assert 9 not in ours.answer["own largest"]["capture_sizes"]
        assert ours.answer["piecewise"]["cudagraph_mode"] == "PIECEWISE"
        assert 9 not in ours.answer["piecewise"]["capture_sizes"]

    @pytest.mark.parametrize("case", ["eager", "not allowed"])
    def test_no_graphs_stay_none(self, ours, case):
        assert ours.answer[case]["cudagraph_mode"] == "NONE"
        assert ours.answer[case]["capture_sizes"] == []

    def test_the_rule_that_decided_is_said(self, ours):
        said = [line for line in ours.output.splitlines() if "CUDA graphs with 2 draft" in line]
        assert any("FULL_AND_PIECEWISE, vLLM's default; 13 sizes to 48 tokens" in x for x in said)
        assert any("FULL_DECODE_ONLY, as FULL_AND_PIECEWISE hangs on SM 12.1" in x for x in said)
        assert any("kept by VLLM_TRITON_MLA_SPARSE_ALLOW_CUDAGRAPH=1" in x for x in said)
        assert any("sizes by --compilation-config: 3, 12, 24 tokens" in x for x in said)
        assert any("PIECEWISE, by --compilation-config." in x for x in said)
        assert all(said.count(line) == 1 for line in said)

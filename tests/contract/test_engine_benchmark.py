# SPDX-License-Identifier: Apache-2.0
"""benchmarks/engine.py: vLLM's client against a server without a model, traces, and comparisons."""

import copy
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

pytestmark = pytest.mark.once

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import engine  # noqa: E402

STAND_IN = Path(__file__).parent / "stand_in_engine"
# What the stand-in takes for a step and for a token of a prompt.
STEP_MS, PREFILL_US = 4.0, 20.0


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"vocab_size": 8192}')
    return directory


def run(model, *options, fault="", contexts="64,96", batches="1,4", vllm_args=()):
    """Run the program against the stand-in; its exit status and output, result and server log."""
    path = model.parent / "result.json"
    given = [
        *("run", "--model", str(model), "--label", "ours", "--json", str(path), "--limit", "60"),
        *("--contexts", contexts, "--batches", batches, "--output-len", "129"),
        *("--env", f"PYTHONPATH={STAND_IN}", "--env", f"STAND_IN_FAULT={fault}", *options),
        *("--", *vllm_args),
    ]
    ran = CliRunner().invoke(engine.app, given)
    result = json.loads(path.read_text()) if path.exists() else None
    return ran, result, path.with_suffix(".server.log").read_text()


def test_every_point_is_measured_by_vllms_client(model):
    ran, result, log = run(model, vllm_args=("--max-num-seqs", "16"))
    assert ran.exit_code == 0, ran.output
    points = result["points"]
    assert [(p["context"], p["batch"]) for p in points] == [(64, 1), (64, 4), (96, 1), (96, 4)]
    for point in points:
        assert point["completed"] == point["requests"] == (3 if point["batch"] == 1 else 4)
        assert STEP_MS <= point["decode_step_ms"] < 2 * STEP_MS
        assert point["decode_step_ms"] <= point["decode_step_p99_ms"]
        assert (point["tokens_per_gap"], point["tokens_per_step"]) == (8, 1)
        assert ("prefill_us_per_token" in point) == (point["batch"] == 1)
        assert point.get("prefill_us_per_token", PREFILL_US) == pytest.approx(PREFILL_US)
    assert result["problems"] == [] == result["profiles"] == result["prefill_profiles"]
    arguments = json.loads(re.search(r"arguments (.*)", log)[1])
    assert arguments[-2:] == ["--max-num-seqs", "16"]
    assert " --max-model-len 8289 --max-num-seqs 4 " in " ".join(arguments)
    assert "--profiler-config" not in arguments


def test_a_step_with_drafts_yields_several_tokens(model):
    ran, result, log = run(model, "--mtp", "1", contexts="64")
    assert ran.exit_code == 0, ran.output
    assert '\\"num_speculative_tokens\\": 1' in log
    for point in result["points"]:
        assert point["tokens_per_step"] == 2
        assert STEP_MS <= point["decode_step_ms"] < 2 * STEP_MS


def test_answers_get_longer_until_all_decode_together(model, monkeypatch):
    longer = []
    monkeypatch.setattr(engine, "ENOUGH_GAPS", 18)  # of 16 in a first answer
    monkeypatch.setattr(
        engine, "longer_answer", lambda result, answer: longer.append(answer) or 2 * answer - 1
    )
    ran, result, _ = run(model, contexts="64", batches="4")
    assert ran.exit_code == 0, ran.output
    assert longer == [129]
    assert result["points"][0]["answer"] == 257


def test_the_kernels_of_a_point_are_listed(model):
    ran, result, log = run(model, "--profile", "64x4", contexts="64")
    assert ran.exit_code == 0, ran.output
    (profiled,) = result["profiles"]
    assert (profiled["context"], profiled["batch"], profiled["steps"]) == (64, 4, 4)
    assert profiled["us_per_step"] == 100
    assert profiled["groups"] == {"gemm": 50, "attention": 35, "copies": 15}
    assert profiled["kernels"][1] == {
        "name": "sparse_mla_kernel", "group": "attention", "us_per_step": 30,
        "calls_per_step": 1, "share": 0.3,
    }  # fmt: skip
    assert '\\"max_iterations\\": 20' in log
    assert "--profiler-config" not in result["vllm_args"]


def test_the_kernels_of_a_new_prompts_prefill_are_listed(model):
    options = ("--profile", "64x1", "--profile-prefill", "96", "--profile-prefill", "64")
    ran, result, _ = run(model, *options)
    assert ran.exit_code == 0, ran.output
    assert [profiled["us_per_step"] for profiled in result["profiles"]] == [100]
    first, second = result["prefill_profiles"]
    # The stand-in prefills 32 tokens a step, and nothing of a prompt that it knows.
    assert (first["context"], first["tokens"], first["steps"]) == (64, 64, 2)
    assert (second["context"], second["tokens"], second["steps"]) == (96, 96, 3)
    assert first["us_per_token"] == 100 / 32
    assert first["groups"] == {"gemm": 50 / 32, "attention": 35 / 32, "copies": 15 / 32}
    assert first["kernels"][1] == {
        "name": "sparse_mla_kernel", "group": "attention", "us_per_token": 30 / 32,
        "calls_per_step": 1, "share": 0.3,
    }  # fmt: skip


def test_a_prefill_can_be_profiled_alone(model):
    ran, result, log = run(model, "--profile-prefill", "64", contexts="64", batches="1")
    assert ran.exit_code == 0, ran.output
    assert "3.12 us of kernels a token, 2 steps" in " ".join(ran.output.split())
    assert result["profiles"] == []
    assert [profiled["context"] for profiled in result["prefill_profiles"]] == [64]
    assert '\\"max_iterations\\": 20' in log


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("http_500", "context 96, batch 1: 3 of 3 requests failed: Internal Server Error"),
        ("short", r"answers of \[128\] tokens, expected 129"),
        ("cached", "192 tokens of the prompts came from the prefix cache"),
        ("preemption", "preemptions: the KV cache is too small"),
    ],
)
def test_a_point_with_a_fault_has_no_time(model, fault, said):
    ran, result, _ = run(model, fault=fault)
    assert ran.exit_code == 1
    assert any(re.search(said, problem) for problem in result["problems"]), result["problems"]
    faulty = [point for point in result["points"] if point["problems"]]
    assert faulty
    assert all("decode_step_ms" not in point for point in faulty)


def test_requests_that_never_decode_together_have_no_time(model, monkeypatch):
    monkeypatch.setattr(engine, "LONGEST_ANSWER", 193)
    ran, result, _ = run(model, fault="no_overlap", contexts="64", batches="2")
    assert ran.exit_code == 1
    assert "2 requests hardly decode together, 0 gaps are too few" in result["problems"][0]
    assert result["points"][0]["answer"] == 193


def test_what_was_measured_before_the_server_died_is_written(model):
    ran, result, _ = run(model, fault="death")
    assert ran.exit_code == 1
    assert "decode_step_ms" in result["points"][0]
    problems = "\n".join(result["problems"])
    assert "The end of" in problems and "Serving Benchmark Result" in problems
    assert "the server ended with status 7" in problems


def test_a_client_that_does_not_start_says_why(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm.benchmarks.serve", None)
    monkeypatch.setattr(engine.importlib, "import_module", lambda name: None)
    ran, result, _ = run(model)
    assert ran.exit_code == 1
    assert result["points"] == []
    assert "ModuleNotFoundError: import of vllm.benchmarks.serve" in result["problems"][0]


def test_a_profile_of_other_steps_is_refused(model):
    ran, result, _ = run(model, "--profile", "64x1", fault="mixed_profile", contexts="64")
    assert ran.exit_code == 1
    assert result["profiles"] == []
    assert "(prefilling, decoding) requests [(1, 1)]" in result["problems"][0]


def test_a_profile_of_a_part_of_a_prefill_is_refused(model):
    options = ("--profile", "64x1", "--profile-prefill", "64")
    ran, result, _ = run(model, *options, fault="cut_profile", contexts="64", batches="1")
    assert ran.exit_code == 1
    assert len(result["profiles"]) == 1 and result["prefill_profiles"] == []
    assert "has 32 prompt tokens in 1 steps, expected 64" in result["problems"][0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--profile", "64"), "CONTEXTxBATCH"),
        (("--profile", "64x2"), "64x2 is not measured"),
        (("--profile-prefill", "64"), "--profile-prefill 64 is not measured"),
        (("--batches", "1,x"), "expected positive integers"),
        (("--contexts", "0"), "expected positive integers"),
        (("--env", "A"), "K=V"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(model, options, said):
    given = ["--model", str(model), "--label", "ours", "--json", str(model / "result.json")]
    ran = CliRunner().invoke(engine.app, ["run", *given, *options])
    assert ran.exit_code == 2
    assert said in " ".join(ran.output.split())


def test_only_gaps_count_during_which_the_whole_batch_decodes():
    result = {
        "start_times": [0.0, 1.0],
        "ttfts": [1.0, 1.5],
        "itls": [[1.0, 1.0, 1.0, 1.0], [0.5, 1.0, 1.5]],
    }
    assert engine.gaps_together(result, 2) == [1.0, 1.0, 0.5, 1.0]
    # Nine tokens in 3 seconds at the fastest, and firsts 1.5 seconds apart.
    assert engine.longer_answer(result, 9) == 17


def test_a_trace_of_torchs_profiler_is_read(tmp_path):
    path = tmp_path / "trace.json.gz"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            with torch.profiler.record_function("execute_context_0(0)_generation_2(2)"):
                torch.ones(8) + 1
    profiler.export_chrome_trace(str(path))
    events = engine.read_trace(path)
    with pytest.raises(ValueError, match="no kernel"):  # those are the GPU's
        engine.decode_kernel_times(events, 2)
    kernel = {"ph": "X", "cat": "kernel", "name": "void at::native::add<float>(int)", "dur": 6.0}
    times = engine.decode_kernel_times([*events, kernel], 2)
    assert (times["steps"], times["us_per_step"], times["groups"]) == (3, 2.0, {"other": 2.0})


def test_a_graph_lasts_from_its_first_kernel_to_its_last():
    """Kernels of two streams overlap, and those that no graph launched are left out."""
    launch = {"cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 0.0, "dur": 300.0}
    events, name = [], "execute_context_0(0)_generation_1(1)"
    for step, last in enumerate((40.0, 50.0, 90.0)):
        start, graph = 1000.0 * step, {"correlation": step}
        events.append({"cat": "user_annotation", "name": name, "dur": 9.0})
        events.append({**launch, "args": graph})
        for at, dur in ((30.0, last - 30), (10.0, 25.0), (12.0, 5.0)):
            event = {"cat": "kernel", "name": "nvjet", "ts": start + at, "dur": dur}
            events.append({**event, "args": graph})
        events.append({**event, "ts": start + 500.0, "args": {"correlation": 100 + step}})
    assert sorted(engine.graph_times(events)) == [30.0, 40.0, 80.0]
    assert engine.decode_kernel_times(events, 1)["graph_us"] == 40.0
    # A step of several graphs, or of none, has no such time.
    assert "graph_us" not in engine.decode_kernel_times([*events, events[0]], 1)


def steps_trace(*steps):
    """A trace of steps of (prefilling requests, their tokens, decoding requests), 6 us each."""
    events = []
    for prefilling, tokens, decoding in steps:
        name = f"execute_context_{prefilling}({tokens})_generation_{decoding}({decoding})"
        events.append({"cat": "user_annotation", "name": name, "dur": 9.0})
        events.append({"cat": "kernel", "name": "nvjet", "dur": 6.0})
    return events


def test_a_prefill_is_profiled_with_all_of_its_chunks():
    chunks = [(1, 8, 0), (1, 8, 0), (1, 4, 0)]
    times = engine.prefill_kernel_times(steps_trace(*chunks), 20)
    assert (times["tokens"], times["steps"], times["us_per_token"]) == (20, 3, 18 / 20)
    # vLLM's steps without a request, while it waits for the answer.
    empty = [{"cat": "user_annotation", "name": "execute_context_0(0)_generation_0(0)"}] * 2
    assert engine.prefill_kernel_times([*steps_trace(*chunks), *empty], 20) == times


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([], "0 prompt tokens in 0 steps, expected 20"),
        ([(1, 8, 0), (1, 8, 0)], "16 prompt tokens in 2 steps, expected 20"),
        ([(1, 8, 0), (1, 8, 0), (1, 8, 0)], "24 prompt tokens in 3 steps, expected 20"),
        ([(1, 20, 0), (0, 0, 1)], r"requests \[\(0, 1\), \(1, 0\)\], expected only \(1, 0\)"),
        ([(1, 20, 1)], r"requests \[\(1, 1\)\]"),
        ([(2, 20, 0)], r"requests \[\(2, 0\)\]"),
    ],
)
def test_a_profile_of_another_prefill_is_refused(steps, said):
    with pytest.raises(ValueError, match=said):
        engine.prefill_kernel_times(steps_trace(*steps), 20)


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("sparse_mla_kernel", "attention"),
        ("void sm90::decode::sparse_fp8::flash_fwd_splitkv_mla_fp8_sparse_kernel<>", "attention"),
        ("paged_mqa_topk_kernel", "indexer"),
        ("void deep_gemm::sm90_fp8_paged_mqa_logits<1u, 64u>", "indexer"),
        ("fp8_einsum_merge_kernel", "fp8_einsum"),
        ("hc_prenorm_gemm_kernel", "hyper-connections"),
        ("void deep_gemm::sm90_fp8_gemm_1d2d_impl<>", "gemm"),
        ("_fused_kv_compress_norm_rope_insert_indexer_attn", "cache, rope, norm, quantization"),
        ("fused_moe_kernel", "moe"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4>", "other"),
    ],
)
def test_a_kernel_has_a_group(kernel, group):
    assert engine.group_of(kernel) == group


def written_run(path, attention, step_ms, **machine):
    """A result of two points and a profile of each kind, in which batch 8 has failed."""
    kernels = {"ours": "sparse_mla_kernel", "stock": "flash_fwd_splitkv_mla"}[attention]
    listed = [("nvjet", "gemm", 40.0), (kernels, "attention", 10.0 * step_ms)]
    result = {
        "machine": {
            **{"label": "native", "gpu": "a GPU", "gpus": 1, "capability": [12, 0]},
            **{"driver": "580.1", "cuda": "13.0", "torch": "2", "triton": "3", "vllm": "0.26.0"},
            **{"vllm_sm12x": "0", "commit": "0123", "dirty": False, "date": "2026-01-01"},
            **machine,
        },
        "benchmark": "engine",
        **{"attention": attention, "mode": "graphs", "mtp": 0, "checkpoint": "abc"},
        "points": [
            {
                **{"context": 1024, "batch": 1, "decode_step_ms": step_ms},
                "prefill_us_per_token": 7.0,
            },
            {"context": 1024, "batch": 8, "problems": ["8 of 8 requests failed"]},
        ],
        "profiles": [
            {
                **{"context": 1024, "batch": 1, "steps": 20, "us_per_step": 40 + 10 * step_ms},
                "groups": {group: us for _, group, us in listed},
                "kernels": [
                    {"name": name, "group": group, "us_per_step": us, "calls_per_step": 1.0}
                    for name, group, us in listed
                ],
            }
        ],
        "prefill_profiles": [
            {
                **{"context": 1024, "tokens": 1024, "steps": 1, "us_per_token": step_ms / 4},
                "groups": {"attention": step_ms / 4},
                "kernels": [
                    {"name": kernels, "group": "attention", "us_per_token": step_ms / 4},
                ],
            }
        ],
    }
    path.write_text(json.dumps(result))
    return path, copy.deepcopy(result)


def test_two_runs_are_compared_point_by_point_and_kernel_by_kernel(tmp_path):
    ours, _ = written_run(tmp_path / "ours.json", "ours", 3.0)
    stock, _ = written_run(tmp_path / "stock.json", "stock", 4.0, vllm="0.27.0")
    path = tmp_path / "compared.json"
    ran = CliRunner().invoke(engine.app, ["compare", str(ours), str(stock), "--json", str(path)])
    assert ran.exit_code == 0, ran.output
    assert "0.75x" in ran.output and "1.00x" in ran.output
    assert "vllm differs: 0.26.0 and 0.27.0" in ran.output
    compared = json.loads(path.read_text())
    (row,) = compared["points"]
    assert row["decode_step_ms"] == [3.0, 4.0] and row["decode_step_ms_ratio"] == 0.75
    assert compared["profiles"][0]["rows"] == [
        {"group": "gemm", "us_per_step": [40.0, 40.0]},
        {"group": "attention", "us_per_step": [30.0, 40.0]},
        {"group": "gemm", "kernel": "nvjet", "us_per_step": [40.0, 40.0]},
        {"group": "attention", "kernel": "flash_fwd_splitkv_mla", "us_per_step": [0.0, 40.0]},
        {"group": "attention", "kernel": "sparse_mla_kernel", "us_per_step": [30.0, 0.0]},
    ]
    assert "context 1,024: 0.75 / 1.00 us of kernels a token" in ran.output
    (prefill,) = compared["prefill_profiles"]
    assert prefill == {
        "context": 1024,
        "rows": [
            {"group": "attention", "us_per_token": [0.75, 1.0]},
            {"group": "attention", "kernel": "flash_fwd_splitkv_mla", "us_per_token": [0.0, 1.0]},
            {"group": "attention", "kernel": "sparse_mla_kernel", "us_per_token": [0.75, 0.0]},
        ],
    }


def test_a_result_from_before_prefill_profiles_is_compared(tmp_path):
    ours, _ = written_run(tmp_path / "ours.json", "ours", 3.0)
    stock, result = written_run(tmp_path / "stock.json", "stock", 4.0)
    del result["prefill_profiles"]
    stock.write_text(json.dumps(result))
    path = tmp_path / "compared.json"
    ran = CliRunner().invoke(engine.app, ["compare", str(ours), str(stock), "--json", str(path)])
    assert ran.exit_code == 0, ran.output
    compared = json.loads(path.read_text())
    assert len(compared["profiles"]) == 1 and compared["prefill_profiles"] == []


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    ours, _ = written_run(tmp_path / "ours.json", "ours", 3.0)
    other, result = written_run(tmp_path / "other.json", "stock", 4.0, gpu="another GPU")

    def refusal():
        ran = CliRunner().invoke(engine.app, ["compare", str(ours), str(other)])
        assert ran.exit_code == 1
        return ran.output

    assert "gpu is 'a GPU' in the first, 'another GPU' in the second" in refusal()
    result["machine"]["gpu"] = "a GPU"
    other.write_text(json.dumps({**result, "checkpoint": "def"}))
    assert "the checkpoints differ: abc in the first, def in the second" in refusal()
    other.write_text(json.dumps({**result, "points": result["points"][1:]}))
    assert "no time of the same context and batch" in refusal()
    other.write_text(json.dumps({**result, "benchmark": "serving"}))
    assert "a result of 'serving'" in refusal()

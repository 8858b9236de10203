# SPDX-License-Identifier: Apache-2.0
"""benchmarks/readiness.py against a server without a model, and what it reads out of logs."""

import json
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

pytestmark = pytest.mark.once

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import readiness  # noqa: E402

STAND_IN = Path(__file__).parent / "stand_in"


def test_a_whole_run_is_measured_and_written(tmp_path, monkeypatch):
    monkeypatch.setattr(readiness, "MEAN_ARRIVAL_SECONDS", 0.001)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"vocab_size": 8192}')
    path = tmp_path / "result.json"
    given = [
        *("--model", str(model), "--label", "ours", "--json", str(path), "--limit", "60"),
        *("--requests", "12", "--mtp", "2", "--env", f"PYTHONPATH={STAND_IN}"),
    ]
    ran = CliRunner().invoke(readiness.app, given)
    assert ran.exit_code == 0, ran.output
    result = json.loads(path.read_text())
    summary = result["summary"]
    assert summary["requests"] == 22 and summary["failed"] == 0
    assert summary["graphs_gib"] == 0.2 and summary["compiled_after_ready"] == 0
    assert 0 < summary["first_ttft_seconds"] == result["first_ten_ttft_seconds"][0]
    assert len(result["first_ten_ttft_seconds"]) == 10
    steps = {f"decode_step_ms_of_{running}" for running in (1, 4, 8)}
    assert steps | {f"eager_{step}" for step in steps} <= summary.keys()
    log = path.with_suffix(".server.log").read_text()
    assert "--speculative-config" in log and "--enforce-eager" not in log
    assert "--kv-cache-dtype" in log and "--compilation-config" not in log
    assert "--enforce-eager" in path.with_suffix(".eager.log").read_text()


@pytest.mark.parametrize("label", ["stock", "proxy", "ours"])
def test_another_model_than_deepseek_v4(tmp_path, monkeypatch, label):
    monkeypatch.setattr(readiness, "MEAN_ARRIVAL_SECONDS", 0.001)
    model, path = tmp_path / "model", tmp_path / "result.json"
    model.mkdir()
    (model / "config.json").write_text('{"vocab_size": 8192, "model_type": "qwen3_next"}')
    given = [
        *("--model", str(model), "--label", label, "--json", str(path), "--limit", "60"),
        *("--requests", "2", "--cudagraph-mode", "FULL", "--env", f"PYTHONPATH={STAND_IN}"),
    ]
    ran = CliRunner().invoke(readiness.app, given)
    if label == "ours":  # which is about the attention of a DeepSeek V4
        assert ran.exit_code == 2 and not path.exists()
        return
    assert ran.exit_code == 0, ran.output
    result = json.loads(path.read_text())
    assert result["env"].get("VLLM_PLUGINS") == ("" if label == "stock" else None)
    assert result["env"].get("VLLM_SM12X_ASSUME") == ("12.0" if label == "proxy" else None)
    arguments, eager = (
        json.loads(re.search(r"arguments (.*)", path.with_suffix(suffix).read_text())[1])
        for suffix in (".server.log", ".eager.log")
    )
    assert not {"--kv-cache-dtype", "--block-size"} & {*arguments, *eager}
    assert "--max-num-seqs" in arguments
    mode = arguments[arguments.index("--compilation-config") + 1]
    assert json.loads(mode) == {"cudagraph_mode": "FULL"}
    assert "--compilation-config" not in eager


def test_a_wave_drains_to_what_it_promises():
    for drained_to in readiness.DRAINED_TO:
        requests = readiness.wave(drained_to, range(100, 200), random.Random(0))
        assert len(requests) == readiness.WAVE
        long = [request for request in requests if request.max_tokens >= readiness.LONG_ANSWER]
        assert len(long) == drained_to
        assert all(1 <= len(request.prompt) <= readiness.LONGEST_PROMPT for request in requests)


def test_compiles_are_taken_from_the_watch_and_from_what_vllm_says(tmp_path):
    log, compile_log = tmp_path / "server.log", tmp_path / "compiles.jsonl"
    log.write_text(
        "WARNING Triton kernel JIT compilation during inference: _topk_kernel. This causes a "
        "latency spike\nWARNING CuTeDSL JIT compilation during inference: compress (x). This\n"
    )
    found = readiness.after_ready(compile_log, SimpleNamespace(log=log))
    assert found["watch"] == []
    assert found["vllm"] == [
        "_topk_kernel: Triton kernel JIT compilation", "compress: CuTeDSL JIT compilation",
    ]  # fmt: skip
    compile_log.write_text(
        '{"what": "ready"}\n{"what": "compiled", "kernel": "scale", "detail": "BLOCK=16"}\n'
    )
    found = readiness.after_ready(compile_log, SimpleNamespace(log=log))
    assert found["watch"] == ["scale compiled: BLOCK=16"]


def test_times_and_memory_are_read_out_of_the_log():
    text = (
        "INFO Graph capturing finished in 23 secs, took 1.83 GiB\n"
        "INFO [warm_up.py:1] Warmed up with 143 batches in 12.5 s.\n"
    )
    assert readiness.startup_facts(text) == {
        "graphs_seconds": 23.0, "graphs_gib": 1.83, "warm_up_batches": 143.0,
        "warm_up_seconds": 12.5,
    }  # fmt: skip
    assert readiness.startup_facts("") == {}
    measured = "Graph capturing finished in 29 secs, took 0.26 GiB\n"
    assert readiness.startup_facts(measured + text)["graphs_gib"] == 1.83

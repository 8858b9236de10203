# SPDX-License-Identifier: Apache-2.0
"""benchmarks/engine_race.py: two servers without a model, in turns."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytestmark = pytest.mark.once

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import engine_race  # noqa: E402

STAND_IN = Path(__file__).parent / "stand_in_engine"


def race(folder, monkeypatch, *options, contexts="64,96", rounds="1", fault=""):
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"vocab_size": 8192}')
    monkeypatch.setenv("PYTHONPATH", str(STAND_IN))
    monkeypatch.setenv("STAND_IN_FAULT", fault)
    path = folder / "race.json"
    given = [
        *("--model", str(folder / "model"), "--json", str(path), "--limit", "60"),
        *("--contexts", contexts, "--batches", "1,4", "--output-len", "129", "--rounds", rounds),
        *options,
    ]
    ran = CliRunner().invoke(engine_race.app, given)
    return ran, json.loads(path.read_text())


def test_both_are_measured_in_turns(tmp_path, monkeypatch):
    options = ("--kv-cache-gib", "2", "--", "--max-num-seqs", "16")
    ran, result = race(tmp_path, monkeypatch, *options, contexts="64", rounds="2")
    assert ran.exit_code == 0, ran.output
    assert [(p["context"], p["batch"]) for p in result["points"]] == [(64, 1), (64, 4)]
    for point in result["points"]:
        ours, stock = point["decode_step_ms"]
        assert len(ours) == len(stock) == 2
        assert point["decode_step_ms_ratio"] == pytest.approx(0.5, abs=0.15)
        low, high = point["decode_step_ms_ratios"]
        assert low <= point["decode_step_ms_ratio"] <= high
        assert ("prefill_us_per_token" in point) == (point["batch"] == 1)
    # The second round begins with the other side.
    sides = [(m["round"], m["side"]) for m in result["measured"]]
    assert sides == [(0, 0), (0, 1)] * 2 + [(1, 1), (1, 0)] * 2
    for log in ("race.0.ours.log", "race.1.stock.log"):
        text = (tmp_path / log).read_text()
        assert '"--kv-cache-memory-bytes", "2147483648"' in text
        assert '"--max-num-seqs", "16"]' in text


def test_kernels_of_both_are_listed(tmp_path, monkeypatch):
    profiled = ("--profile", "64x4", "--profile", "96x1", "--profile-prefill", "96")
    ran, result = race(tmp_path, monkeypatch, *profiled, rounds="1")
    assert ran.exit_code == 0, ran.output
    for of_side in result["profiles"]:
        assert [(p["context"], p["batch"]) for p in of_side] == [(64, 4), (96, 1)]
        assert [p["us_per_step"] for p in of_side] == [100, 100]
    for (prefill,) in result["prefill_profiles"]:
        # The stand-in prefills 32 tokens a step, and nothing of a prompt that it knows.
        assert (prefill["context"], prefill["tokens"], prefill["steps"]) == (96, 96, 3)
    said = " ".join(ran.output.split())
    assert "context 64, batch 4: 100 / 100 us of kernels a step" in said
    assert "context 96: 3.12 / 3.12 us of kernels a token" in said
    assert "--profiler-config" not in result["vllm_args"]


def test_a_profile_of_a_point_that_is_not_measured_is_refused(tmp_path):
    given = ["--model", str(tmp_path), "--json", str(tmp_path / "race.json"), "--profile", "64x2"]
    ran = CliRunner().invoke(engine_race.app, given)
    assert ran.exit_code == 2
    assert "64x2 is not measured" in ran.output
    assert list(tmp_path.iterdir()) == []


def test_a_point_with_a_problem_in_any_round_has_no_time(tmp_path, monkeypatch):
    ran, result = race(tmp_path, monkeypatch, fault="http_500")
    assert ran.exit_code == 1
    assert "ours, round 1, context 96, batch 1: 3 of 3 requests failed" in ran.output
    times = {p["context"]: "decode_step_ms" in p for p in result["points"]}
    assert times == {64: True, 96: False}


def test_a_server_that_dies_is_named(tmp_path, monkeypatch):
    ran, result = race(tmp_path, monkeypatch, fault="death")
    assert ran.exit_code == 1
    assert any("ended with status 7" in problem for problem in result["problems"])
    assert all("decode_step_ms" not in p for p in result["points"] if p["context"] == 96)

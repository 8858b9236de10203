# SPDX-License-Identifier: Apache-2.0
"""The programs of benchmarks/ notice what is wrong: on a stand-in for vLLM, and on made-up data."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from vllm_sm12x import device
from vllm_sm12x.bench.machine import describe_machine, machine_line

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import logprobs  # noqa: E402
import long_context  # noqa: E402
import no_toolkit  # noqa: E402
import serving  # noqa: E402
from server import (  # noqa: E402
    Attention,
    attention_env,
    check_startup,
    chosen_attention,
    parallel_args,
)

STAND_IN = Path(__file__).parent / "stand_in"
TOKENS = range(819, 7373)


@pytest.fixture
def model(tmp_path):
    """The part of a checkpoint that the client reads."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"vocab_size": 8192}')
    return directory


def serve(model, *options, label="ours", fault="", requests=12, vllm_args=()):
    """Run the program against the stand-in; its exit status, output, result and server log."""
    path = model.parent / "result.json"
    given = [
        *("--model", str(model), "--label", label, "--json", str(path), "--limit", "60"),
        *("--requests", str(requests), "--env", f"PYTHONPATH={STAND_IN}"),
        *("--env", f"STAND_IN_FAULT={fault}", *options, "--", *vllm_args),
    ]
    ran = CliRunner().invoke(serving.app, given)
    result = json.loads(path.read_text()) if path.exists() else None
    log = path.with_suffix(".server.log").read_text()
    return ran, result, log


def test_all_requests_are_answered_checked_and_counted(model):
    ran, result, log = serve(model, requests=64, vllm_args=("--max-num-seqs", "16"))
    assert ran.exit_code == 0, ran.output
    asked = serving.mixed_requests(64, TOKENS)
    assert result["problems"] == []
    assert result["summary"]["requests"] == 64
    assert result["summary"]["failed"] == 0
    assert result["summary"]["output_tokens"] == sum(request.max_tokens for request in asked)
    assert 0 < result["summary"]["first_request_ttft_seconds"] < result["summary"]["seconds"]
    assert result["counters"]["vllm:prefix_cache_hits_total"] == 768
    assert 1 < result["counters"]["vllm:num_preemptions_total"] <= 8  # the stand-in's concurrency
    assert result["machine"]["label"] in ("native", "proxy")
    arguments = json.loads(re.search(r"arguments (.*)", log)[1])
    assert arguments[:2] == ["serve", str(model)]
    assert arguments[-2:] == ["--max-num-seqs", "16"]  # the last one of two counts


def test_the_server_and_its_workers_end_with_the_program(model):
    _, _, log = serve(model, requests=1)
    worker = int(re.search(r"worker (\d+)", log)[1])
    status = Path(f"/proc/{worker}/status")
    assert not status.exists() or re.search(r"State:\s+Z", status.read_text())


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("http_500", "HTTP 500: .*the engine is on fire"),
        ("token_count", "tokens, expected"),
        ("prompt_count", "usage says"),
        ("finish_reason", "finish reasons"),
        ("error_event", "out of pages"),
        ("cut", r"without \[DONE\]"),
        ("nan", "are no log-probabilities, such as nan"),
        ("null", "are no log-probabilities, such as None"),
        ("positive", "are no log-probabilities, such as 0.5"),
        ("missing", "log-probabilities, expected"),
        ("death", "ended with status 7"),
        ("traceback", "Traceback"),
        ("other_attention", "asked for TRITON_MLA_SPARSE, but the log names nothing"),
        ("other_mode", "does not say that they were captured"),
    ],
)
def test_a_fault_is_reported(model, fault, said):
    ran, result, _ = serve(model, fault=fault)
    assert ran.exit_code == 1
    assert any(re.search(said, problem) for problem in result["problems"]), result["problems"]


def test_stock_attention_and_eager_execution_are_checked_too(model):
    ran, result, log = serve(model, "--mode", "eager", label="stock", requests=2)
    assert ran.exit_code == 0, ran.output
    assert result["env"]["VLLM_TRITON_MLA_SPARSE"] == "0"
    ran, result, _ = serve(
        model, "--mode", "eager", label="stock", fault="other_attention", requests=2
    )
    assert ran.exit_code == 1
    assert "asked for stock attention" in result["problems"][0]
    ran, result, _ = serve(model, "--mode", "eager", label="stock", fault="other_mode", requests=2)
    assert ran.exit_code == 1
    assert "CUDA graphs were captured" in result["problems"][0]


def test_a_server_that_does_not_start_says_why(model):
    ran, result, _ = serve(model, fault="no_start")
    assert ran.exit_code == 1
    assert result is None
    assert "no kernel image is available" in str(ran.exception)


def test_the_requests_cover_what_they_promise():
    requests = serving.mixed_requests(64, TOKENS)
    assert requests == serving.mixed_requests(64, TOKENS)
    lengths = [len(request.prompt) for request in requests]
    assert set(lengths) >= set(serving.NAMED_LENGTHS)
    assert (min(lengths), max(lengths)) == (1, 6000)
    assert {1, 64} <= {request.max_tokens for request in requests} <= set(range(1, 65))
    assert sum(request.temperature == 0.0 for request in requests) == 32
    assert sum(request.logprobs is not None for request in requests) >= 16
    prefixes = [tuple(r.prompt[:1024]) for r in requests if len(r.prompt) > 1024]
    assert max(map(prefixes.count, prefixes)) >= 8
    assert all(token in TOKENS for request in requests for token in request.prompt)


@pytest.mark.contract
def test_the_plugin_logs_what_the_check_looks_for(monkeypatch):
    from vllm_sm12x.integration import selection

    class TritonMlaSparseAttention:
        """In the place of the real class, whose bases need CUDA."""

    class DeepseekV4FlashMLAAttention:
        """In the place of vLLM's."""

    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    monkeypatch.setattr(selection.logger, "handlers", [handler])
    monkeypatch.setattr(selection.logger, "level", logging.INFO)
    module = types.SimpleNamespace(TritonMlaSparseAttention=TritonMlaSparseAttention)
    monkeypatch.setitem(sys.modules, "vllm_sm12x.integration.sparse_mla", module)
    for ours in (True, False):
        choice = selection.Choice(ours, True, f"VLLM_TRITON_MLA_SPARSE={ours:d}")
        monkeypatch.setattr(selection, "choose", lambda _, choice=choice: choice)
        selection.select_attention_class(lambda _: DeepseekV4FlashMLAAttention, None)
    assert len(lines) == 2

    ours_log, stock_log = (f"(EngineCore) INFO [selection.py:84] {line}\n" for line in lines)
    assert chosen_attention(ours_log) == {"TritonMlaSparseAttention (TRITON_MLA_SPARSE)"}
    assert check_startup(ours_log, attention=Attention.OURS, cudagraphs=False) == []
    assert check_startup(ours_log, attention=Attention.STOCK, cudagraphs=False) != []
    assert check_startup(stock_log, attention=Attention.OURS, cudagraphs=False) != []
    assert check_startup(stock_log, attention=Attention.STOCK, cudagraphs=False) == []
    assert check_startup(ours_log + stock_log, attention=Attention.OURS, cudagraphs=False) != []


@pytest.mark.contract
def test_the_logits_processor_forces_one_token_after_another():
    from in_engine import FORCED_TOKENS, ForcedTokens
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate

    processor = ForcedTokens(None, torch.device("cpu"), False)
    assert not processor.is_argmax_invariant()
    outputs = [[], [4, 4]]
    forced = SamplingParams(extra_args={FORCED_TOKENS: [7, 3, 5]})
    added = [(0, forced, [1], outputs[0]), (1, SamplingParams(), [1], []), (2, forced, [1], [4, 4])]
    processor.update_state(BatchUpdate(batch_size=3, removed=(), added=added, moved=()))
    logits = torch.randn(3, 8)
    untouched = logits[1].clone()
    chosen = processor.apply(logits.clone()).argmax(-1).tolist()
    assert (chosen[0], chosen[2]) == (7, 5)
    outputs[0].append(-1)
    processor.update_state(None)
    after = processor.apply(logits)
    assert after[0].argmax() == 3
    assert torch.equal(after[1], untouched)


class ModelOfPositions:
    """In the place of vllm.LLM: the log-probability of a token is a function of it and its place.

    It obeys `forced_tokens`; without them it generates token 900 + the place.
    """

    def __init__(self, **args):
        self.args = args
        # As vLLM 0.23 leaves what it is given.
        args.get("speculative_config", {})["target_model_config"] = self

    def apply_model(self, function):
        layer = type(
            "Layer", (torch.nn.Module,), {"forward_mqa": None, "__module__": "vllm_sm12x.x"}
        )
        return [function(torch.nn.ModuleList([layer(), torch.nn.Identity()]))]

    def get_tokenizer(self):
        return types.SimpleNamespace(encode=lambda text, add_special_tokens: list(text.encode()))

    def get_metrics(self):
        return [types.SimpleNamespace(name="vllm:spec_decode_num_drafts", value=3)]

    @staticmethod
    def step(token, place):
        other = types.SimpleNamespace(logprob=-0.5)
        return {token: types.SimpleNamespace(logprob=-token - place / 8192), -1: other}

    def generate(self, prompts, params, use_tqdm):
        params = params if isinstance(params, list) else [params] * len(prompts)
        return [self.answer(p["prompt_token_ids"], q) for p, q in zip(prompts, params, strict=True)]

    def answer(self, prompt, params):
        places = range(len(prompt), len(prompt) + params.max_tokens)
        forced = (params.extra_args or {}).get("forced_tokens")
        tokens = forced or [900 + place for place in places]
        output = types.SimpleNamespace(token_ids=tokens, logprobs=[*map(self.step, tokens, places)])
        inside = [None, *(self.step(token, place) for place, token in enumerate(prompt) if place)]
        return types.SimpleNamespace(outputs=[output], prompt_logprobs=inside)


@pytest.mark.contract
@pytest.mark.parametrize("mtp", [0, 2])
def test_collect_lines_up_prefill_and_decode(model, monkeypatch, mtp):
    out = model.parent / "run.npz"
    monkeypatch.setattr("vllm.LLM", ModelOfPositions)
    given = ["--model", str(model), "--out", str(out), "--mtp", str(mtp)]
    with mock.patch.dict(os.environ):
        ran = CliRunner().invoke(logprobs.app, ["collect", "--attention", "ours", *given])
        assert ran.exit_code == 0, ran.output
        assert os.environ["VLLM_TRITON_MLA_SPARSE"] == "1"
        refused = CliRunner().invoke(logprobs.app, ["collect", "--attention", "stock", *given])
    assert "asked for stock attention" in str(refused.exception)
    run = logprobs.load_run(out)
    assert run["meta"]["forced"] == (mtp == 0)
    assert run["meta"]["forced_to"] is None
    assert run["meta"]["counters"] == {"vllm:spec_decode_num_drafts": 3}
    for tokens, prefilled, decoded, best in zip(
        run["tokens"], run["prefill"], run["decode"], run["best"], strict=True
    ):
        expected = -tokens - np.arange(len(tokens)) / 8192
        np.testing.assert_allclose(prefilled, expected[1:], rtol=1e-12)
        np.testing.assert_allclose(decoded, expected[-len(decoded) :], rtol=1e-12)
        assert len(decoded) == logprobs.DECODE_TOKENS - 1
        np.testing.assert_array_equal(best, [-0.5] * len(decoded))
    text = bytes(run["tokens"][-1][: logprobs.TEXT_LENGTH].tolist())
    assert (ROOT / "LICENSE").read_bytes().startswith(text)


@pytest.mark.contract
def test_collect_forces_the_tokens_that_a_run_with_mtp_chose(model, monkeypatch):
    monkeypatch.setattr("vllm.LLM", ModelOfPositions)
    greedy, plain, result = (
        model.parent / name for name in ("mtp.npz", "plain.npz", "result.json")
    )
    given = ["collect", "--attention", "ours", "--model", str(model), "--decode-tokens", "20"]
    with mock.patch.dict(os.environ):
        for options in (["--mtp", "2", "--out", greedy], ["--forced", greedy, "--out", plain]):
            ran = CliRunner().invoke(logprobs.app, [*given, *map(str, options)])
            assert ran.exit_code == 0, ran.output
    runs = [logprobs.load_run(path) for path in (greedy, plain)]
    assert (runs[1]["meta"]["forced"], runs[1]["meta"]["forced_to"]) == (True, "mtp.npz")
    assert "speculative_config" not in runs[1]["meta"]["engine_args"]
    for chosen, forced in zip(runs[0]["tokens"], runs[1]["tokens"], strict=True):
        np.testing.assert_array_equal(chosen, forced)
    paths = [str(path) for path in (greedy, plain)]
    ran = CliRunner().invoke(logprobs.app, ["compare", *paths, "--json", str(result)])
    assert ran.exit_code == 0, ran.output
    compared = json.loads(result.read_text())
    assert [(row["pair"], row["path"], row["tokens"]) for row in compared["rows"]] == [
        ("mtp - plain", "prefill", 300 + 1000 + 2500 + 6000 + 1500 + 5 * 19),
        ("mtp - plain", "decode", 5 * 19),
        ("mtp", "decode - prefill", 5 * 19),
        ("plain", "decode - prefill", 5 * 19),
    ]
    assert [row["max"] for row in compared["rows"][:2]] == [0.0, 0.0]
    # The stand-in's greedy tokens are never its likeliest ones.
    assert [(row["run"], row["not_best"]) for row in compared["gaps"]] == [
        ("mtp", 95),
        ("plain", 95),
    ]


def greedy_file(path, *, model="/m", seed=0, forced=False, decode_tokens=8, change=None):
    """What `collect --mtp` writes for the prompts of TOKENS, with one prompt token changed."""
    sequences = logprobs.forced_sequences(TOKENS, list(range(5000)), decode_tokens)
    if change is not None:
        sequences[change][0] += 1
    decoded = [np.full(decode_tokens - 1, -1.0) for _ in sequences]
    prefilled = [np.full(len(sequence) - 1, -1.0) for sequence in sequences]
    meta = {"forced": forced, "engine_args": {"model": model, "seed": seed}}
    logprobs.save_run(path, meta, sequences, prefilled, decoded, decoded)
    return sequences


def test_the_greedy_tokens_of_a_file_are_those_of_its_run(tmp_path):
    path = tmp_path / "mtp.npz"
    sequences = greedy_file(path)
    wanted = {"model": "/m", "seed": 0, "tokens": TOKENS, "decode_tokens": 8}
    read = logprobs.greedy_sequences(path, **wanted)
    assert read == sequences
    assert all(type(token) is int for sequence in read for token in sequence)  # as vLLM takes them


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({"forced": True}, r"mtp\.npz has forced tokens, and --forced takes those of .* --mtp"),
        ({"model": "/other"}, r"mtp\.npz is of model /other, and this run is of /m"),
        ({"seed": 1}, r"mtp\.npz is of seed 1, and this run is of 0"),
        ({"decode_tokens": 9}, r"mtp\.npz has --decode-tokens 9, and this run has 8"),
        ({"change": 2}, r"mtp\.npz has other prompts than this run"),
    ],
)
def test_greedy_tokens_of_another_run_are_refused(tmp_path, written, said):
    path = tmp_path / "mtp.npz"
    greedy_file(path, **written)
    with pytest.raises(ValueError, match=said):
        logprobs.greedy_sequences(path, model="/m", seed=0, tokens=TOKENS, decode_tokens=8)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"not an archive"])
def test_what_collect_did_not_write_is_refused(tmp_path, content):
    path = tmp_path / "mtp.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a file that collect wrote"):
        logprobs.greedy_sequences(path, model="/m", seed=0, tokens=TOKENS, decode_tokens=8)


def test_collect_refuses_before_it_touches_vllm(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setenv("COLUMNS", "300")
    path = model.parent / "mtp.npz"
    greedy_file(path, model="/other")
    given = ["--model", str(model), "--out", str(model.parent / "plain.npz")]
    given = ["collect", "--attention", "ours", *given, "--forced", str(path)]
    with mock.patch.dict(os.environ):
        for options, said in (([], "is of model /other"), (["--mtp", "2"], "a run without it")):
            ran = CliRunner().invoke(logprobs.app, [*given, *options])
            assert ran.exit_code == 2
            assert said in ran.output


def synthetic_run(path, *, seed=0, shift=0.0, forced=True, tokens_seed=0, forced_to=None, gap=0.0):
    """A run of two prompts whose log-probabilities are -8 + `shift` plus noise of 1e-3.

    Every third decoded token is `gap` less likely than the most likely one.
    """
    rng = np.random.default_rng(seed)
    ids = np.random.default_rng(tokens_seed)
    sequences = [ids.integers(0, 8192, length).tolist() for length in (40, 700)]

    def values(count):
        return -8 + shift + rng.normal(0, 1e-3, count)

    prefilled = [values(len(tokens) - 1) for tokens in sequences]
    decoded = [values(30) for _ in sequences]
    machine = describe_machine("0123456789ab-dirty")
    logprobs.save_run(
        path,
        {"forced": forced, "forced_to": forced_to, "machine": machine},
        sequences,
        prefilled,
        decoded,
        [x + gap * (np.arange(30) % 3 == 0) for x in decoded],
    )
    return path


def test_compare_computes_the_distribution_of_the_differences(tmp_path):
    ours = synthetic_run(tmp_path / "ours.npz", seed=1, shift=0.25)
    stock = synthetic_run(tmp_path / "stock.npz", seed=2)
    again = synthetic_run(tmp_path / "again.npz", seed=3)
    result = tmp_path / "result.json"
    ran = CliRunner().invoke(
        logprobs.app, ["compare", str(ours), str(stock), str(again), "--json", str(result)]
    )
    assert ran.exit_code == 0, ran.output
    rows = {(row["pair"], row["path"]): row for row in json.loads(result.read_text())["rows"]}
    assert len(rows) == 7
    prefill = rows["ours - stock", "prefill"]
    assert prefill["tokens"] == 39 + 699
    assert rows["ours - stock", "decode"]["tokens"] == 60
    # Two independent normals of 1e-3: their difference has sqrt(2) of that.
    assert prefill["bias"] == pytest.approx(0.25, abs=5 * 1.42e-3 / 738**0.5)
    assert prefill["bias_standard_error"] == pytest.approx(1.414e-3 / 738**0.5, rel=0.15)
    assert prefill["p50"] == pytest.approx(0.25, abs=1e-3)
    assert prefill["mean"] <= prefill["p99"] <= prefill["max"] < 0.26
    noise = rows["stock - again", "prefill"]
    assert noise["mean"] == pytest.approx(1.414e-3 * (2 / np.pi) ** 0.5, rel=0.15)
    assert abs(noise["bias"]) < 5 * noise["bias_standard_error"]
    assert rows["ours", "decode - prefill"]["max"] < 1e-2


def test_statistics_of_known_differences():
    a = [np.array([-1.0, -2.0]), np.array([-3.0, -4.0])]
    b = [np.array([-1.0, -2.5]), np.array([-2.0, -4.0])]
    assert logprobs.statistics(a, b) == pytest.approx(
        {
            "tokens": 4,
            "mean": 0.375,
            "p50": 0.25,
            "p99": 0.985,
            "max": 1.0,
            "bias": -0.125,
            "bias_standard_error": np.std([0, 0.5, -1, 0], ddof=1) / 2,
        }
    )


def test_compare_refuses_other_tokens_and_values_that_are_not_finite(tmp_path):
    ours = synthetic_run(tmp_path / "ours.npz")
    other = synthetic_run(tmp_path / "other.npz", tokens_seed=1)
    ran = CliRunner().invoke(logprobs.app, ["compare", str(ours), str(other)])
    assert ran.exit_code == 1
    assert "ours and other have different tokens" in ran.output
    broken = synthetic_run(tmp_path / "broken.npz", shift=float("nan"))
    ran = CliRunner().invoke(logprobs.app, ["compare", str(ours), str(broken)])
    assert ran.exit_code == 1
    assert "not finite" in ran.output


def test_runs_of_tokens_that_the_model_chose_are_compared_with_themselves_only(tmp_path):
    ours = synthetic_run(tmp_path / "ours.npz", forced=False)
    stock = synthetic_run(tmp_path / "stock.npz", forced=False, tokens_seed=1)
    rows = logprobs.compare_runs([logprobs.load_run(ours), logprobs.load_run(stock)])
    assert [row["path"] for row in rows] == ["decode - prefill"] * 2


def test_a_run_forced_to_greedy_tokens_is_compared_with_the_run_that_chose_them(tmp_path):
    mtp = synthetic_run(tmp_path / "mtp.npz", seed=1, shift=0.25, forced=False)
    plain = synthetic_run(tmp_path / "plain.npz", seed=2, forced_to="mtp.npz", gap=0.5)
    again = synthetic_run(tmp_path / "again.npz", seed=3, forced_to="mtp.npz", gap=0.5)
    result = tmp_path / "result.json"
    paths = [str(path) for path in (mtp, plain, again)]
    ran = CliRunner().invoke(logprobs.app, ["compare", *paths, "--json", str(result)])
    assert ran.exit_code == 0, ran.output
    assert "not the most likely" in ran.output
    compared = json.loads(result.read_text())
    rows = {(row["pair"], row["path"]): row for row in compared["rows"]}
    assert len(rows) == 7
    assert rows["mtp - plain", "decode"]["bias"] == pytest.approx(0.25, abs=1e-3)
    gaps = {(row["greedy"], row["run"]): row for row in compared["gaps"]}
    assert list(gaps) == [("mtp", "mtp"), ("mtp", "plain"), ("mtp", "again")]
    assert (gaps["mtp", "mtp"]["not_best"], gaps["mtp", "mtp"]["max"]) == (0, None)
    assert (gaps["mtp", "plain"]["not_best"], gaps["mtp", "plain"]["tokens"]) == (20, 60)
    assert gaps["mtp", "plain"]["p50"] == pytest.approx(0.5)


def test_a_run_forced_to_other_greedy_tokens_is_refused(tmp_path):
    mtp = synthetic_run(tmp_path / "mtp.npz", forced=False, tokens_seed=1)
    plain = synthetic_run(tmp_path / "plain.npz", forced_to="mtp.npz")
    given = synthetic_run(tmp_path / "given.npz")
    runs = {path.stem: logprobs.load_run(path) for path in (mtp, plain, given)}
    with pytest.raises(ValueError, match="mtp and plain have different tokens"):
        logprobs.compare_runs([runs["mtp"], runs["plain"]])
    # Tokens that no model chose have nothing to do with those of a greedy run.
    rows = logprobs.compare_runs([runs["mtp"], runs["given"]])
    assert [row["path"] for row in rows] == ["decode - prefill"] * 2
    assert [row["run"] for row in logprobs.greedy_gaps([runs["mtp"], runs["given"]])] == ["mtp"]


def test_gap_statistics_of_known_gaps():
    best = [np.array([-1.0, -2.0, -1.0]), np.array([-0.5, -3.0])]
    chosen = [np.array([-1.0, -2.5, -1.0]), np.array([-2.0, -3.0])]
    assert logprobs.gap_statistics(best, chosen) == pytest.approx(
        {"tokens": 5, "not_best": 2, "p50": 1.0, "p90": 1.4, "max": 1.5}
    )
    none = {"p50": None, "p90": None, "max": None}
    assert logprobs.gap_statistics(best, best) == {"tokens": 5, "not_best": 0, **none}


def test_a_run_from_before_best_was_recorded_is_read(tmp_path):
    path = synthetic_run(tmp_path / "old.npz", forced=False)
    with np.load(path) as file:
        older = {name: file[name] for name in file if not name.startswith("best_")}
    np.savez_compressed(path, **older)
    run = logprobs.load_run(path)
    assert len(logprobs.compare_runs([run])) == 1
    assert logprobs.greedy_gaps([run]) == []


def test_forced_sequences_are_the_same_in_every_run():
    text = list(range(5000))
    sequences = logprobs.forced_sequences(TOKENS, text, 160)
    assert sequences == logprobs.forced_sequences(TOKENS, text, 160)
    assert [len(tokens) - 160 for tokens in sequences] == [300, 1000, 2500, 6000, 1500]
    assert sequences[-1] == text[:1660]


@pytest.mark.parametrize(
    ("capability", "assume", "label"),
    [((12, 0), "", "native"), ((12, 1), "", "native"), ((9, 0), "", "proxy")]
    + [((9, 0), "12.0", "proxy"), ((12, 0), "12.1", "proxy")],
)
def test_the_machine_has_a_label_and_a_commit(monkeypatch, capability, assume, label):
    gpu = device.Device("a GPU", capability, 96 << 30, "580.1")
    monkeypatch.setattr(device, "first_visible_device", lambda: gpu)
    monkeypatch.setenv("VLLM_SM12X_ASSUME", assume)
    machine = describe_machine("0123456789ab-dirty")
    assert (machine["commit"], machine["dirty"]) == ("0123456789ab", True)
    assert machine_line(machine).startswith(f"{label}: ")
    assert f"a GPU ({capability[0]}.{capability[1]}), driver 580.1" in machine_line(machine)
    assert "at 0123456789ab with changes" in machine_line(machine)
    assert json.loads(json.dumps(machine)) == machine


def test_the_proxy_takes_the_whole_path_of_an_sm12x_gpu(model):
    assert attention_env(Attention.PROXY) == {
        "VLLM_TRITON_MLA_SPARSE": "auto",
        "VLLM_SM12X_ASSUME": "12.0",
    }
    options = ("--enforce-eager", "--tensor-parallel-size", "2", "--pipeline-parallel-size", "3")
    ran, result, log = serve(model, *options, label="proxy", requests=2)
    assert ran.exit_code == 0, ran.output
    assert (result["machine"]["label"], result["attention"]) == ("proxy", "proxy")
    assert result["mode"] == "eager"
    arguments = json.loads(re.search(r"arguments (.*)", log)[1])
    assert " --tensor-parallel-size 2 --pipeline-parallel-size 3" in " ".join(arguments)
    assert "--enforce-eager" in arguments
    assert parallel_args(1, 1) == []
    ran, result, _ = serve(model, label="proxy", fault="other_attention", requests=2)
    assert ran.exit_code == 1
    assert "asked for TRITON_MLA_SPARSE" in result["problems"][0]


def run_without_toolkit(tmp_path, *arguments, code):
    """Run Python with `code` in an environment that has a toolkit of its own; what it printed."""
    tools = tmp_path / "toolkit"
    tools.mkdir()
    for name in ("nvcc", "other-tool"):
        (tools / name).write_text("#!/bin/sh\n")
        (tools / name).chmod(0o755)
    site = tmp_path / "site"
    for module in ("deep_gemm", "tilelang"):
        (site / module).mkdir(parents=True)
        (site / module / "__init__.py").write_text("")
        (site / module / "inner.py").write_text("")
    path = os.pathsep.join([str(tools), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(site), "CUDA_HOME": str(tmp_path)}
    assert shutil.which("nvcc", path=path) == str(tools / "nvcc")
    program = [sys.executable, str(ROOT / "benchmarks" / "no_toolkit.py"), *arguments]
    command = [*program, sys.executable, "-c", code]
    return subprocess.run(command, env=env, capture_output=True, text=True)


SEEN = """
import importlib, importlib.util, json, multiprocessing, os, shutil, subprocess, sys

def state(name):
    spec = importlib.util.find_spec(name)
    try:
        importlib.import_module(name)
    except ImportError as error:
        return [spec is not None, type(error).__name__]
    return [spec is not None, None]

report = {name: state(name) for name in ("deep_gemm", "tilelang", "json")}
if len(sys.argv) == 1:
    child = [sys.executable, "-c", os.environ["CODE"], "child"]
    report["child"] = json.loads(subprocess.run(child, capture_output=True, text=True).stdout)
report["tools"] = [shutil.which("nvcc"), shutil.which("other-tool") is not None]
report["home"] = os.environ.get("CUDA_HOME")
print(json.dumps(report))
raise SystemExit(7)
"""


@pytest.mark.parametrize(
    ("arguments", "deep_gemm_state", "tilelang_state"),
    [
        ((), [False, "ModuleNotFoundError"], [False, "ModuleNotFoundError"]),
        (("--broken",), [True, "ImportError"], [True, "ImportError"]),
        (("--keep", "tilelang"), [False, "ModuleNotFoundError"], [True, None]),
    ],
)
def test_without_toolkit_nothing_of_it_is_found(
    tmp_path, monkeypatch, arguments, deep_gemm_state, tilelang_state
):
    monkeypatch.setenv("CODE", SEEN)
    ran = run_without_toolkit(tmp_path, *arguments, code=SEEN)
    assert ran.returncode == 7, ran.stderr
    report = json.loads(ran.stdout)
    for seen in (report, report["child"]):
        assert seen["deep_gemm"] == deep_gemm_state
        assert seen["tilelang"] == tilelang_state
        assert seen["json"] == [True, None]
        assert (seen["tools"], seen["home"]) == ([None, True], None)
    assert "deep_gemm" in ran.stderr
    assert f"was {tmp_path / 'toolkit' / 'nvcc'}, off PATH now" in ran.stderr
    assert "unset: CUDA_HOME" in ran.stderr


def test_no_program_has_the_name_of_what_vllm_imports():
    programs = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert "no_toolkit" in programs
    assert not programs & {name.partition(".")[0] for name in no_toolkit.MODULES}


def test_what_is_left_of_a_toolkit_is_an_error(monkeypatch):
    monkeypatch.setattr(no_toolkit, "MODULES", ("wave",))
    env = dict(os.environ)
    with pytest.raises(no_toolkit.NotHiddenError, match="still there: wave"):
        no_toolkit.verify(["wave"], False, env)
    ran = CliRunner().invoke(no_toolkit.app, ["--keep", "waves", "true"])
    assert ran.exit_code == 2


@pytest.mark.contract
@pytest.mark.parametrize("mode", ["--absent", "--broken"])
def test_vllm_finds_no_toolkit(tmp_path, mode):
    code = (
        "from vllm.utils.import_utils import has_deep_gemm, has_tilelang\n"
        "import vllm.v1.attention.ops.flashmla as flashmla\n"
        "print([has_deep_gemm(), flashmla._flashmla_C_AVAILABLE, has_tilelang()])\n"
    )
    ran = run_without_toolkit(tmp_path, mode, code=code)
    assert ran.returncode == 0, ran.stderr
    # Later releases ask whether TileLang is there without importing it.
    from vllm.utils import import_utils

    unseen = mode == "--broken" and hasattr(import_utils, "_has_module_spec")
    assert ran.stdout.splitlines()[-1] == f"[False, False, {unseen}]"


class LongModel(ModelOfPositions):
    """A ModelOfPositions with a worker to ask, and times of requests."""

    def __init__(self, **args):
        super().__init__(**args)
        LongModel.made = self
        cache = types.SimpleNamespace(num_gpu_blocks=77)
        self.llm_engine = types.SimpleNamespace(
            vllm_config=types.SimpleNamespace(cache_config=cache)
        )
        self.lengths = []

    def collective_rpc(self, function):
        return [function(None)]

    def answer(self, prompt, params):
        self.lengths.append((len(prompt), params.max_tokens))
        output = super().answer(prompt, params)
        output.metrics = types.SimpleNamespace(
            first_token_latency=1.5, first_token_ts=10.0, last_token_ts=10.5
        )
        return output


@pytest.mark.contract
@pytest.mark.parametrize("label", ["ours", "proxy"])
def test_the_memory_of_a_long_context(model, monkeypatch, label):
    import in_engine

    taken = {"weights": 100, "kv_cache": 1000, "profile_peak": 50, "allocated": 1130}
    taken["workspace"] = 20
    answers = iter([{**taken, "peak": 5000}, {**taken, "peak": 1170}])
    monkeypatch.setattr(in_engine, "memory_in_use", lambda worker: next(answers))
    monkeypatch.setattr(in_engine, "reset_peak_memory", lambda worker: None)
    monkeypatch.setattr("vllm.LLM", LongModel)
    result = model.parent / "long.json"
    given = ["--model", str(model), "--attention", label, "--json", str(result)]
    given += ["--gpu-memory-utilization", "0.25"]
    with mock.patch.dict(os.environ):
        ran = CliRunner().invoke(long_context.app, given)
        assert os.environ.get("VLLM_SM12X_ASSUME") == ("12.0" if label == "proxy" else None)
    assert ran.exit_code == 0, ran.output
    written = json.loads(result.read_text())
    assert written["beyond_weights_and_kv_cache"] == {
        "profile": 50,
        "standing": 30,
        "transient": 40,
        "serving": 70,
    }
    assert written["free_kv_blocks"] == 77
    assert written["long_prompt"]["first_token_seconds"] == 1.5
    assert written["second_long_prompt"]["first_token_seconds"] == 1.5
    assert LongModel.made.lengths == [(8292, 4), (131_072, 32), (131_072, 32)]
    assert LongModel.made.args["max_model_len"] == 1_048_576
    assert LongModel.made.args["gpu_memory_utilization"] == 0.25
    refused = CliRunner().invoke(long_context.app, [*given, "--max-model-len", "131072"])
    assert refused.exit_code == 2


@pytest.mark.contract
def test_a_kv_buffer_that_layers_share_is_counted_once(monkeypatch):
    import in_engine

    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5, 9))
    buffer = torch.zeros(64, dtype=torch.uint8)
    runner = types.SimpleNamespace(
        kv_caches=[buffer[:32].view(4, 8), [buffer[16:], torch.zeros(8)]], model_memory_usage=3.0
    )
    worker = types.SimpleNamespace(model_runner=runner, peak_activation_memory=2)
    from vllm.v1.worker import workspace

    manager = types.SimpleNamespace(_current_workspaces=[torch.zeros(3), None])
    monkeypatch.setattr(workspace, "current_workspace_manager", lambda: manager)
    memory = in_engine.memory_in_use(worker)
    assert memory["kv_cache"] == 64 + 32
    assert memory["workspace"] == 12
    assert (memory["weights"], memory["profile_peak"], memory["free"]) == (3, 2, 5)

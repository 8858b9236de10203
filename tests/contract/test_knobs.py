# SPDX-License-Identifier: Apache-2.0
"""Settings: defaults, what parses, and what an error says."""

import os
from contextlib import ExitStack

import pytest

from vllm_sm12x import knobs

pytestmark = pytest.mark.once

# Names and defaults that users of the SM12x forks of vLLM already have in their scripts.
ESTABLISHED = {
    "VLLM_TRITON_MLA_SPARSE": None,
    "VLLM_DEEP_GEMM_SM120_PAGED_MQA_TILED": True,
    "VLLM_TRITON_MLA_SPARSE_ALLOW_CUDAGRAPH": True,
    "VLLM_TRITON_MLA_SPARSE_TOPK_CHUNK_SIZE": 512,
    "VLLM_TRITON_MLA_SPARSE_QUERY_CHUNK_SIZE": 256,
    "VLLM_TRITON_MLA_SPARSE_HEAD_BLOCK_SIZE": None,
    "VLLM_TRITON_MLA_SPARSE_DUMP": False,
    "VLLM_TRITON_MLA_SPARSE_DUMP_PATH": "/tmp/deepseek_v4_triton_mla_sparse_dump.jsonl",
}


def all_ops(provider):
    names = ("mqa_logits", "paged_mqa_logits", "fp8_einsum", "hc_prenorm_gemm")
    return dict.fromkeys(names, provider)


GOOD = [
    ("VLLM_TRITON_MLA_SPARSE", "1", True),
    ("VLLM_TRITON_MLA_SPARSE", "0", False),
    ("VLLM_TRITON_MLA_SPARSE", "auto", None),
    ("VLLM_TRITON_MLA_SPARSE", "", None),
    ("VLLM_DEEP_GEMM_SM120_PAGED_MQA_TILED", "0", False),
    ("VLLM_TRITON_MLA_SPARSE_ALLOW_CUDAGRAPH", "0", False),
    ("VLLM_TRITON_MLA_SPARSE_TOPK_CHUNK_SIZE", "16", 16),
    ("VLLM_TRITON_MLA_SPARSE_TOPK_CHUNK_SIZE", " 65536 ", 65536),
    ("VLLM_TRITON_MLA_SPARSE_QUERY_CHUNK_SIZE", "1", 1),
    ("VLLM_TRITON_MLA_SPARSE_HEAD_BLOCK_SIZE", "4", 4),
    ("VLLM_TRITON_MLA_SPARSE_HEAD_BLOCK_SIZE", "auto", None),
    ("VLLM_TRITON_MLA_SPARSE_DUMP", "1", True),
    ("VLLM_TRITON_MLA_SPARSE_DUMP_PATH", "/x/y.jsonl", "/x/y.jsonl"),
    ("VLLM_SM12X_ASSUME", "12.1", (12, 1)),
    ("VLLM_SM12X_ONE_PASS_TOP_K", "1", True),
    ("VLLM_SM12X_WARMUP", "1", True),
    ("VLLM_SM12X_WARMUP", "0", False),
    ("VLLM_SM12X_OFF", "worker, attention.name,", ("worker", "attention.name")),
    ("VLLM_SM12X_PROVIDERS", "auto", all_ops("auto")),
    ("VLLM_SM12X_PROVIDERS", "deep_gemm", all_ops("deep_gemm")),
    ("VLLM_SM12X_PROVIDERS", "fp8_einsum=triton", {**all_ops("auto"), "fp8_einsum": "triton"}),
    (
        "VLLM_SM12X_PROVIDERS",
        " paged_mqa_logits = deep_gemm, hc_prenorm_gemm=auto,",
        {**all_ops("auto"), "paged_mqa_logits": "deep_gemm"},
    ),
]
OPS_AND_PROVIDERS = (
    "auto, triton or deep_gemm for every op, or op=provider pairs separated by commas, where op is "
    "mqa_logits, paged_mqa_logits, fp8_einsum or hc_prenorm_gemm"
)
BAD = [
    ("VLLM_TRITON_MLA_SPARSE", "yes", "0, 1 or auto"),
    ("VLLM_DEEP_GEMM_SM120_PAGED_MQA_TILED", "2", "0 or 1"),
    ("VLLM_TRITON_MLA_SPARSE_ALLOW_CUDAGRAPH", "true", "0 or 1"),
    ("VLLM_TRITON_MLA_SPARSE_TOPK_CHUNK_SIZE", "0", "a multiple of 16 from 16 to 65536"),
    ("VLLM_TRITON_MLA_SPARSE_TOPK_CHUNK_SIZE", "24", "a multiple of 16 from 16 to 65536"),
    ("VLLM_TRITON_MLA_SPARSE_TOPK_CHUNK_SIZE", "65552", "a multiple of 16 from 16 to 65536"),
    ("VLLM_TRITON_MLA_SPARSE_QUERY_CHUNK_SIZE", "0", "an integer from 1 on"),
    ("VLLM_TRITON_MLA_SPARSE_QUERY_CHUNK_SIZE", "1.5", "an integer from 1 on"),
    ("VLLM_TRITON_MLA_SPARSE_HEAD_BLOCK_SIZE", "3", "auto, 1, 2 or 4"),
    ("VLLM_TRITON_MLA_SPARSE_DUMP", "on", "0 or 1"),
    ("VLLM_SM12X_ASSUME", "9.0", "12.0 or 12.1"),
    ("VLLM_SM12X_ONE_PASS_TOP_K", "2", "0 or 1"),
    ("VLLM_SM12X_WARMUP", "on", "0, 1 or auto"),
]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("VLLM_", "DG_", "CUDA_VISIBLE")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize("name, default", ESTABLISHED.items())
def test_established_defaults(name, default):
    assert knobs.get(name) == default


@pytest.mark.parametrize("name, raw, value", GOOD)
def test_good_values(monkeypatch, name, raw, value):
    monkeypatch.setenv(name, raw)
    assert knobs.get(name) == value
    assert type(knobs.get(name)) is type(value)


@pytest.mark.parametrize("name, raw, allowed", BAD)
def test_bad_values_say_what_is_wrong(monkeypatch, name, raw, allowed):
    monkeypatch.setenv(name, raw)
    with pytest.raises(knobs.KnobError) as raised:
        knobs.get(name)
    assert str(raised.value) == f"{name}={raw!r} is not valid: allowed is {allowed}."
    with pytest.raises(knobs.KnobError):
        knobs.check_environment()


@pytest.mark.parametrize(
    "raw, because",
    [
        ("cutlass", "no provider is called 'cutlass'"),
        ("deepgemm", "no provider is called 'deepgemm'; did you mean deep_gemm"),
        ("fp8_einsum=tritn", "no provider is called 'tritn'; did you mean triton"),
        ("fp8_einsun=triton", "no op is called 'fp8_einsun'; did you mean fp8_einsum"),
        ("fp8_einsum=", "no provider is called ''"),
        ("fp8_einsum=triton,fp8_einsum=auto", "it names fp8_einsum twice"),
        ("fp8_einsum=triton,deep_gemm", "'deep_gemm' names no op, as in mqa_logits=triton"),
        (",", "it names no op"),
    ],
)
def test_bad_providers_say_what_is_wrong_and_what_was_meant(monkeypatch, raw, because):
    monkeypatch.setenv("VLLM_SM12X_PROVIDERS", raw)
    with pytest.raises(knobs.KnobError) as raised:
        knobs.check_environment()
    assert str(raised.value) == (
        f"VLLM_SM12X_PROVIDERS={raw!r} is not valid ({because}): allowed is {OPS_AND_PROVIDERS}."
    )


def test_every_knob_that_can_be_wrong_is_tried():
    takes_anything = {
        "VLLM_TRITON_MLA_SPARSE_DUMP_PATH",
        "VLLM_SM12X_COMPILE_LOG",
        "VLLM_SM12X_OFF",
    }
    tried_above = {"VLLM_SM12X_PROVIDERS"}
    tried = {name for name, _, _ in BAD} | takes_anything | tried_above
    assert tried == {knob.name for knob in knobs.KNOBS}


@pytest.mark.parametrize(
    "typo, meant",
    [
        ("VLLM_TRITON_MLA_SPARSE_DUPM", "VLLM_TRITON_MLA_SPARSE_DUMP"),
        ("VLLM_SM12X_OF", "VLLM_SM12X_OFF"),
    ],
)
def test_unknown_names_suggest_the_known_one(monkeypatch, typo, meant):
    monkeypatch.setenv(typo, "1")
    with pytest.raises(knobs.KnobError, match=f"^{typo} is not a setting.*did you mean {meant}"):
        knobs.check_environment()


def test_names_that_vllm_knows_are_vllms_business(monkeypatch):
    monkeypatch.setenv("VLLM_TRITON_MLA_SPARSE_OF_A_LATER_VLLM", "1")
    knobs.check_environment(known={"VLLM_TRITON_MLA_SPARSE_OF_A_LATER_VLLM"})
    with pytest.raises(knobs.KnobError):
        knobs.check_environment()


def test_merge_adds_live_readers_and_keeps_what_is_there(monkeypatch):
    theirs = object()
    table = {"VLLM_TRITON_MLA_SPARSE": theirs, "OTHER": theirs}
    added = knobs.merge_into(table)
    assert table["VLLM_TRITON_MLA_SPARSE"] is theirs
    assert set(added) == {knob.name for knob in knobs.KNOBS} - {"VLLM_TRITON_MLA_SPARSE"}
    monkeypatch.setenv("VLLM_TRITON_MLA_SPARSE_QUERY_CHUNK_SIZE", "77")
    assert table["VLLM_TRITON_MLA_SPARSE_QUERY_CHUNK_SIZE"]() == 77


@pytest.mark.parametrize(
    "ours, theirs, result",
    [(None, None, "1"), ("0", None, "0"), ("1", None, "1"), ("0", "1", "1")],
)
def test_deep_gemm_hears_ours_unless_its_own_is_set(monkeypatch, ours, theirs, result):
    environment = {
        "VLLM_DEEP_GEMM_SM120_PAGED_MQA_TILED": ours,
        "DG_SM120_PAGED_MQA_TILED": theirs,
    }
    monkeypatch.setattr(os, "environ", {k: v for k, v in environment.items() if v is not None})
    with ExitStack() as undo:
        knobs.forward_to_deep_gemm(undo)
        assert os.environ.get("DG_SM120_PAGED_MQA_TILED") == result
    assert os.environ.get("DG_SM120_PAGED_MQA_TILED") == theirs


@pytest.mark.parametrize("theirs, result", [(None, "256"), ("64", "64"), ("", "")])
def test_a_default_gives_way_to_what_is_set(monkeypatch, theirs, result):
    environment = {} if theirs is None else {"SOMEBODYS": theirs}
    monkeypatch.setattr(os, "environ", environment)
    with ExitStack() as undo:
        knobs.set_default("SOMEBODYS", "256", undo)
        assert os.environ == {"SOMEBODYS": result}
        assert knobs.set_by_others("SOMEBODYS", "256") == theirs
    assert os.environ == ({} if theirs is None else {"SOMEBODYS": theirs})


@pytest.mark.parametrize(
    "home, path, result",
    [(None, None, None), ("/a", "/b", "/a"), ("", "/b", "/b"), (None, "", None)],
)
def test_cuda_home(monkeypatch, home, path, result):
    for name, value in (("CUDA_HOME", home), ("CUDA_PATH", path)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert knobs.cuda_home() == result


def test_third_party_variables(monkeypatch):
    assert knobs.cuda_visible_devices() is None
    assert knobs.vllm_plugins() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("VLLM_PLUGINS", "sm12x,other")
    assert knobs.cuda_visible_devices() == ""
    assert knobs.vllm_plugins() == ("sm12x", "other")

# SPDX-License-Identifier: Apache-2.0
"""A vLLM in which touched symbols have other names: the doctor says which rows that turns off."""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.contract

# Of each row that reaches into vLLM: a word of a symbol that it touches, and the symbol.
RENAMED = {
    "attention.name": ("_AttentionBackendEnumMeta", "registry._AttentionBackendEnumMeta"),
    "attention.select": ("_select_dsv4_attn_cls", "nvidia.model._select_dsv4_attn_cls"),
    "indexer": ("SparseAttnIndexer", "sparse_attn_indexer.SparseAttnIndexer"),
    "fp8_linear.scales": (
        "Fp8BlockScaledMMLinearKernel",
        "BlockScaledMMLinearKernel.Fp8BlockScaledMMLinearKernel",
    ),
    "hyper_connections": ("mhc_post_tilelang", "nvidia.model.mhc_post_tilelang"),
    "loading.prefetch": (
        "safetensors_weights_iterator",
        "default_loader.safetensors_weights_iterator",
    ),
}


@pytest.fixture(scope="module")
def doctor(host, vllm_files, tmp_path_factory):
    """The doctor's facts on a copy of vLLM where each of those words is another, everywhere."""
    spec = importlib.util.find_spec("vllm")
    assert spec and spec.origin
    stock, copy = Path(spec.origin).parent, tmp_path_factory.mktemp("moved") / "vllm"
    words = re.compile(rb"\b(" + "|".join(word for word, _ in RENAMED.values()).encode() + rb")\b")
    for folder, subfolders, files in os.walk(stock):
        subfolders[:] = [name for name in subfolders if name != "__pycache__"]
        target = copy / Path(folder).relative_to(stock)
        target.mkdir(parents=True)
        for name in files:
            source = Path(folder, name)
            text = source.read_bytes() if name.endswith(".py") else b""
            if words.search(text):
                (target / name).write_bytes(words.sub(rb"\1_moved", text))
            else:
                (target / name).symlink_to(source)
    run = host.command(
        [sys.executable, "-B", "-m", "vllm_sm12x", "doctor", "--json"],
        gpu={"FAKE_NVML_CAPABILITY": "12.0", "FAKE_NVML_NAME": "a GPU", "FAKE_NVML_COUNT": "1"},
        env={"CUDA_HOME": "/nowhere"},
        first_on_path=[copy.parent],
        check=False,
    )
    assert run.returncode == 2, run.output[-4000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize("row", RENAMED)
def test_the_row_is_drifted_and_names_the_symbol(doctor, row):
    found = {change["name"]: (change["state"], change["detail"]) for change in doctor["changes"]}
    state, detail = found[row]
    assert state == "drifted", detail
    assert re.fullmatch(rf"vLLM \S+ has no vllm\.\S*{re.escape(RENAMED[row][1])}(\.\w+)?", detail)


def test_the_others_are_as_they_were(doctor, settled):
    found = {change["name"]: change["state"] for change in doctor["changes"]}
    others = settled.keys() - RENAMED.keys()
    assert {name: found[name] for name in others} == {name: settled[name] for name in others}


def test_every_drifted_row_is_a_finding(doctor):
    assert doctor["health"] == "broken"
    assert len(doctor["findings"]) == len(RENAMED)
    for row, finding in zip(RENAMED, doctor["findings"], strict=True):
        assert finding.startswith(f"{row} drifted: ")

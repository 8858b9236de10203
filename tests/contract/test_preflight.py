# SPDX-License-Identifier: Apache-2.0
"""`doctor --model` without vLLM: what the files say, what is refused, and sizes from the field."""

import importlib.util
import json
import subprocess
import sys
from math import prod
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from vllm_sm12x import cli, device, doctor, preflight
from vllm_sm12x.device import NoDevice
from vllm_sm12x.preflight import memory, weights
from vllm_sm12x.preflight.checkpoint import Checkpoint, CheckpointError, Stored, read
from vllm_sm12x.preflight.recipes import RECIPES
from vllm_sm12x.tiny_checkpoint.deepseek_v4 import CONFIG

pytestmark = pytest.mark.once

SIZES = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "I64": 8}
FLASH = {
    **CONFIG, "num_hidden_layers": 43, "n_routed_experts": 256, "moe_intermediate_size": 2048,
    "vocab_size": 129280, "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
}  # fmt: skip
PRO = {
    **FLASH, "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
    "q_lora_rank": 1536, "o_groups": 16, "n_routed_experts": 384, "moe_intermediate_size": 3072,
    "index_topk": 1024, "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0],
}  # fmt: skip


def released(config) -> dict[str, Stored]:
    """The tensors of a released checkpoint of these dimensions, without its MTP layer."""
    hidden, heads, dim = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    q, groups, o = config["q_lora_rank"], config["o_groups"], config["o_lora_rank"]
    inner, experts, mix = config["moe_intermediate_size"], config["n_routed_experts"], 24
    found: dict[str, Stored] = {}

    def put(name, dtype, *shape):
        found[name] = Stored(dtype, shape, prod(shape) * SIZES[dtype])

    def fp8(name, rows, columns):
        put(f"{name}.weight", "F8_E4M3", rows, columns)
        put(f"{name}.scale", "F8_E8M0", -(-rows // 128), -(-columns // 128))

    def compressor(name, width, ratio):
        put(f"{name}.ape", "F32", ratio, width)
        for part in ("wgate", "wkv"):
            put(f"{name}.{part}.weight", "BF16", width, hidden)

    put("embed.weight", "BF16", config["vocab_size"], hidden)
    put("head.weight", "BF16", config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at, ratio = f"layers.{layer}", config["compress_ratios"][layer]
        fp8(f"{at}.attn.wq_a", q, hidden)
        fp8(f"{at}.attn.wq_b", heads * dim, q)
        fp8(f"{at}.attn.wkv", dim, hidden)
        fp8(f"{at}.attn.wo_a", groups * o, heads * dim // groups)
        fp8(f"{at}.attn.wo_b", hidden, groups * o)
        for part in ("attn", "ffn"):
            put(f"{at}.hc_{part}_fn", "F32", mix, 4 * hidden)
        if ratio == 4:
            compressor(f"{at}.attn.compressor", 2 * dim, 4)
            compressor(f"{at}.attn.indexer.compressor", 256, 4)
            fp8(f"{at}.attn.indexer.wq_b", 64 * 128, q)
        elif ratio == 128:
            compressor(f"{at}.attn.compressor", dim, 128)
        put(f"{at}.ffn.gate.weight", "BF16", experts, hidden)
        for name in ("w1", "w3"):
            fp8(f"{at}.ffn.shared_experts.{name}", inner, hidden)
        fp8(f"{at}.ffn.shared_experts.w2", hidden, inner)
        for name, rows, columns in (("w1", inner, hidden), ("w2", hidden, inner)):
            times = 2 if name == "w1" else 1  # w3 is like w1
            put(f"{at}.ffn.experts.0.{name}.weight", "I8", experts * times, rows, columns // 2)
            put(f"{at}.ffn.experts.0.{name}.scale", "F8_E8M0", experts * times, rows, columns // 32)
    return found


@pytest.mark.parametrize(
    "config, ranks, loaded",
    [
        pytest.param(FLASH, 2, 74.8, id="V4-Flash, 2x RTX PRO 6000"),
        pytest.param(PRO, 8, 102.39, id="V4-Pro, 8x DGX Spark"),
    ],
)
def test_weights_are_those_that_the_field_reports(config, ranks, loaded, tmp_path):
    """'Model loading took X GiB memory' of vllm-project/vllm#40899."""
    checkpoint = Checkpoint("x", tmp_path, config, released(config))
    (estimate,) = weights.by_stage(checkpoint, ranks, 1)
    assert estimate / memory.GIB == pytest.approx(loaded, rel=0.025)


def test_stages_are_split_as_vllm_splits_them():
    from vllm.distributed.utils import get_pp_indices

    for layers, stages in ((43, 2), (43, 4), (61, 8), (6, 1)):
        split = weights.stage_of_layer(layers, stages)
        for stage in range(stages):
            first, end = get_pp_indices(layers, stage, stages)
            assert split[first:end] == [stage] * (end - first) and len(split) == layers


# Files


@pytest.fixture
def folder(tmp_path):
    """A small checkpoint whose files the safetensors library wrote."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    save_file({"norm.weight": np.zeros(8, np.float16)}, path / "a.safetensors")
    save_file({"layers.3.attn.wq_b.weight": np.zeros((4, 2), np.uint8)}, path / "b.safetensors")
    return path


def test_headers_are_read_as_written(folder):
    checkpoint = read(str(folder))
    assert checkpoint.tensors == {
        "norm.weight": Stored("F16", (8,), 16),
        "layers.3.attn.wq_b.weight": Stored("U8", (4, 2), 8),
    }
    tables = 2 * 1048576 * 64 * 4
    assert weights.by_stage(checkpoint, 2, 1) == [16 + 8 // 2 + tables]
    # The last three layers are compressed, all of them: one table.
    assert weights.by_stage(checkpoint, 1, 2) == [tables, 16 + 8 + tables // 2]


def damage_config(folder, **changed):
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changed}))


def name_a_missing_file(folder):
    index = {"weight_map": {"x": "a.safetensors", "y": "c.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut(folder, length):
    file = folder / "a.safetensors"
    file.write_bytes(file.read_bytes()[:length])


BAD = {
    "has no config.json: give the folder": lambda at: (at / "config.json").unlink(),
    "cannot be read as JSON": lambda at: (at / "config.json").write_text("{"),
    "holds no JSON object": lambda at: (at / "config.json").write_text("[]"),
    "is LlamaForCausalLM; allowed are": lambda at: damage_config(
        at, architectures=["LlamaForCausalLM"]
    ),
    "is none; allowed are": lambda at: damage_config(at, architectures=None),
    "has no *.safetensors": lambda at: [file.unlink() for file in at.glob("*.safetensors")],
    "1 of the 2 files that model.safetensors.index.json names": name_a_missing_file,
    "is cut off in its header": lambda at: cut(at, 20),
    "bytes of the 16 that its header names": lambda at: cut(at, -3),
}


@pytest.mark.parametrize("sentence", BAD)
def test_a_bad_folder_is_said_in_one_sentence(folder, sentence):
    BAD[sentence](folder)
    with pytest.raises(CheckpointError) as caught:
        read(str(folder))
    assert sentence in str(caught.value)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "model, sentence",
    [
        ("/nowhere/at/all", "does not exist; allowed is the folder"),
        ("nobody/nothing", "download it first with `hf download nobody/nothing`"),
    ],
)
def test_what_is_not_there_is_said(model, sentence, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=sentence):
        read(model)


# Requests


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ({"tensor_parallel_size": 3}, "3 does not divide the model's 64 attention heads in 8"),
        ({"tensor_parallel_size": 16}, "allowed are 1, 2, 4, 8"),
        ({"pipeline_parallel_size": 7}, "7 is more than the model's 6 layers"),
        ({"max_model_len": 1048577}, "is beyond the model's 1048576; allowed is 1 to 1048576"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(folder, flags, sentence):
    with pytest.raises(preflight.Refused, match=sentence):
        preflight.examine(preflight.Request(str(folder), **flags), None, False, False)


def test_without_vllm_the_headers_speak(folder):
    request = preflight.Request(str(folder), gpu_memory_utilization=0.5)
    facts, findings = preflight.examine(request, 32 * memory.GIB, False, False)
    assert findings == []
    left = 16 * memory.GIB - facts["weights_bytes_by_stage"][0] - memory.overhead(eager=False)
    assert facts["memory"]["kv_cache_bytes"] == left
    # Two layers of ratio 4 (a row of 584 and a key of 132 bytes for 4 tokens, padded), two of 128.
    per_token = 2 * (37440 + 8640) / 256 + 2 * 1728 / 256
    assert facts["kv_cache_bytes_per_token"] == per_token
    assert facts["memory"]["concurrency"] == pytest.approx(left / per_token / 1048576, abs=0.01)
    assert "--max-model-len 1048576 --gpu-memory-utilization 0.5" in facts["serve"]


def test_what_does_not_fit_the_memory_is_said(folder):
    def findings(gib, unified=False, **flags):
        request = preflight.Request(str(folder), **flags)
        return preflight.examine(request, round(gib * memory.GIB), unified, False)[1]

    assert findings(8)[0].startswith("The model does not fit: a GPU has 8.0 GiB")
    (short,) = findings(8.9, max_model_len=1048576)
    assert short.startswith("--max-model-len 1048576 does not fit: 0.3 GiB for KV caches hold one")
    (starved,) = findings(32, unified=True, gpu_memory_utilization=0.9)
    assert starved.endswith("leaves the system less than 8.0 GiB; allowed here is up to 0.75.")


def test_the_doctor_without_gpu_and_vllm_is_degraded(folder, monkeypatch):
    monkeypatch.setattr(device, "first_visible_device", lambda: NoDevice("no driver"))
    report = doctor.Report(facts={"packages": {"vllm": None}})
    doctor._examine_model(report, preflight.Request(str(folder)))
    assert report.status == doctor.DEGRADED
    assert report.facts["preflight"]["kv_cache_bytes_per_token"] == 373.5
    doctor._examine_model(report, preflight.Request("/nowhere/at/all"))
    assert report.status == doctor.BROKEN and "does not exist" in report.findings[-1]


def test_the_command_line_reaches_the_doctor(monkeypatch):
    heard = {}
    monkeypatch.setattr(doctor, "run_doctor", lambda **asked: heard.update(asked) or 0)
    flags = "--tensor-parallel-size 2 --max-model-len 4096 --gpu-memory-utilization 0.8"
    result = CliRunner().invoke(cli.app, ["doctor", "--recipes", "--model", "x", *flags.split()])
    assert result.exit_code == 0
    assert heard["request"] == preflight.Request("x", 2, 1, 4096, 0.8) and heard["recipes"]


def test_every_machine_has_its_recipe_and_its_source():
    machines = [recipe.machine for recipe in RECIPES]
    assert machines == [
        *("1x RTX PRO 6000", "2x RTX PRO 6000", "4x RTX PRO 6000", "1x RTX 5090"),
        *("1x DGX Spark", "2x DGX Spark", "8x DGX Spark"),
    ]
    for recipe in RECIPES:
        assert recipe.source.startswith("https://github.com/vllm-project/") and recipe.note
        if recipe.command:
            ranks = recipe.machine.split("x")[0]
            assert f"--tensor-parallel-size {ranks} " in recipe.command


# The comparison with a server's log

LOG = """
(Worker_TP0) INFO gpu_model_runner.py:4848] Model loading took 74.8 GiB memory and 41.1 seconds
(Worker_TP1) INFO gpu_model_runner.py:4848] Model loading took 74.7 GiB memory and 41.3 seconds
INFO gpu_worker.py:436] Available KV cache memory: 9.15 GiB
INFO kv_cache_utils.py:1693] GPU KV cache size: 1,384,120 tokens
INFO kv_cache_utils.py:1698] Maximum concurrency for 1,048,576 tokens per request: 1.32x
"""


def test_the_comparison_reads_the_log_and_asks_the_doctor(tmp_path, monkeypatch):
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.setattr(sys, "path", [str(benchmarks), *sys.path])
    spec = importlib.util.spec_from_file_location("comparison", benchmarks / "preflight.py")
    comparison = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(comparison)
    memory = {
        "gpu_bytes": 95 * 2**30, "gpu_memory_utilization": 0.985, "weights_bytes": 74 * 2**30,
        "overhead_bytes": 7 * 2**30, "kv_cache_bytes": 10 * 2**30, "concurrency": 1.5,
    }  # fmt: skip
    doctor_says = json.dumps({"preflight": {"memory": memory}, "findings": []})
    asked = []

    def run(command, **options):
        asked.extend(command)
        return subprocess.CompletedProcess(command, 0, doctor_says, "")

    monkeypatch.setattr(comparison.subprocess, "run", run)
    monkeypatch.setattr(comparison, "describe_machine", lambda revision: {})
    monkeypatch.setattr(comparison, "machine_line", lambda machine: "here")
    (tmp_path / "log").write_text(LOG)
    arguments = [str(tmp_path / "log"), "--model", "x", "--tensor-parallel-size", "2"]
    result = CliRunner().invoke(comparison.app, [*arguments, "--json", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    assert asked[asked.index("--max-model-len") + 1] == "1048576"
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["reported"] == {
        "weights_gib": 74.8, "kv_cache_gib": 9.15, "kv_cache_tokens": 1384120.0,
        "max_model_len": 1048576.0, "concurrency": 1.32,
    }  # fmt: skip
    assert out["overhead_gib"]["implied"] == pytest.approx(95 * 0.985 - 74.8 - 9.15)
    (tmp_path / "log").write_text("nothing")
    assert CliRunner().invoke(comparison.app, arguments).exit_code == 1

# SPDX-License-Identifier: Apache-2.0
"""`vllm-sm12x tune` on a made-up GPU: shapes, search, files, resumption, and what it refuses."""

import dataclasses
import io
import json
import math
from types import FunctionType
from unittest import mock

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from typer.testing import CliRunner

from vllm_sm12x import cli, device
from vllm_sm12x.device import Device, NoDevice
from vllm_sm12x.integration.fp8_config_files import default_config, file_name, read_table
from vllm_sm12x.tiny_checkpoint.deepseek_v4 import CONFIG
from vllm_sm12x.tiny_checkpoint.deepseek_v4 import tensors as tiny_tensors
from vllm_sm12x.tune import records as records_module
from vllm_sm12x.tune import run_tune
from vllm_sm12x.tune.errors import TuneError
from vllm_sm12x.tune.records import Measured, Records, fenced
from vllm_sm12x.tune.search import FINALISTS, Judgement, best_for
from vllm_sm12x.tune.shapes import Stored, read_model, shapes_of
from vllm_sm12x.tune.space import candidates, regrouped

pytestmark = pytest.mark.once

BLOCK = (128, 128)
STOCK = {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 32,
         "num_warps": 4, "num_stages": 2}  # fmt: skip
RTX = Device("NVIDIA RTX PRO 6000 Blackwell Server Edition", (12, 0), 96 * 2**30, "580.95")
RTX_NAME = "NVIDIA_RTX_PRO_6000_Blackwell_Server_Edition"
GQA = {"num_key_value_heads": 2, "quantization_config": {"weight_block_size": [128, 128]}}


def layer(name, n, k, scale="weight_scale_inv"):
    return {
        f"{name}.weight": Stored("F8_E4M3", (n, k)),
        f"{name}.{scale}": Stored("F32", (math.ceil(n / 128), math.ceil(k / 128))),
    }


def dense_layer(number):
    prefix = f"model.layers.{number}"
    return {
        **layer(f"{prefix}.self_attn.q_proj", 2048, 1024),
        **layer(f"{prefix}.self_attn.k_proj", 256, 1024),
        **layer(f"{prefix}.self_attn.v_proj", 256, 1024),
        **layer(f"{prefix}.self_attn.o_proj", 1024, 2048),
        **layer(f"{prefix}.mlp.gate_proj", 3072, 1024),
        **layer(f"{prefix}.mlp.up_proj", 3072, 1024),
        **layer(f"{prefix}.mlp.down_proj", 1024, 3072),
    }


def sizes(shapes):
    return {(shape.n, shape.k): shape.layers for shape in shapes}


class TestShapes:
    @pytest.mark.parametrize(
        "ranks, qkv, o, gate_up, down",
        [
            (1, (2560, 1024), (1024, 2048), (6144, 1024), (1024, 3072)),
            (2, (1280, 1024), (1024, 1024), (3072, 1024), (1024, 1536)),
            # Four GPUs share two key-value heads of 128 rows: each has one of them.
            (4, (512 + 2 * 128, 1024), (1024, 512), (1536, 1024), (1024, 768)),
        ],
    )
    def test_merged_and_sharded(self, ranks, qkv, o, gate_up, down):
        tensors = {**dense_layer(0), **dense_layer(1)}
        assert sizes(shapes_of(tensors, GQA, BLOCK, ranks)) == {
            qkv: ("self_attn.qkv_proj",),
            o: ("self_attn.o_proj",),
            gate_up: ("mlp.gate_up_proj",),
            down: ("mlp.down_proj",),
        }

    @pytest.mark.parametrize(
        "ranks, expected",
        [
            (
                1,
                [
                    (32768, 1024),
                    (4096, 8192),
                    (8192, 1024),
                    (1536, 4096),
                    (1024, 4096),
                    (4096, 512),
                ],
            ),
            (
                2,
                [(16384, 1024), (4096, 4096), (8192, 1024), (1536, 4096), (512, 4096), (4096, 256)],
            ),
            (4, [(8192, 1024), (4096, 2048), (1536, 4096), (256, 4096), (4096, 128)]),
        ],
    )
    def test_deepseek_v4_as_vllm_builds_it(self, ranks, expected):
        """`expected` are the FP8 weights, without wo_a, of vLLM 0.26.0's model on torch's meta."""
        tensors = {
            tensor.name: Stored(tensor.dtype, tensor.shape)
            for tensor in tiny_tensors()
            if not tensor.name.startswith("mtp.")
        }
        shapes = shapes_of(tensors, CONFIG, BLOCK, ranks)
        assert {(shape.n, shape.k) for shape in shapes} == set(expected)
        assert all(shape.by_rule for shape in shapes)

    def test_what_is_no_block_scaled_linear_is_left_out(self):
        tensors = {
            **layer("layers.0.mlp.experts.7.down_proj", 512, 256),
            **layer("layers.0.attn.wo_a", 512, 256),
            "layers.0.mlp.gate.weight": Stored("BF16", (64, 1024)),
            # One scale for the whole tensor.
            "layers.0.x.weight": Stored("F8_E4M3", (512, 512)),
            "layers.0.x.weight_scale": Stored("F32", (1,)),
        }
        assert shapes_of(tensors, GQA, BLOCK, 1) == ()

    def test_a_name_without_a_rule_counts_as_stored_and_says_so(self):
        (shape,) = shapes_of(layer("layers.0.strange", 640, 256), GQA, BLOCK, 4)
        assert (shape.n, shape.k, shape.layers, shape.by_rule) == (
            640,
            256,
            ("layers.strange",),
            False,
        )

    def test_what_does_not_divide_is_refused(self):
        with pytest.raises(TuneError, match="--tensor-parallel-size 7 does not divide the 2048"):
            shapes_of(dense_layer(0), GQA, BLOCK, 7)


class TestSpace:
    @pytest.mark.parametrize("m", [1, 8, 16, 17, 32, 64, 100, 4096])
    def test_every_candidate_can_be_right_and_can_fit(self, m):
        found, too_large = candidates(m, BLOCK, device.SM12X_SHARED_MEMORY_BYTES)
        assert found and too_large
        for config in found:
            assert 128 % config["BLOCK_SIZE_K"] == 0
            tiles = (config["BLOCK_SIZE_M"] + config["BLOCK_SIZE_N"]) * config["BLOCK_SIZE_K"]
            assert (config["num_stages"] - 1) * tiles <= device.SM12X_SHARED_MEMORY_BYTES
            assert config["BLOCK_SIZE_M"] == 16 or config["BLOCK_SIZE_M"] < 2 * m
        assert len({tuple(config.values()) for config in found}) == len(found)
        assert found == candidates(m, BLOCK, device.SM12X_SHARED_MEMORY_BYTES)[0]

    def test_groups_are_varied_where_there_is_more_than_one_tile(self):
        assert regrouped(STOCK, 64) == []
        assert [config["GROUP_SIZE_M"] for config in regrouped(STOCK, 65)] == [1, 16, 64]


class Gpu:
    """A made-up GPU: what a configuration costs, and which are wrong or do not fit."""

    def __init__(self, cost, wrong=(), too_large=()):
        self._cost, self._wrong, self._too_large = cost, wrong, too_large
        self.final: list[dict] = []

    def fits(self, config):
        return config not in self._too_large

    def judge(self, config):
        wrong = config in self._wrong
        return Judgement(math.nan if wrong else 1.7e-3, not wrong)

    def rough_time(self, config):
        assert self.fits(config) and self.judge(config).right, "timed before it was right"
        return self._cost(config)

    def final_times(self, configs):
        self.final = list(configs)
        return [self._cost(config) for config in configs]


def of_columns(n, **changes):
    return {**STOCK, "BLOCK_SIZE_N": n, **changes}


class TestSearch:
    SPACE = [of_columns(n) for n in (32, 64, 128, 256)]

    def search(self, gpu, space=None, **options):
        return best_for(gpu, STOCK, space or self.SPACE, lambda config: (), **options)

    def test_the_fastest_of_what_is_right_wins(self):
        def cost(config):
            return config["BLOCK_SIZE_N"]

        gpu = Gpu(cost, wrong=[of_columns(32)])
        found = self.search(gpu, did_not_fit=5)
        assert (found.config, found.tuned_us, found.default_us) == (of_columns(64), 64, 128)
        assert (found.tried, found.wrong, found.did_not_fit, found.complete) == (4, 1, 5, True)
        found = self.search(Gpu(cost, wrong=[of_columns(32)], too_large=[of_columns(64)]))
        assert (found.config, found.did_not_fit) == (STOCK, 1)

    def test_a_gain_below_the_noise_leaves_the_default(self):
        found = self.search(Gpu(lambda config: 100 - (config["BLOCK_SIZE_N"] == 64)))
        assert (found.config, found.tuned_us) == (STOCK, 100)

    def test_a_wrong_default_is_left_even_for_something_slower(self):
        found = self.search(Gpu(lambda config: abs(config["BLOCK_SIZE_N"] - 128), wrong=[STOCK]))
        assert found.config == of_columns(64) and not found.default_is_right
        assert found.default_error is None

    def test_only_the_best_are_timed_against_the_default_with_other_groups(self):
        def cost(config):
            return config["BLOCK_SIZE_N"] + config["GROUP_SIZE_M"]

        gpu = Gpu(cost)
        space = [of_columns(2**power) for power in range(4, 12)]
        found = best_for(gpu, STOCK, space, lambda config: [{**config, "GROUP_SIZE_M": 1}])
        assert found.config == of_columns(16, GROUP_SIZE_M=1)
        assert gpu.final[0] == STOCK and len(gpu.final) == 1 + FINALISTS
        assert found.tried == len(space) + FINALISTS

    def test_when_time_is_up_the_best_so_far_is_kept_as_incomplete(self):
        left = iter([False, False, True])
        found = self.search(Gpu(lambda config: config["BLOCK_SIZE_N"]),
                            time_is_up=lambda: next(left))  # fmt: skip
        assert (found.config, found.tried, found.complete) == (of_columns(32), 2, False)
        assert self.search(Gpu(lambda config: 1), time_is_up=lambda: True) is None


def nearest(table, m):
    """vLLM's rule: the first of the nearest."""
    return table[min(table, key=lambda x: abs(x - m))]


@pytest.mark.parametrize("tuned", [(1,), (1, 2, 4), (8,), (1, 9), (5, 6), (64,), (16, 4096)])
def test_a_table_says_nothing_of_what_was_not_tuned(tuned):
    mine = {m: of_columns(32, num_warps=8) for m in tuned}
    table = fenced(mine, STOCK)
    assert {m: table[m] for m in tuned} == mine
    beyond = () if max(tuned) >= 4096 else (*range(max(tuned) + 1, 200), 4096, 8192)
    for m in (*range(1, min(tuned)), *beyond):
        assert nearest(table, m) == default_config(STOCK, m), m
    assert nearest(table, 10**6) == (STOCK if beyond else mine[max(tuned)])


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with DeepSeek V4's config.json and two FP8 layers of small size."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensors = {}
    for name in ("layers.0.attn.wq_a", "layers.0.attn.wkv", "layers.0.attn.wo_b"):
        weight = torch.zeros(256, 128).to(torch.float8_e4m3fn)
        tensors[f"{name}.weight"] = weight
        tensors[f"{name}.scale"] = torch.zeros(2, 1)
    tensors["layers.0.ffn.gate.weight"] = torch.zeros(4, 128)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def made_up_gpu(monkeypatch, tmp_path):
    """A GPU on which fewer columns are faster, and BLOCK_SIZE_N 32 is wrong; counts its trials."""
    from vllm_sm12x.tune import measure
    from vllm_sm12x.vllm_api import fp8_configs

    trials = []

    class Linear:
        def __init__(self, n, k, block):
            self.n, self.k = n, k

    class Trial(Gpu):
        def __init__(self, linear, m, limit):
            super().__init__(lambda config: config["BLOCK_SIZE_N"] + m)
            trials.append((linear.n, linear.k, m))

        def judge(self, config):
            right = config["BLOCK_SIZE_N"] != 32
            return Judgement(1e-3 if right else 0.5, right)

    monkeypatch.setattr(device, "first_visible_device", lambda: RTX)
    monkeypatch.setattr(measure, "shared_memory", lambda: device.SM12X_SHARED_MEMORY_BYTES)
    monkeypatch.setattr(measure, "Linear", Linear)
    monkeypatch.setattr(measure, "GpuTrial", Trial)
    monkeypatch.setattr(fp8_configs, "device_name", lambda: RTX.name)
    monkeypatch.setenv("VLLM_CONFIG_ROOT", str(tmp_path / "config"))
    monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER", raising=False)
    return trials


def tuned(model, **options):
    console = Console(width=200, record=True, file=io.StringIO())
    assert run_tune(str(model), console=console, **options) == 0
    return console.export_text()


class TestRun:
    def test_files_are_for_vllms_own_reader(self, checkpoint, made_up_gpu, tmp_path):
        from vllm.model_executor.layers.quantization.utils import fp8_utils

        # vLLM reads from a folder `configs` beside the module.
        folder = tmp_path / "configs"
        text = tuned(checkpoint, out=folder, ms="1,4,64")
        assert f"VLLM_TUNED_CONFIG_FOLDER={folder}" in text
        reader = fp8_utils.get_w8a8_block_fp8_configs.__wrapped__
        there = {
            **vars(fp8_utils),
            "__file__": str(tmp_path / "fp8_utils.py"),
            "get_device_name_as_file_name": lambda: RTX_NAME,
        }
        table = FunctionType(reader.__code__, there)(512, 128, 128, 128)
        assert table == read_table(folder / file_name(RTX_NAME, 512, 128, 128, 128), 128)
        # The made-up GPU's best, of what is right there.
        assert [table[m]["BLOCK_SIZE_N"] for m in (1, 4, 64)] == [64, 64, 64]
        assert table[65]["BLOCK_SIZE_M"] == 64

    def test_a_second_run_goes_on_where_the_first_stopped(
        self, checkpoint, made_up_gpu, monkeypatch, tmp_path
    ):
        whole = records_module.write_whole
        written = []

        def stop_after_three(path, content):
            if len(written) == 6:  # two files each
                raise KeyboardInterrupt
            whole(path, content)
            written.append(path)

        monkeypatch.setattr(records_module, "write_whole", stop_after_three)
        console = Console(file=io.StringIO())
        assert run_tune(str(checkpoint), ms="1,2", console=console) == 130
        monkeypatch.setattr(records_module, "write_whole", whole)
        assert made_up_gpu == [(512, 128, 1), (512, 128, 2), (256, 128, 1), (256, 128, 2)]
        made_up_gpu.clear()
        text = tuned(checkpoint, ms="1,2")
        assert made_up_gpu == [(256, 128, 2)] and "3 of 4 are there" in text
        files = list((tmp_path / "config").rglob("*.json"))
        assert len(files) == 4 and not list((tmp_path / "config").rglob("*.part"))
        made_up_gpu.clear()
        tuned(checkpoint, ms="1,2", resume=False)
        assert len(made_up_gpu) == 4

    def test_other_versions_are_measured_anew(self, checkpoint, made_up_gpu, tmp_path):
        tuned(checkpoint, ms="1", shape="512x128")
        (notes,) = (tmp_path / "config").rglob("measured/*.json")
        content = json.loads(notes.read_text())
        content["made_with"]["triton"] = "1.0"
        notes.write_text(json.dumps(content))
        tuned(checkpoint, ms="1", shape="512x128")
        assert made_up_gpu == [(512, 128, 1)] * 2

    def test_the_table_says_what_was_gained_and_left_out(self, checkpoint, made_up_gpu):
        text = tuned(checkpoint, ms="1", shape="512x128")
        (row,) = [line.split() for line in text.splitlines() if line.split()[:2] == ["512", "128"]]
        assert row[2:6] == ["1", "129.0", "65.0", "1.98x"]
        space, too_large = candidates(1, BLOCK, device.SM12X_SHARED_MEMORY_BYTES)
        of_32 = sum(config["BLOCK_SIZE_N"] == 32 for config in space)
        assert row[6:9] == [str(len(space)), str(too_large), str(of_32)]
        assert "VLLM_TUNED_CONFIG_FOLDER" not in text

    def test_no_time_tries_nothing_and_writes_nothing(self, checkpoint, made_up_gpu, tmp_path):
        assert "The time was up" in tuned(checkpoint, ms="1", time_limit=0)
        assert not made_up_gpu and not list(tmp_path.rglob("N=*.json"))


def refusal(*arguments):
    result = CliRunner().invoke(cli.app, ["tune", *map(str, arguments)])
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.strip().splitlines()
    return line


class TestCommand:
    @pytest.fixture(autouse=True)
    def without_gpu(self, monkeypatch, tmp_path):
        monkeypatch.setattr(device, "first_visible_device", lambda: NoDevice("no driver"))
        monkeypatch.setenv("VLLM_CONFIG_ROOT", str(tmp_path / "config"))
        monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER", raising=False)

    def test_estimate_needs_no_gpu_and_writes_nothing(self, checkpoint, tmp_path):
        result = CliRunner().invoke(cli.app, ["tune", str(checkpoint), "--estimate", "--m", "1,64"])
        assert result.exit_code == 0, result.output
        words = result.stdout.split()
        assert "attn.fused_wqa_wkv" in words and "attn.wo_b" in words
        tried = [candidates(m, BLOCK, device.SM12X_SHARED_MEMORY_BYTES) for m in (1, 64)]
        assert str(sum(len(space) for space, _ in tried)) in words
        folder = tmp_path / "config" / "vllm_sm12x" / "fp8_linear"
        assert str(folder / file_name("<this GPU>", 512, 128, 128, 128)) in " ".join(words)
        assert not folder.exists()

    def test_the_users_own_folder_comes_first(self, checkpoint, monkeypatch, tmp_path):
        monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path / "mine"))
        result = CliRunner().invoke(cli.app, ["tune", str(checkpoint), "--estimate"])
        assert str(tmp_path / "mine") in result.stdout

    def test_no_gpu(self, checkpoint):
        assert "needs an NVIDIA GPU" in refusal(checkpoint)
        assert "no driver" in refusal(checkpoint)

    def test_an_old_gpu(self, checkpoint, monkeypatch):
        old = Device("NVIDIA A100", (8, 0), 2**30, "580")
        monkeypatch.setattr(device, "first_visible_device", lambda: old)
        assert "NVIDIA A100 is SM 8.0" in refusal(checkpoint)

    def test_no_such_model(self, tmp_path, monkeypatch):
        empty = tmp_path / "empty"
        empty.mkdir()
        assert "config.json" in refusal(empty)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert "nobody/nothing is neither a folder nor a model" in refusal("nobody/nothing")

    def test_a_model_without_block_scaled_layers(self, checkpoint):
        (checkpoint / "config.json").write_text(json.dumps({"hidden_size": 64}))
        assert "names no weight_block_size" in refusal(checkpoint)
        (checkpoint / "config.json").write_text(json.dumps(CONFIG))
        save_file({"a.weight": torch.zeros(2, 2)}, checkpoint / "model.safetensors")
        assert "no tensor of dtype F8_E4M3" in refusal(checkpoint)

    def test_a_damaged_file(self, checkpoint):
        (checkpoint / "model.safetensors").write_bytes(b"not this")
        assert "is no checkpoint that can be read" in refusal(checkpoint)

    @pytest.mark.parametrize("ms", ["", "0", "1,x", "-1", "65537"])
    def test_bad_numbers_of_rows(self, checkpoint, ms):
        assert "allowed are integers from 1 to 65536" in refusal(checkpoint, "--m", ms)

    def test_a_shape_that_the_model_does_not_have(self, checkpoint):
        assert "allowed is 512x128, 256x128" in refusal(checkpoint, "--shape", "5x5")

    def test_a_folder_that_cannot_be_written(self, checkpoint, monkeypatch, tmp_path):
        monkeypatch.setattr(device, "first_visible_device", lambda: RTX)
        (tmp_path / "file").write_text("")
        assert "cannot be written to" in refusal(checkpoint, "--out", tmp_path / "file")


def test_compressed_tensors_name_their_blocks(checkpoint):
    weights = {"weights": {"block_structure": [128, 128]}}
    quantization = {"config_groups": {"group_0": weights}}
    (checkpoint / "config.json").write_text(
        json.dumps({"text_config": {"quantization_config": quantization}})
    )
    assert read_model(str(checkpoint)).block == (128, 128)


def test_notes_that_are_damaged_are_measured_anew(tmp_path):
    path = tmp_path / "N=1.json"
    records = Records(path, {"gpu": "x"})
    records.add(1, Measured(STOCK, 1.0, 2.0, None, False, 3, 0, 1, True), STOCK)
    again = Records(path, {"gpu": "x"})
    again.read()
    assert again.by_m == records.by_m
    (tmp_path / "measured" / "N=1.json").write_text('{"made_with": {"gpu": "x"}, "by_m": [')
    again.read()
    assert again.by_m == {}


def test_a_result_is_right_only_within_rounding():
    from vllm_sm12x.tune.measure import judgement

    oracle = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    rounded = oracle.to(torch.bfloat16)
    assert judgement(rounded, oracle).right
    assert judgement(rounded, oracle).error == pytest.approx(1.7e-3, rel=0.1)
    for wrong in (float("nan"), 0.2):
        # A single element, as at the edge of a tile.
        broken = rounded.clone()
        broken[17, 3] = broken[17, 3] + wrong
        assert not judgement(broken, oracle).right
    assert not judgement(rounded * 1.01, oracle).right


@pytest.mark.parametrize("optional", [True, False])
def test_a_worker_goes_on_without_a_row_that_only_brings_speed(monkeypatch, optional):
    from vllm_sm12x import changes
    from vllm_sm12x.changes import attention, fp8_tuning
    from vllm_sm12x.changes.change import Outcome, State
    from vllm_sm12x.integration import selection

    (row,) = fp8_tuning.ROWS
    assert row.optional
    moved = Outcome(dataclasses.replace(row, optional=optional), State.DRIFTED, "it moved")
    monkeypatch.setattr(changes, "apply_all", lambda phase: (moved,))
    monkeypatch.setattr(selection, "choose", lambda config: mock.Mock(ours=True, why="SM12x"))
    monkeypatch.setattr(selection, "serves", lambda config: True)
    if optional:
        attention.settle_before_model(None)
    else:
        with pytest.raises(RuntimeError, match="fp8_linear.configs is drifted: it moved"):
            attention.settle_before_model(None)

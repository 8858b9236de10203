# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of vLLM's own block-scaled FP8 GEMM, on the made-up host."""

import json

import pytest

pytestmark = pytest.mark.contract

# Every M in decode's and small prefill's range, then around powers of 2, as they come.
MS = (*range(1, 300), *(2**i + j for i in range(9, 14) for j in (-1, 0, 1)))
MAX_Q = "NVIDIA_RTX_PRO_6000_Blackwell_Max-Q_Workstation_Edition"
OF_MAX_Q = {"BLOCK_SIZE_M": 32, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1,
            "num_warps": 4, "num_stages": 4}  # fmt: skip
OF_USER = {**OF_MAX_Q, "BLOCK_SIZE_N": 32}
SHAPES = {"untuned": (1536, 4096), "user": (512, 256), "sibling": (512, 384), "broken": (512, 640)}

PROBE = """
import dataclasses, json, logging, os
from pathlib import Path
from types import FunctionType
from unittest import mock
import torch
from vllm import envs
from vllm.model_executor.layers.quantization.utils import fp8_utils
from vllm_sm12x.changes import fp8_tuning
from vllm_sm12x.changes.change import Applied, Context, Phase
from vllm_sm12x.integration import fp8_config_files as files
from vllm_sm12x.vllm_api import fp8_configs as api

# vLLM's logger does not pass records on, and some releases configure it late: listen here.
said = []
class Ear(logging.Handler):
    def emit(self, record):
        said.append([record.levelname, record.getMessage()])
logging.getLogger("vllm").addHandler(Ear())
logging.getLogger("vllm").setLevel(logging.INFO)

(row,) = fp8_tuning.ROWS
row = dataclasses.replace(row, requires=())
stock_look_up = fp8_utils.get_w8a8_block_fp8_configs

class Kernel:
    # Where vLLM's function launches: what it launches with.
    def __getitem__(self, grid):
        return lambda *arguments, **config: setattr(self, "config", config)

def launched(n, k, ms):
    # vLLM's own function, from its arguments to the launch.
    found = []
    with mock.patch.object(fp8_utils, "_w8a8_triton_block_scaled_mm", Kernel()) as kernel:
        for m in ms:
            fp8_utils.w8a8_triton_block_scaled_mm(
                torch.empty(m, k, dtype=torch.float8_e4m3fn, device="meta"),
                torch.empty(n, k, dtype=torch.float8_e4m3fn, device="meta"),
                torch.empty(m, k // 128, device="meta"),
                torch.empty(n // 128, k // 128, device="meta"),
                [128, 128], torch.bfloat16)
            found.append(kernel.config)
    return found

facts = {"stock": launched(*SHAPES["untuned"], MS)}
facts["stock said"] = list(said)
name = files.as_in_file_names(GPU)
folder = files.user_folders()[-1]
folder.mkdir(parents=True, exist_ok=True)
write = lambda device, kind, text: (
    folder / files.file_name(device, *SHAPES[kind], 128, 128)).write_text(text)
write(name, "user", json.dumps({"1": OF_USER}))
write(MAX_Q, "user", json.dumps({"1": OF_MAX_Q}))
write(MAX_Q, "sibling", json.dumps({"1": OF_MAX_Q}))
write(name, "broken", json.dumps({"1": {**OF_USER, "BLOCK_SIZE_K": 256}}))

applied = Applied([row])
(outcome,) = applied.apply_all(Phase.WORKER, Context.detect())
facts["state"] = [outcome.state.value, outcome.detail]
said.clear()
facts["ours"] = launched(*SHAPES["untuned"], MS)
for kind in ("user", "sibling", "broken"):
    facts[kind] = launched(*SHAPES[kind], [1, 4096])
launched(1536, 8192, [1])
launched(1536, 8192, [1])
facts["said"] = list(said)

# A file of vLLM's own for this GPU, as a release may ship it: found by vLLM's own code.
shipped = Path(os.environ["VLLM_CONFIG_ROOT"]) / "as_shipped" / "configs"
shipped.mkdir(parents=True)
(shipped / files.file_name(name, 512, 896, 128, 128)).write_text(json.dumps({"1": OF_USER}))
with mock.patch.object(fp8_utils, "__file__", str(shipped.parent / "fp8_utils.py")):
    facts["shipped"] = launched(512, 896, [1, 4096])
    reader = stock_look_up.__wrapped__
    # Written by us, read by vLLM's own reader.
    facts["read by vLLM"] = {str(m): c for m, c in reader(512, 896, 128, 128).items()}
    facts["read by us"] = {
        str(m): c for m, c in files.read_table(next(shipped.iterdir()), 128).items()}
applied.undo_all()
facts["undone"] = fp8_utils.get_w8a8_block_fp8_configs is stock_look_up
facts["after"] = launched(*SHAPES["untuned"], MS)

def state(**environment):
    with mock.patch.dict(os.environ, environment):
        again = Applied([row])
        (outcome,) = again.apply_all(Phase.WORKER, Context.detect())
        again.undo_all()
    return [outcome.state.value, outcome.detail]

facts["batch invariant"] = state(VLLM_BATCH_INVARIANT="1")
with mock.patch.object(api, "launched_config", lambda *arguments: {"BLOCK_SIZE_M": 16}):
    facts["not needed"] = state()
with mock.patch.dict(os.environ, {"VLLM_TUNED_CONFIG_FOLDER": "/somewhere"}):
    facts["folders"] = [str(one) for one in files.user_folders()]
facts["name"] = files.file_name(name, *SHAPES["untuned"], 128, 128)
answer(facts)
"""


@pytest.fixture(scope="module")
def facts(host):
    from conftest import RTX_PRO_6000

    names = {"MS": MS, "SHAPES": SHAPES, "MAX_Q": MAX_Q, "OF_MAX_Q": OF_MAX_Q, "OF_USER": OF_USER,
             "GPU": RTX_PRO_6000}  # fmt: skip
    given = "\n".join(f"{name} = {value!r}" for name, value in names.items())
    return host(f"{given}\n{PROBE}").answer


def test_up_to_8_rows_take_small_tiles_and_more_rows_what_vllm_takes(facts):
    """For every M, by vLLM's own choice of the nearest entry."""
    assert facts["state"][0] == "active", facts["state"]
    for m, ours, stock in zip(MS, facts["ours"], facts["stock"], strict=True):
        small = {"BLOCK_SIZE_M": 16, "num_stages": 3}
        assert ours == ({**stock, **small} if m <= 8 else stock), m


def test_without_the_row_one_row_takes_64(facts):
    """The day that this fails, the row can retire."""
    assert facts["stock"][0]["BLOCK_SIZE_M"] == 64
    assert facts["undone"] and facts["after"] == facts["stock"]


def test_files_of_the_user_win_and_a_siblings_file_comes_before_the_default(facts):
    assert facts["user"] == [OF_USER, OF_USER]
    assert facts["sibling"] == [OF_MAX_Q, OF_MAX_Q]
    assert facts["folders"][0] == "/somewhere" and len(facts["folders"]) == 2


def test_a_file_of_vllms_own_for_this_gpu_is_left_to_vllm(facts):
    assert facts["shipped"] == [OF_USER, OF_USER]


def test_the_format_is_vllms(facts):
    assert facts["read by vLLM"] == facts["read by us"] == {"1": OF_USER}
    (missed,) = [text for _, text in facts["stock said"] if "Config file not found" in text]
    assert missed.endswith(f"/configs/{facts['name']}")


def test_a_file_that_would_give_wrong_results_is_left_out_in_words(facts):
    assert facts["broken"][0]["BLOCK_SIZE_M"] == 16
    (warning,) = [text for level, text in facts["said"] if level == "WARNING"]
    assert "BLOCK_SIZE_K 256" in warning and "divisors of 128" in warning


def test_each_kind_of_answer_is_said_once(facts):
    infos = [text for level, text in facts["said"] if level == "INFO"]
    assert len(infos) == 3, json.dumps(infos, indent=1)
    assert "no tuned file for NVIDIA_RTX_PRO_6000_Blackwell_Workstation_Edition" in infos[0]
    assert "N=512, K=256" in infos[1]
    assert MAX_Q in infos[2] and "same silicon" in infos[2]


def test_one_configuration_for_all_batches_is_left_alone(facts):
    assert facts["batch invariant"][0] == "off"
    assert "VLLM_BATCH_INVARIANT" in facts["batch invariant"][1]


def test_a_vllm_whose_default_fits_is_left_alone(facts):
    assert facts["not needed"] == [
        "not needed",
        "vLLM's own default for one row is BLOCK_SIZE_M 16",
    ]

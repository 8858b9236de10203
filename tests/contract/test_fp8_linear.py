# SPDX-License-Identifier: Apache-2.0
"""UE8M0 weight scales in vLLM's own FP8 linear kernels, on the made-up host."""

import pytest

pytestmark = pytest.mark.contract

CONVERT = """
import dataclasses
import torch
from vllm_sm12x.changes import model
from vllm_sm12x.changes.change import Applied, Context, Phase
from vllm.model_executor.kernels.linear.scaled_mm.cutlass import CutlassFp8BlockScaledMMKernel

(row,) = (row for row in model.ROWS if row.name == "fp8_linear.scales")
row = dataclasses.replace(row, requires=())

def after_loading(scale, name):
    # A layer of 256 x 128 weights as the kernel leaves it.
    layer = torch.nn.Module()
    weight = torch.ones(256, 128).to(torch.float8_e4m3fn)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    setattr(layer, name, torch.nn.Parameter(scale, requires_grad=False))
    layer.weight_block_size = [128, 128]
    kernel = CutlassFp8BlockScaledMMKernel.__new__(CutlassFp8BlockScaledMMKernel)
    kernel.process_weights_after_loading(layer)
    found = getattr(layer, name)
    return [str(found.dtype), found.float().flatten().tolist(), type(found).__name__]

def both():
    powers = torch.tensor([[0.25], [8.0]])
    return {
        "ue8m0": after_loading(powers.to(torch.float8_e8m0fnu), "weight_scale_inv"),
        "ue8m0, other name": after_loading(powers.to(torch.float8_e8m0fnu), "weight_scale"),
        "fp32": after_loading(powers * 3, "weight_scale_inv"),
    }

stock = both()
applied = Applied([row])
(outcome,) = applied.apply_all(Phase.WORKER, Context.detect())
ours = both()
applied.undo_all()
answer({"stock": stock, "ours": ours, "undone": both(), "state": outcome.state.value})
"""


@pytest.fixture(scope="module")
def scales(host):
    return host(CONVERT).answer


@pytest.mark.parametrize("name", ["ue8m0", "ue8m0, other name"])
def test_ue8m0_scales_become_fp32_of_the_same_value(scales, name):
    assert scales["state"] == "active"
    assert scales["ours"][name] == ["torch.float32", [0.25, 8.0], "Parameter"]


def test_fp32_scales_are_left_alone(scales):
    assert scales["ours"]["fp32"] == scales["stock"]["fp32"]
    assert scales["ours"]["fp32"][:2] == ["torch.float32", [0.75, 24.0]]


def test_without_the_row_cutlass_is_handed_ue8m0(scales):
    """The day that this fails, the row can retire."""
    assert scales["stock"]["ue8m0"][0] == "torch.float8_e8m0fnu"
    assert scales["undone"] == scales["stock"]

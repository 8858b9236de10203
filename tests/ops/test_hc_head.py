# SPDX-License-Identifier: Apache-2.0
"""hc_head against its oracle and vLLM's plain torch: interpreter on a CPU, native on a GPU."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sm12x.ops.hc_head import hc_head
from vllm_sm12x.ops.hc_head.reference import hc_head_reference
from vllm_sm12x.ops.hc_head.spec import HC_HEAD, HcHeadShape, hc_head_inputs
from vllm_sm12x.ops.hc_pre.arguments import STREAM_COUNTS

pytestmark = pytest.mark.usefixtures("poisoned_allocations")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(inputs: dict, want: torch.Tensor | None = None) -> None:
    out = hc_head(**inputs)
    want = hc_head_reference(**inputs) if want is None else want
    assert out.dtype == torch.bfloat16 and out.shape == want.shape
    assert not out.isnan().any(), "an output element was not written"
    error = ((out.float() - want).norm() / want.norm().clamp_min(1e-30)).item()
    assert error <= HC_HEAD.tolerance, HC_HEAD.tolerance_reason


@pytest.mark.parametrize("shape", HC_HEAD.small, ids=str)
def test_small_shapes(shape):
    check(hc_head_inputs(shape, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", HC_HEAD.full, ids=str)
def test_model_shapes(shape):
    check(hc_head_inputs(shape, device=DEVICE))


@settings(max_examples=25)
@given(
    shape=st.builds(
        HcHeadShape,
        tokens=st.integers(1, 20),
        width=st.integers(1, 300),
        streams=st.sampled_from(STREAM_COUNTS),
    ),
    seed=st.integers(0, 1000),
)
def test_any_shape(shape, seed):
    check(hc_head_inputs(shape, device=DEVICE, seed=seed))


@pytest.mark.parametrize("tokens, width", [(1, 64), (6, 300)])
def test_it_is_the_input_that_vllm_computes_in_torch(tokens, width):
    """mhc_pre_torch mixes a layer's input with the same gates: the first hc rows of its fn."""
    stock = pytest.importorskip(
        "vllm.model_executor.kernels.mhc.torch", reason="vLLM's plain torch is the oracle"
    )
    inputs = hc_head_inputs(HcHeadShape(tokens, width=width), device=DEVICE, seed=3)
    inputs["rms_eps"], inputs["hc_eps"] = 1e-2, 2e-2
    fn = torch.cat([inputs["fn"], inputs["fn"].new_zeros(20, 4 * width)])
    scale, base = torch.zeros(3, device=DEVICE), torch.zeros(24, device=DEVICE)
    scale[0], base[:4] = inputs["scale"][0], inputs["base"]
    _, _, want = stock.mhc_pre_torch(inputs["hs"], fn, scale, base, 1e-2, 2e-2, 0.1, 1.0, 1)
    check(inputs, want.float())


@pytest.mark.parametrize("apart", [0, 24], ids=["tokens", "tokens and streams"])
def test_strided_streams(apart):
    inputs = hc_head_inputs(HcHeadShape(5, width=40), device=DEVICE)
    want = hc_head(**inputs)
    storage = torch.full((9, 7, 40 + apart), math.nan, device=DEVICE).bfloat16()
    inputs["hs"] = storage[1:6, 2:6, :40].copy_(inputs["hs"])
    error = (hc_head(**inputs).float() - want.float()).norm() / want.float().norm()
    assert error.item() <= 2**-9


def test_addresses_beyond_two_gib():
    """The last token's streams lie past 2^31 elements of the storage."""
    inputs = hc_head_inputs(HcHeadShape(3, width=16), device=DEVICE)
    want = hc_head(**inputs)
    stride = 2**30 + 64
    torch.use_deterministic_algorithms(False)  # not to fill this much memory with NaN
    storage = torch.empty(2 * stride + 64, dtype=torch.bfloat16, device=DEVICE)
    far = storage.as_strided((3, 4, 16), (stride, 16, 1))
    far.copy_(inputs["hs"])
    assert torch.equal(hc_head(**{**inputs, "hs": far}), want)


BAD = {
    "hs dims": ({"hs": lambda t: t[0]}, ValueError, r"hs: expected \[T, hc, d\]"),
    "hs dtype": ({"hs": lambda t: t.float()}, TypeError, "hs: expected dtype torch.bfloat16"),
    "streams": ({"hs": lambda t: t[:, :3]}, ValueError, "hc of 1, 2, 4, 8"),
    "fn": ({"fn": lambda t: t[:, :99]}, ValueError, r"fn: expected \[4, 400\], got \[4, 99\]"),
    "fn dtype": ({"fn": lambda t: t.bfloat16()}, TypeError, "fn: expected dtype torch.float32"),
    "scale": ({"scale": lambda t: t.repeat(3)}, ValueError, r"scale: expected \[1\], got \[3\]"),
    "base": ({"base": lambda t: t[:3]}, ValueError, r"base: expected \[4\], got \[3\]"),
    "device": ({"base": lambda t: t.to("meta")}, ValueError, "base: expected device"),
}


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(change, error, message):
    inputs = hc_head_inputs(HcHeadShape(3, width=100), device=DEVICE)
    for name, alter in change.items():
        inputs[name] = alter(inputs[name])
    with pytest.raises(error, match=message):
        hc_head(**inputs)

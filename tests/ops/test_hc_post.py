# SPDX-License-Identifier: Apache-2.0
"""hc_post against its oracle and vLLM's plain torch: interpreter on a CPU, native on a GPU."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sm12x.ops.hc_post import hc_post
from vllm_sm12x.ops.hc_post.config import CONFIGS, choose
from vllm_sm12x.ops.hc_post.reference import hc_post_reference
from vllm_sm12x.ops.hc_post.spec import HC_POST, HcPostShape, hc_post_inputs
from vllm_sm12x.ops.hc_pre.arguments import STREAM_COUNTS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(inputs: dict) -> None:
    out = torch.full_like(inputs["residual"], math.nan)
    assert hc_post(**inputs, out=out) is out
    want = hc_post_reference(**inputs)
    assert not out.isnan().any(), "an output element was not written"
    error = ((out.float() - want).norm() / want.norm().clamp_min(1e-30)).item()
    assert error <= HC_POST.tolerance, HC_POST.tolerance_reason


@pytest.mark.parametrize("shape", HC_POST.small, ids=str)
def test_small_shapes(shape):
    check(hc_post_inputs(shape, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", HC_POST.full, ids=str)
def test_model_shapes(shape):
    check(hc_post_inputs(shape, device=DEVICE))


@settings(max_examples=30)
@given(
    shape=st.builds(
        HcPostShape,
        tokens=st.integers(1, 12),
        width=st.integers(1, 2100),
        streams=st.sampled_from(STREAM_COUNTS),
    ),
    seed=st.integers(0, 1000),
)
def test_any_shape(shape, seed):
    check(hc_post_inputs(shape, device=DEVICE, seed=seed))


@settings(max_examples=20)
@given(
    padding=st.lists(st.integers(0, 9), min_size=5, max_size=5),
    tokens=st.integers(1, 5),
    width=st.integers(1, 300),
)
def test_strided_inputs_and_output(padding, tokens, width):
    """Rows further apart than they are long, in every tensor; nothing between them is touched."""
    inputs = hc_post_inputs(HcPostShape(tokens, width=width), device=DEVICE)
    want = hc_post(**inputs)
    inputs["out"] = torch.zeros_like(want)
    storages = {}
    for (name, tensor), extra in zip(inputs.items(), padding, strict=True):
        wide = [size + extra for size in tensor.shape]
        storages[name] = torch.full(wide, 1e6, device=DEVICE).to(tensor.dtype)
        inner = tuple(slice(0, size) for size in tensor.shape)
        inputs[name] = storages[name][inner].copy_(tensor)
    hc_post(**inputs)
    error = (inputs["out"].float() - want.float()).norm() / want.float().norm()
    assert error.item() <= 2**-9
    inputs["out"].fill_(1e6)
    assert (storages["out"] == storages["out"].flatten()[0]).all()


@pytest.mark.parametrize("tokens, width", [(1, 64), (6, 1100)])
def test_it_is_what_vllm_computes_in_torch(tokens, width):
    stock = pytest.importorskip(
        "vllm.model_executor.kernels.mhc.torch", reason="vLLM's plain torch is the oracle"
    )
    inputs = hc_post_inputs(HcPostShape(tokens, width=width), device=DEVICE, seed=3)
    x, residual, post, comb = inputs.values()
    want = stock.mhc_post_torch(x, residual, post[..., None], comb).float()
    error = ((hc_post(**inputs).float() - want).norm() / want.norm()).item()
    assert error <= HC_POST.tolerance, HC_POST.tolerance_reason


def test_permutation_moves_streams_exactly():
    """comb_mix[k, j] sends stream k to stream j: a wrong order of its axes shows."""
    inputs = hc_post_inputs(HcPostShape(2, width=70), device=DEVICE)
    target = [2, 0, 3, 1]
    inputs["comb_mix"] = torch.eye(4, device=DEVICE)[target].expand(2, 4, 4).contiguous()
    inputs["post_mix"] = torch.zeros(2, 4, device=DEVICE)
    out = hc_post(**inputs)
    for source, stream in enumerate(target):
        assert torch.equal(out[:, stream], inputs["residual"][:, source])


def test_addresses_beyond_two_gib():
    """The last token's streams lie past 2^31 elements of the residual's storage."""
    inputs = hc_post_inputs(HcPostShape(3, width=16), device=DEVICE)
    stride = 2**30 + 64
    storage = torch.empty(2 * stride + 64, dtype=torch.bfloat16, device=DEVICE)
    far = storage.as_strided((3, 4, 16), (stride, 16, 1))
    far.copy_(inputs["residual"])
    assert torch.equal(hc_post(**{**inputs, "residual": far}), hc_post(**inputs))


def test_few_tokens_take_the_small_tile():
    assert choose(1, 4096, sms=188) is CONFIGS[1]
    assert choose(47, 4096, sms=188) is CONFIGS[0]
    assert choose(1, 1, sms=1) is CONFIGS[0]


BAD = {
    "residual dims": ({"residual": lambda t: t[0]}, ValueError, r"residual: expected \[T, hc, d\]"),
    "streams": ({"residual": lambda t: t[:, :3]}, ValueError, "hc of 1, 2, 4, 8"),
    "width": (
        {"residual": lambda t: t.new_empty(3, 4, 16385)},
        ValueError,
        "d from 1 to 16384, got 16385",
    ),
    "residual dtype": ({"residual": lambda t: t.float()}, TypeError, "residual: expected dtype"),
    "x": ({"x": lambda t: t[:, :99]}, ValueError, r"x: expected \[3, 100\], got \[3, 99\]"),
    "x dtype": ({"x": lambda t: t.half()}, TypeError, "x: expected dtype torch.bfloat16"),
    "post_mix": ({"post_mix": lambda t: t[..., None]}, ValueError, r"post_mix: expected \[3, 4\]"),
    "comb_mix": ({"comb_mix": lambda t: t[:2]}, ValueError, r"comb_mix: expected \[3, 4, 4\]"),
    "comb_mix rows": (
        {"comb_mix": lambda t: t.transpose(1, 2)},
        ValueError,
        "comb_mix: expected contiguous rows",
    ),
    "out": ({"out": lambda _: torch.empty(3, 100)}, TypeError, "out: expected dtype"),
    "device": ({"x": lambda t: t.to("meta")}, ValueError, "x: expected device"),
}


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(change, error, message):
    inputs = hc_post_inputs(HcPostShape(3, width=100), device=DEVICE)
    for name, alter in change.items():
        inputs[name] = alter(inputs.get(name))
    with pytest.raises(error, match=message):
        hc_post(**inputs)

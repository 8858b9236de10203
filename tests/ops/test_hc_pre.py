# SPDX-License-Identifier: Apache-2.0
"""hc_pre against its oracle and vLLM's plain torch: interpreter on a CPU, native on a GPU."""

import importlib
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sm12x.ops.hc_pre import hc_pre
from vllm_sm12x.ops.hc_pre.arguments import STREAM_COUNTS
from vllm_sm12x.ops.hc_pre.config import CONFIGS
from vllm_sm12x.ops.hc_pre.reference import hc_pre_reference
from vllm_sm12x.ops.hc_pre.spec import HC_PRE, HcPreShape, hc_pre_inputs
from vllm_sm12x.ops.hc_prenorm_gemm import hc_prenorm_gemm

pytestmark = pytest.mark.usefixtures("poisoned_allocations")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIXES_TOLERANCE = 1e-5  # fp32 on both sides: a few 1e-7, after 20 iterations
# A GPU rounds where the interpreter truncates.
INPUT_TOLERANCE = HC_PRE.tolerance / (4 if DEVICE == "cuda" else 1)
module = importlib.import_module("vllm_sm12x.ops.hc_pre")


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    assert not got.isnan().any(), "an output element was not written"
    return ((got.float() - want.float()).norm() / want.float().norm().clamp_min(1e-30)).item()


def check(inputs: dict) -> None:
    post, comb, layer_input = hc_pre(**inputs)
    want_post, want_comb, want_input = hc_pre_reference(**{**inputs, "expanded": None})
    assert post.dtype == comb.dtype == torch.float32 and layer_input.dtype == torch.bfloat16
    for got, want in ((post, want_post), (comb, want_comb)):
        assert relative_error(got, want) <= MIXES_TOLERANCE
    assert relative_error(layer_input, want_input) <= INPUT_TOLERANCE, HC_PRE.tolerance_reason
    if inputs["expanded"] is not None:
        hc = post.shape[1]
        assert torch.equal(inputs["expanded"], inputs["residual"][:, None].repeat(1, hc, 1))


@pytest.mark.parametrize("shape", HC_PRE.small, ids=str)
def test_small_shapes(shape):
    check(hc_pre_inputs(shape, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", HC_PRE.full, ids=str)
def test_model_shapes(shape):
    check(hc_pre_inputs(shape, device=DEVICE))


@settings(max_examples=40)
@given(
    shape=st.builds(
        HcPreShape,
        tokens=st.integers(1, 20),
        width=st.integers(1, 300),
        streams=st.sampled_from(STREAM_COUNTS),
        splits=st.integers(1, 70),
        norm=st.booleans(),
        same=st.booleans(),
    ),
    config=st.sampled_from(CONFIGS),
    iterations=st.integers(1, 20),
    seed=st.integers(0, 1000),
)
def test_any_shape_in_any_configuration(shape, config, iterations, seed):
    inputs = hc_pre_inputs(shape, device=DEVICE, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "choose", lambda splits: config)
        check({**inputs, "sinkhorn_iters": iterations})


@settings(max_examples=20)
@given(
    padding=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    same=st.booleans(),
    tokens=st.integers(2, 6),
)
def test_strided_inputs(padding, same, tokens):
    """Rows further apart than they are long, in every tensor that has rows."""
    shape = HcPreShape(tokens, width=40, splits=3, same=same)
    inputs = hc_pre_inputs(shape, device=DEVICE)
    want = hc_pre(**inputs)
    for name, extra in zip(("parts", "sqrsum", "residual", "expanded"), padding, strict=True):
        tensor = inputs[name]
        if tensor is not None:
            wide = [size + extra for size in tensor.shape]
            storage = torch.full(wide, math.nan, device=DEVICE).to(tensor.dtype)
            inputs[name] = storage[tuple(slice(0, size) for size in tensor.shape)].copy_(tensor)
    for got, expected, bound in zip(hc_pre(**inputs), want, (1e-6, 1e-6, 2**-9), strict=True):
        assert relative_error(got, expected) <= bound
    if same:
        assert torch.equal(inputs["expanded"], inputs["residual"][:, None].repeat(1, 4, 1))


def model_inputs(tokens: int, width: int, *, seed: int = 0) -> dict:
    """A residual and the parameters of a layer, with logits of a few units."""
    gen = torch.Generator(device=DEVICE).manual_seed(seed)
    hc, cells = 4, 24

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=gen, device=DEVICE)

    return {
        "residual": (normal(tokens, hc, width) * 3).bfloat16(),
        "fn": normal(cells, hc * width) * 2 / (hc * width) ** 0.5,
        "scale": normal(3) / 4 + 1,
        "base": normal(cells),
        "norm_weight": (normal(width) / 4 + 1).bfloat16(),
    }


@pytest.mark.parametrize("tokens, width", [(1, 64), (7, 200), (3, 4096)])
@pytest.mark.parametrize("norm", [False, True])
def test_with_the_gemm_it_is_what_vllm_computes_in_torch(tokens, width, norm):
    """Different constants everywhere, so that none can stand in for another."""
    stock = pytest.importorskip(
        "vllm.model_executor.kernels.mhc.torch", reason="vLLM's plain torch is the oracle"
    )
    given_ = model_inputs(tokens, width)
    residual, scale, base = given_["residual"], given_["scale"], given_["base"]
    weight = given_["norm_weight"]
    constants = (1e-2, 2e-2, 3e-2, 1.7, 5)
    want_post, want_comb, want_input = stock.mhc_pre_torch(
        residual, given_["fn"], scale, base, *constants
    )
    if norm:
        normed = torch.nn.functional.rms_norm(want_input.float(), (width,), eps=0.1)
        want_input = normed * weight.float()
    rms_eps, pre_eps, sinkhorn_eps, post_mult, iterations = constants
    post, comb, layer_input = hc_pre(
        *hc_prenorm_gemm(residual.flatten(1), given_["fn"]),
        scale,
        base,
        residual,
        rms_eps=rms_eps,
        pre_eps=pre_eps,
        sinkhorn_eps=sinkhorn_eps,
        post_mult=post_mult,
        sinkhorn_iters=iterations,
        norm_weight=weight if norm else None,
        norm_eps=0.1,
    )
    assert relative_error(post, want_post.squeeze(-1)) <= MIXES_TOLERANCE
    assert relative_error(comb, want_comb) <= MIXES_TOLERANCE
    assert relative_error(layer_input, want_input) <= INPUT_TOLERANCE, HC_PRE.tolerance_reason


def test_a_residual_that_is_the_same_in_all_streams():
    """[T, d] with fn summed over the streams is [T, hc, d] of copies with fn as it is."""
    given_ = model_inputs(5, 96)
    row = given_["residual"][:, 0].contiguous()
    copies = row[:, None].repeat(1, 4, 1)
    settings_ = {
        "rms_eps": 1e-6,
        "pre_eps": 1e-6,
        "sinkhorn_eps": 1e-6,
        "post_mult": 2.0,
        "sinkhorn_iters": 20,
        "norm_weight": given_["norm_weight"],
    }
    rest = (given_["scale"], given_["base"])
    want = hc_pre(*hc_prenorm_gemm(copies.flatten(1), given_["fn"]), *rest, copies, **settings_)
    folded = given_["fn"].view(24, 4, 96).sum(1)
    expanded = torch.empty_like(copies)
    got = hc_pre(*hc_prenorm_gemm(row, folded), *rest, row, expanded=expanded, **settings_)
    assert torch.equal(expanded, copies)
    for ours, theirs, bound in zip(got, want, (1e-5, 1e-5, INPUT_TOLERANCE), strict=True):
        assert relative_error(ours, theirs) <= bound


def test_sinkhorn_iterations_converge():
    """Rows and columns of comb_mix sum to 1 in the end: mixing streams neither adds nor loses."""
    inputs = hc_pre_inputs(HcPreShape(9, width=16, splits=2), device=DEVICE)
    _, comb, _ = hc_pre(**{**inputs, "sinkhorn_iters": 300})
    for dim in (1, 2):
        torch.testing.assert_close(comb.sum(dim), torch.ones_like(comb[..., 0]), atol=1e-3, rtol=0)


def test_addresses_beyond_two_gib():
    """The last token's streams lie past 2^31 elements of the residual's storage."""
    inputs = hc_pre_inputs(HcPreShape(3, width=16), device=DEVICE)
    want = hc_pre(**inputs)
    stride = 2**30 + 64
    torch.use_deterministic_algorithms(False)  # not to fill this much memory with NaN
    storage = torch.empty(2 * stride + 64, dtype=torch.bfloat16, device=DEVICE)
    far = storage.as_strided((3, 4, 16), (stride, 16, 1))
    far.copy_(inputs["residual"])
    for got, expected in zip(hc_pre(**{**inputs, "residual": far}), want, strict=True):
        assert torch.equal(got, expected)


def test_same_inputs_give_the_same_bits():
    inputs = hc_pre_inputs(HcPreShape(6, width=100, splits=9), device=DEVICE)
    for first, second in zip(hc_pre(**inputs), hc_pre(**inputs), strict=True):
        assert torch.equal(first, second)


def test_large_logits_stay_finite():
    inputs = hc_pre_inputs(HcPreShape(3, width=16), device=DEVICE)
    inputs["parts"] = inputs["parts"] * 1e4
    post, comb, layer_input = hc_pre(**inputs)
    assert all(result.isfinite().all() for result in (post, comb, layer_input))
    torch.testing.assert_close(comb.sum(1), torch.ones_like(post), atol=1e-4, rtol=0)


BAD = {
    "parts dims": ({"parts": lambda t: t[0]}, ValueError, r"parts: expected \[S, T, hc"),
    "parts cells": ({"parts": lambda t: t[..., :23]}, ValueError, "hc of 1, 2, 4, 8, got"),
    "parts splits": ({"parts": lambda t: t[:0]}, ValueError, "S of at least 1"),
    "parts dtype": ({"parts": lambda t: t.half()}, TypeError, "parts: expected dtype torch.float"),
    "sqrsum": ({"sqrsum": lambda t: t[:, :1]}, ValueError, r"sqrsum: expected \[2, 3\]"),
    "scale": ({"scale": lambda t: t[:2]}, ValueError, r"scale: expected \[3\], got \[2\]"),
    "base": ({"base": lambda t: t[:9]}, ValueError, r"base: expected \[24\], got \[9\]"),
    "base dtype": ({"base": lambda t: t.bfloat16()}, TypeError, "base: expected dtype"),
    "residual dims": ({"residual": lambda t: t[0, 0]}, ValueError, r"residual: expected \[3, 4, d"),
    "residual streams": (
        {"residual": lambda t: t[:, :2]},
        ValueError,
        r"residual: expected \[3, 4",
    ),
    "residual dtype": ({"residual": lambda t: t.float()}, TypeError, "residual: expected dtype"),
    "residual rows": (
        {"residual": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)},
        ValueError,
        "residual: expected contiguous rows",
    ),
    "width": (
        {"residual": lambda t: t.new_empty(3, 4, 16385)},
        ValueError,
        r"d from 1 to 16384, got \[3, 4, 16385\]",
    ),
    "norm": ({"norm_weight": lambda t: t[:9]}, ValueError, r"norm_weight: expected \[100\]"),
    "norm dtype": ({"norm_weight": lambda t: t.float()}, TypeError, "norm_weight: expected dtype"),
    "expanded": (
        {"expanded": lambda _: torch.empty(3, 4, 100)},
        ValueError,
        "expanded: expected None",
    ),
    "iterations": ({"sinkhorn_iters": lambda _: 0}, ValueError, "at least 1, got 0"),
    "device": ({"scale": lambda t: t.to("meta")}, ValueError, "scale: expected device"),
}


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(change, error, message):
    inputs = hc_pre_inputs(HcPreShape(3, width=100, splits=2), device=DEVICE)
    for name, alter in change.items():
        inputs[name] = alter(inputs[name])
    with pytest.raises(error, match=message):
        hc_pre(**inputs)


def test_expanded_takes_the_shape_of_the_streams():
    inputs = hc_pre_inputs(replace(HcPreShape(3, width=100), same=True), device=DEVICE)
    inputs["expanded"] = inputs["expanded"][:, :3]
    with pytest.raises(ValueError, match=r"expanded: expected \[3, 4, 100\], got \[3, 3, 100\]"):
        hc_pre(**inputs)

# SPDX-License-Identifier: Apache-2.0
"""fp8_einsum against its fp32 oracle: interpreter on a CPU, native on a GPU."""

import importlib
import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sm12x.ops import fp8_einsum
from vllm_sm12x.ops.fp8_einsum.config import CONFIGS, LaunchPlan, choose
from vllm_sm12x.ops.fp8_einsum.reference import fp8_einsum_reference
from vllm_sm12x.ops.fp8_einsum.spec import FP8_EINSUM, Fp8EinsumShape, fp8_einsum_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# By import_module: the package's attribute of that name is the function.
module = importlib.import_module("vllm_sm12x.ops.fp8_einsum")


def nan_output(inputs: dict) -> torch.Tensor:
    tokens, groups, _ = inputs["a"].shape
    size = (tokens, groups, inputs["b"].shape[1])
    return torch.full(size, math.nan, dtype=torch.bfloat16, device=DEVICE)


def check(inputs: dict) -> None:
    """Run into NaN-poisoned output and compare with the oracle."""
    out = nan_output(inputs)
    got = fp8_einsum(**inputs, out=out)
    want = fp8_einsum_reference(**inputs)
    assert got is out
    assert not got.isnan().any(), "an output element was not written"
    error = ((got.float() - want).norm() / want.norm().clamp_min(1e-30)).item()
    print(f"relative error {error:.2e}")
    # The interpreter truncates to bf16 where a GPU rounds.
    tolerance = FP8_EINSUM.tolerance if out.is_cuda else 2**-7
    assert error <= tolerance, FP8_EINSUM.tolerance_reason


def exact_inputs(tokens: int, groups: int, cols: int, depth: int) -> dict:
    """Values and scales whose results are whole numbers up to 256: exact in bf16, in any order."""
    gen = torch.Generator(device=DEVICE).manual_seed(tokens + depth)

    def sparse(*size: int) -> torch.Tensor:
        values = torch.randint(-1, 2, size, generator=gen, device=DEVICE).float()
        keep = torch.rand(size[-1], generator=gen, device=DEVICE) < 32 / size[-1]
        return (values * keep).to(torch.float8_e4m3fn)

    def scales(*size: int) -> torch.Tensor:
        return torch.randint(1, 3, size, generator=gen, device=DEVICE).float()

    return {
        "a": sparse(tokens, groups, depth),
        "a_scale": scales(tokens, groups, depth // 128),
        "b": sparse(groups, cols, depth),
        "b_scale": scales(groups, -(-cols // 128), depth // 128),
    }


def check_far_addresses() -> None:
    """Last row of A, last group of B and last row of the output past 2^31 elements."""
    tokens, stride = 3, 2**30 + 128
    inputs = exact_inputs(tokens, 2, 16, 128)
    storage = torch.empty(2 * stride + 256, dtype=torch.float8_e4m3fn, device=DEVICE)
    far_a = storage.as_strided((tokens, 2, 128), (stride, 128, 1))
    far_a.copy_(inputs["a"])
    want = fp8_einsum_reference(**inputs)
    assert torch.equal(fp8_einsum(**{**inputs, "a": far_a}).float(), want)
    far_b = storage.as_strided((2, 16, 128), (2 * stride - 2048, 128, 1))
    far_b.copy_(inputs["b"])
    assert torch.equal(fp8_einsum(**{**inputs, "b": far_b}).float(), want)
    storage = torch.empty(2 * stride + 32, dtype=torch.bfloat16, device=DEVICE)
    far_out = storage.as_strided((tokens, 2, 16), (stride, 16, 1))
    far_out.fill_(math.nan)
    assert torch.equal(fp8_einsum(**inputs, out=far_out).float(), want)


@pytest.mark.parametrize("shape", FP8_EINSUM.small, ids=str)
def test_small_shapes(shape):
    check(fp8_einsum_inputs(shape, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", FP8_EINSUM.full, ids=str)
def test_model_shapes(shape):
    check(fp8_einsum_inputs(shape, device=DEVICE))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("splits, steps", [(1, 5), (3, 2)])
def test_every_tile_and_split_is_exact_on_whole_numbers(config, splits, steps):
    inputs = exact_inputs(19, 2, 150, 640)
    plan = LaunchPlan(config, splits, steps)
    with mock.patch.object(module, "choose", return_value=plan):
        got = fp8_einsum(**inputs, out=nan_output(inputs))
    want = fp8_einsum_reference(**inputs)
    assert want.abs().max() <= 256 and want.any()
    assert torch.equal(got.float(), want)


@settings(max_examples=25)
@given(
    shape=st.builds(
        Fp8EinsumShape,
        tokens=st.integers(1, 40),
        groups=st.integers(1, 4),
        cols=st.integers(1, 140),
        depth=st.integers(1, 9).map(lambda steps: 128 * steps),
        a_scale=st.sampled_from(["fp32", "e8m0", "uint8"]),
        b_scale=st.sampled_from(["fp32", "e8m0", "uint8"]),
        transposed=st.booleans(),
    ),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_scale_form(shape, seed):
    check(fp8_einsum_inputs(shape, device=DEVICE, seed=seed))


@given(
    tokens=st.integers(1, 9000),
    groups=st.integers(1, 16),
    cols=st.integers(1, 4096),
    steps=st.integers(1, 64),
    sms=st.sampled_from([8, 48, 132, 170, 188]),
)
def test_a_plan_covers_every_k_step_once(tokens, groups, cols, steps, sms):
    plan = choose(tokens, groups, cols, steps, sms=sms)
    shares = [
        range(split * plan.steps_per_split, min((split + 1) * plan.steps_per_split, steps))
        for split in range(plan.num_splits)
    ]
    assert all(shares), "a split without work"
    assert [step for share in shares for step in share] == list(range(steps))


@pytest.mark.parametrize("form", ["e8m0", "uint8"])
def test_e8m0_scales_give_the_bits_of_the_same_fp32_scales(form):
    def run(scales: str, **kwargs) -> torch.Tensor:
        shape = Fp8EinsumShape(5, 2, 140, 384, a_scale=scales, b_scale=scales, **kwargs)
        return fp8_einsum(**fp8_einsum_inputs(shape, device=DEVICE))

    assert torch.equal(run(form), run("fp32"))
    assert torch.equal(run(form, transposed=True), run("fp32"))


@pytest.mark.parametrize("exponent, value", [(0, 2.0**-127), (1, 2.0**-126), (254, 2.0**127)])
def test_extreme_e8m0_exponents(exponent, value):
    """A's scale is extreme and B's brings the product back into range."""
    inputs = exact_inputs(2, 1, 16, 128)
    back = torch.full_like(inputs["b_scale"], 1 / value if exponent > 1 else 2.0**126)
    inputs |= {"a_scale": torch.full_like(inputs["a_scale"], value), "b_scale": back}
    want = fp8_einsum_reference(**inputs)
    inputs["a_scale"] = torch.full_like(inputs["a_scale"], exponent, dtype=torch.uint8)
    assert want.any()
    assert torch.equal(fp8_einsum(**inputs).float(), want)


def test_an_e8m0_nan_reaches_its_row_only():
    inputs = fp8_einsum_inputs(Fp8EinsumShape(3, 1, 8, 256, a_scale="uint8"), device=DEVICE)
    inputs["a_scale"][1, 0, 1] = 255
    nan = fp8_einsum(**inputs).isnan()
    assert nan[1].all() and not nan[0].any() and not nan[2].any()


def test_strided_values_and_output():
    inputs = fp8_einsum_inputs(Fp8EinsumShape(4, 3, 40, 256), device=DEVICE)
    want = fp8_einsum(**inputs)
    for name in ("a", "b"):
        tensor = inputs[name]
        wide = torch.zeros(
            tensor.shape[1],
            tensor.shape[0],
            tensor.shape[2] + 48,
            dtype=tensor.dtype,
            device=DEVICE,
        )
        inputs[name] = wide.transpose(0, 1)[..., 16:-32]
        inputs[name].copy_(tensor)
    wide_out = torch.full((4, 5, 60), math.nan, dtype=torch.bfloat16, device=DEVICE)
    out = wide_out[:, 1:4, 7:47]
    fp8_einsum(**inputs, out=out)
    assert torch.equal(out, want)
    out.fill_(math.nan)
    assert wide_out.isnan().all(), "wrote outside its output"


def test_addresses_beyond_two_gib():
    check_far_addresses()


def test_same_inputs_give_the_same_bits():
    inputs = fp8_einsum_inputs(Fp8EinsumShape(2, 1, 40, 2048), device=DEVICE)
    assert choose(2, 1, 40, 16, sms=8).num_splits > 1
    assert torch.equal(fp8_einsum(**inputs), fp8_einsum(**inputs))


BAD = {
    "a dtype": ("a", lambda t: t.float(), TypeError, "a: expected dtype torch.float8_e4m3fn"),
    "a dims": ("a", lambda t: t[0], ValueError, r"a: expected \[T, G, R\]"),
    "a depth": ("a", lambda t: t[..., :200], ValueError, "a: expected R a positive multiple"),
    "a rows": ("a", lambda t: t.mT.contiguous().mT, ValueError, "a: expected contiguous rows"),
    "b dtype": ("b", lambda t: t.bfloat16(), TypeError, "b: expected dtype"),
    "b groups": ("b", lambda t: t[:1], ValueError, r"b: expected \[2, D, 256\]"),
    "a_scale dtype": ("a_scale", lambda t: t.half(), TypeError, "a_scale: expected dtype"),
    "a_scale packed": ("a_scale", lambda t: t.int(), TypeError, "a_scale: expected dtype"),
    "a_scale shape": (
        "a_scale",
        lambda t: t[..., :1],
        ValueError,
        r"a_scale: expected \[3, 2, 2\]",
    ),
    "b_scale shape": ("b_scale", lambda t: t[:, :1], ValueError, r"b_scale: expected \[2, 2, 2\]"),
    "out dtype": ("out", lambda t: t.float(), TypeError, "out: expected dtype torch.bfloat16"),
    "out shape": ("out", lambda t: t[:2], ValueError, r"out: expected \[3, 2, 130\]"),
    "device": ("b_scale", lambda t: t.to("meta"), ValueError, "b_scale: expected device"),
}


@pytest.mark.parametrize("name, alter, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_named_before_anything_is_written(name, alter, error, message):
    inputs = fp8_einsum_inputs(Fp8EinsumShape(3, 2, 130, 256), device=DEVICE)
    inputs["out"] = out = nan_output(inputs)
    inputs[name] = alter(inputs[name])
    with pytest.raises(error, match=message):
        fp8_einsum(**inputs)
    assert out.isnan().all()

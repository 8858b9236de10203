# SPDX-License-Identifier: Apache-2.0
"""hc_prenorm_gemm against fp32 and fp64 oracles: interpreter on a CPU, native on a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sm12x.ops import hc_prenorm_gemm
from vllm_sm12x.ops.hc_prenorm_gemm.config import splits_of
from vllm_sm12x.ops.hc_prenorm_gemm.reference import hc_prenorm_gemm_reference
from vllm_sm12x.ops.hc_prenorm_gemm.spec import (
    HC_PRENORM_GEMM,
    HcPrenormGemmShape,
    hc_prenorm_gemm_inputs,
)

pytestmark = pytest.mark.usefixtures("poisoned_allocations")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Where a GPU rounds to bf16 (2^-9 for each of two terms), the interpreter truncates (2^-7); the
# other bit is the tensor core's, which truncates the sum of both products.
TERMS = 2**-17 if DEVICE == "cuda" else 2**-14
TOLERANCE = HC_PRENORM_GEMM.tolerance if DEVICE == "cuda" else TERMS


def sums(inputs: dict) -> list[torch.Tensor]:
    """The op's results [T, N] and [T], after a look at its parts."""
    parts = hc_prenorm_gemm(**inputs)
    tokens, rows = inputs["x"].shape[0], inputs["fn"].shape[0]
    splits = inputs["num_splits"] or parts[0].shape[0]
    assert parts[0].shape == (splits, tokens, rows) and parts[1].shape == (splits, tokens)
    for part in parts:
        assert part.dtype == torch.float32
        assert not part.isnan().any(), "an output element was not written"
    return [part.sum(0) for part in parts]


def check(inputs: dict) -> None:
    for total, want in zip(sums(inputs), hc_prenorm_gemm_reference(**inputs), strict=True):
        error = ((total - want[0]).norm() / want.norm().clamp_min(1e-30)).item()
        print(f"relative error {error:.2e}")
        assert error <= TOLERANCE, HC_PRENORM_GEMM.tolerance_reason


@pytest.mark.parametrize("shape", HC_PRENORM_GEMM.small, ids=str)
def test_small_shapes(shape):
    check(hc_prenorm_gemm_inputs(shape, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", HC_PRENORM_GEMM.full, ids=str)
def test_model_shapes(shape):
    check(hc_prenorm_gemm_inputs(shape, device=DEVICE))


@settings(max_examples=25)
@given(
    shape=st.builds(
        HcPrenormGemmShape,
        tokens=st.integers(1, 70),
        depth=st.integers(1, 700),
        rows=st.integers(1, 32),
        splits=st.integers(0, 14),
    ),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_number_of_splits(shape, seed):
    inputs = hc_prenorm_gemm_inputs(shape, device=DEVICE, seed=seed)
    # Of what is summed: where it cancels out, a small shape's result is as small as its error.
    x, fn = inputs["x"].double(), inputs["fn"].double()
    out, squares = sums(inputs)
    assert ((out - x @ fn.T).abs() <= TERMS * (x.abs() @ fn.abs().T)).all()
    torch.testing.assert_close(squares.double(), x.square().sum(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("tokens", [1, 40])
def test_products_keep_two_bf16_terms_of_fn(tokens):
    """One term a sum, x a power of two: fn must come out, where a tf32 dot is 2^-11 off."""
    gen = torch.Generator(device=DEVICE).manual_seed(0)
    fn = torch.randn(24, 64, generator=gen, device=DEVICE) * 10.0 ** torch.randint(
        -20, 20, (24, 64), generator=gen, device=DEVICE
    )
    x = torch.zeros(tokens, 64, device=DEVICE)
    column = torch.arange(tokens, device=DEVICE)
    x[column, column] = 2.0 ** (column % 7)
    out, sqrsum = hc_prenorm_gemm(x.to(torch.bfloat16), fn, num_splits=1)
    want = fn.T[:tokens] * x.amax(1, keepdim=True)
    torch.testing.assert_close(out[0], want, rtol=TERMS, atol=0)
    assert torch.equal(sqrsum[0], x.amax(1).square())


def test_error_against_fp64_is_a_hundredth_of_tf32s():
    inputs = hc_prenorm_gemm_inputs(HcPrenormGemmShape(4, depth=4096), device=DEVICE)
    x, fn = inputs["x"].double(), inputs["fn"].double()
    out, sqrsum = hc_prenorm_gemm(**inputs)
    exact = x @ fn.T
    error = ((out.double().sum(0) - exact).norm() / exact.norm()).item()
    print(f"relative error {error:.2e}")
    assert error <= TERMS
    torch.testing.assert_close(sqrsum.double().sum(0), x.square().sum(1), rtol=1e-6, atol=0)


def test_a_split_without_a_share_of_k_is_zero():
    inputs = hc_prenorm_gemm_inputs(HcPrenormGemmShape(3, depth=128, splits=9), device=DEVICE)
    out, sqrsum = hc_prenorm_gemm(**inputs)
    assert (out[1:] == 0).all() and (sqrsum[1:] == 0).all()
    assert out[0].any() and sqrsum[0].all()


def test_strided_inputs():
    inputs = hc_prenorm_gemm_inputs(HcPrenormGemmShape(5, depth=200, splits=2), device=DEVICE)
    want = hc_prenorm_gemm(**inputs)
    for name in ("x", "fn"):
        wide = torch.full((len(inputs[name]), 300), 1e6, device=DEVICE).to(inputs[name].dtype)
        wide[:, 64:264] = inputs[name]
        inputs[name] = wide[:, 64:264]
    for got, expected in zip(hc_prenorm_gemm(**inputs), want, strict=True):
        assert torch.equal(got, expected)


def test_addresses_beyond_two_gib():
    """The last token's row lies past 2^31 elements of x's storage."""
    inputs = hc_prenorm_gemm_inputs(HcPrenormGemmShape(3, depth=64), device=DEVICE)
    stride = 2**30 + 64
    # Not torch.empty: filling this much with NaN would take the machine's memory.
    torch.use_deterministic_algorithms(False)
    storage = torch.empty(2 * stride + 64, dtype=torch.bfloat16, device=DEVICE)
    far = storage.as_strided((3, 64), (stride, 1))
    far.copy_(inputs["x"])
    for got, want in zip(
        hc_prenorm_gemm(far, inputs["fn"]), hc_prenorm_gemm(**inputs), strict=True
    ):
        assert torch.equal(got, want)


def test_same_inputs_give_the_same_bits():
    inputs = hc_prenorm_gemm_inputs(HcPrenormGemmShape(20, depth=1000), device=DEVICE)
    for first, second in zip(hc_prenorm_gemm(**inputs), hc_prenorm_gemm(**inputs), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    "tokens, depth, splits",
    [(1, 16384, 128), (64, 16384, 128), (65, 4096, 32), (512, 16384, 94), (4096, 28672, 11)],
)
def test_splits_fill_the_gpu_and_leave_no_empty_share(tokens, depth, splits):
    """Worked by hand on 188 SMs: min(4 * 188 // ceil(T / tile), ceil(K / 64) // 2)."""
    assert splits_of(tokens, depth, sms=188) == splits


def test_no_tokens_and_few_multiprocessors_still_give_one_split():
    assert splits_of(0, 64, sms=188) == 1
    assert splits_of(10**6, 16384, sms=48) == 1


BAD = {
    "x dtype": ({"x": lambda t: t.float()}, TypeError, "x: expected dtype torch.bfloat16"),
    "x dims": ({"x": lambda t: t[0]}, ValueError, r"x: expected \[T, K\]"),
    "x empty": ({"x": lambda t: t[:, :0]}, ValueError, "K of at least 1"),
    "x rows": ({"x": lambda t: t.T.contiguous().T}, ValueError, "x: expected contiguous rows"),
    "fn dtype": ({"fn": lambda t: t.half()}, TypeError, "fn: expected dtype torch.float32"),
    "fn depth": ({"fn": lambda t: t[:, :99]}, ValueError, r"fn: expected \[N, 100\]"),
    "fn rows": ({"fn": lambda t: t.repeat(3, 1)}, ValueError, "N from 1 to 32"),
    "device": ({"fn": lambda t: t.to("meta")}, ValueError, "fn: expected device"),
    "splits": ({"num_splits": lambda _: 0}, ValueError, "num_splits: expected at least 1, got 0"),
}


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(change, error, message):
    inputs = hc_prenorm_gemm_inputs(HcPrenormGemmShape(2, depth=100), device=DEVICE)
    for name, alter in change.items():
        inputs[name] = alter(inputs[name])
    with pytest.raises(error, match=message):
        hc_prenorm_gemm(**inputs)

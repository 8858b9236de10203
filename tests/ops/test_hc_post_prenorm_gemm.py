# SPDX-License-Identifier: Apache-2.0
"""hc_post_prenorm_gemm against oracles and the two ops: interpreter on a CPU, native on a GPU."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sm12x.ops import hc_post, hc_post_prenorm_gemm, hc_prenorm_gemm
from vllm_sm12x.ops.hc_post_prenorm_gemm.config import splits_of
from vllm_sm12x.ops.hc_post_prenorm_gemm.reference import hc_post_prenorm_gemm_reference
from vllm_sm12x.ops.hc_post_prenorm_gemm.spec import (
    HC_POST_PRENORM_GEMM,
    HcPostPrenormGemmShape,
    hc_post_prenorm_gemm_inputs,
)

pytestmark = pytest.mark.usefixtures("poisoned_allocations")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of hc_prenorm_gemm: two bf16 terms of fn, which the interpreter truncates where a GPU rounds.
TERMS = 2**-17 if DEVICE == "cuda" else 2**-14
PRODUCTS = 1e-5 if DEVICE == "cuda" else TERMS
# A GPU contracts the sum over streams otherwise than hc_post's, and Triton 3.8 sums those in pairs.
ULP = 2**-7 if DEVICE == "cuda" else 0.0
POST = ("x", "residual", "post_mix", "comb_mix")
SHAPES = st.builds(
    HcPostPrenormGemmShape,
    tokens=st.integers(1, 70),
    width=st.integers(1, 260),
    streams=st.sampled_from([1, 2, 4]),
    rows=st.integers(1, 32),
    splits=st.integers(0, 14),
)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


def results(inputs: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The streams, and the sums [T, N] and [T] of the parts, after a look at them."""
    into = torch.full_like(inputs["residual"], math.nan)
    streams, out, sqrsum = hc_post_prenorm_gemm(**inputs, streams=into)
    assert streams is into
    tokens, rows = len(inputs["x"]), len(inputs["fn"])
    splits = inputs["num_splits"] or out.shape[0]
    assert out.shape == (splits, tokens, rows) and sqrsum.shape == (splits, tokens)
    assert out.dtype == sqrsum.dtype == torch.float32
    for result in (streams, out, sqrsum):
        assert not result.isnan().any(), "an output element was not written"
    return streams, out.sum(0), sqrsum.sum(0)


def assert_as_by_hc_post(streams: torch.Tensor, inputs: dict) -> None:
    want = hc_post(*(inputs[name] for name in POST))
    if DEVICE == "cpu":
        assert torch.equal(streams, want)
    else:
        # A sum that cancels out has the error of its terms.
        torch.testing.assert_close(streams.float(), want.float(), rtol=ULP, atol=1e-6)


def check(inputs: dict) -> None:
    streams, out, squares = results(inputs)
    assert_as_by_hc_post(streams, inputs)
    wanted = hc_post_prenorm_gemm_reference(**inputs)
    assert relative(streams, wanted[0]) <= HC_POST_PRENORM_GEMM.tolerance
    # The products are of the streams that were written, to the last of their bits.
    rows = streams.flatten(1).double()
    assert relative(out, rows @ inputs["fn"].double().T) <= PRODUCTS
    assert relative(squares, rows.square().sum(1)) <= 1e-6
    for got, want in zip((out, squares), wanted[1:], strict=True):
        assert relative(got, want[0]) <= 2 * HC_POST_PRENORM_GEMM.tolerance


@pytest.mark.parametrize("shape", HC_POST_PRENORM_GEMM.small, ids=str)
def test_small_shapes(shape):
    check(hc_post_prenorm_gemm_inputs(shape, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", HC_POST_PRENORM_GEMM.full, ids=str)
def test_model_shapes(shape):
    check(hc_post_prenorm_gemm_inputs(shape, device=DEVICE))


@settings(max_examples=25)
@given(shape=SHAPES, seed=st.integers(0, 1000))
def test_any_shape_and_number_of_splits(shape, seed):
    inputs = hc_post_prenorm_gemm_inputs(shape, device=DEVICE, seed=seed)
    streams, out, squares = results(inputs)
    assert_as_by_hc_post(streams, inputs)
    # Of what is summed: where it cancels out, a small shape's result is as small as its error.
    rows, fn = streams.flatten(1).double(), inputs["fn"].double()
    assert ((out - rows @ fn.T).abs() <= TERMS * (rows.abs() @ fn.abs().T)).all()
    torch.testing.assert_close(squares.double(), rows.square().sum(1), rtol=1e-6, atol=0)


@settings(max_examples=15)
@given(shape=SHAPES, seed=st.integers(0, 1000))
def test_it_is_what_the_two_ops_compute(shape, seed):
    inputs = hc_post_prenorm_gemm_inputs(shape, device=DEVICE, seed=seed)
    streams, out, squares = results(inputs)
    products, norms = hc_prenorm_gemm(streams.flatten(1), inputs["fn"])
    rows, fn = streams.flatten(1).abs().float(), inputs["fn"].abs()
    assert ((out - products.sum(0)).abs() <= TERMS * (rows @ fn.T)).all()
    torch.testing.assert_close(squares, norms.sum(0), rtol=2e-6, atol=0)


@settings(max_examples=15)
@given(
    padding=st.lists(st.integers(0, 9), min_size=6, max_size=6),
    tokens=st.integers(1, 20),
    width=st.integers(1, 100),
)
def test_strided_inputs_and_output(padding, tokens, width):
    """Rows further apart than they are long, in every tensor; nothing between them is touched."""
    inputs = hc_post_prenorm_gemm_inputs(HcPostPrenormGemmShape(tokens, width=width), device=DEVICE)
    del inputs["num_splits"]
    want = hc_post_prenorm_gemm(**inputs)
    inputs["streams"] = torch.zeros_like(want[0])
    storages = {}
    for (name, tensor), extra in zip(inputs.items(), padding, strict=True):
        wide = [size + extra for size in tensor.shape]
        storages[name] = torch.full(wide, 1e6, device=DEVICE).to(tensor.dtype)
        inner = tuple(slice(0, size) for size in tensor.shape)
        inputs[name] = storages[name][inner].copy_(tensor)
    for got, expected in zip(hc_post_prenorm_gemm(**inputs), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=ULP, atol=ULP)
    inputs["streams"].fill_(1e6)
    assert (storages["streams"] == storages["streams"].flatten()[0]).all()


@pytest.mark.parametrize("far_axis", ["tokens", "streams"])
def test_addresses_beyond_two_gib(far_axis):
    """The last token, or the last stream, lies past 2^31 elements of the residual's storage."""
    inputs = hc_post_prenorm_gemm_inputs(HcPostPrenormGemmShape(3, width=16), device=DEVICE)
    stride = 2**30 + 64
    strides = (stride, 16, 1) if far_axis == "tokens" else (16, stride, 1)
    # Not torch.empty: filling this much with NaN would take the machine's memory.
    torch.use_deterministic_algorithms(False)
    storage = torch.empty(3 * stride + 64, dtype=torch.bfloat16, device=DEVICE)
    far = storage.as_strided((3, 4, 16), strides)
    far.copy_(inputs["residual"])
    moved = hc_post_prenorm_gemm(**{**inputs, "residual": far})
    for got, want in zip(moved, hc_post_prenorm_gemm(**inputs), strict=True):
        assert torch.equal(got, want)


def test_permutation_moves_streams_exactly():
    """comb_mix[k, j] sends stream k to stream j: a wrong order of its axes shows."""
    inputs = hc_post_prenorm_gemm_inputs(HcPostPrenormGemmShape(2, width=70), device=DEVICE)
    target = [2, 0, 3, 1]
    inputs["comb_mix"] = torch.eye(4, device=DEVICE)[target].expand(2, 4, 4).contiguous()
    inputs["post_mix"] = torch.zeros(2, 4, device=DEVICE)
    streams, *_ = hc_post_prenorm_gemm(**inputs)
    for source, stream in enumerate(target):
        assert torch.equal(streams[:, stream], inputs["residual"][:, source])


@pytest.mark.parametrize("tokens", [1, 20])
def test_products_keep_two_bf16_terms_of_fn(tokens):
    """One term a sum: fn must come out, where a tf32 dot is 2^-11 off."""
    inputs = hc_post_prenorm_gemm_inputs(HcPostPrenormGemmShape(tokens, width=32), device=DEVICE)
    inputs["comb_mix"].zero_()
    inputs["post_mix"].zero_()[:, 2] = 1.0
    column = torch.arange(tokens, device=DEVICE)
    inputs["x"].zero_()[column, column] = 2.0
    _, out, sqrsum = hc_post_prenorm_gemm(**{**inputs, "num_splits": 1})
    want = 2 * inputs["fn"][:, 64 : 64 + tokens].T
    torch.testing.assert_close(out[0], want, rtol=TERMS, atol=0)
    assert (sqrsum == 4).all()


def test_a_split_without_a_share_of_the_columns_is_zero():
    shape = HcPostPrenormGemmShape(3, width=32, splits=9)
    _, out, sqrsum = hc_post_prenorm_gemm(**hc_post_prenorm_gemm_inputs(shape, device=DEVICE))
    assert (out[1:] == 0).all() and (sqrsum[1:] == 0).all()
    assert out[0].any() and sqrsum[0].all()


def test_same_inputs_give_the_same_bits():
    inputs = hc_post_prenorm_gemm_inputs(HcPostPrenormGemmShape(20, width=250), device=DEVICE)
    again = hc_post_prenorm_gemm(**inputs)
    for first, second in zip(hc_post_prenorm_gemm(**inputs), again, strict=True):
        assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 100])
def test_a_graphs_replay_takes_the_inputs_of_its_time(tokens):
    shape = HcPostPrenormGemmShape(tokens)
    inputs = hc_post_prenorm_gemm_inputs(shape, device=DEVICE)
    hc_post_prenorm_gemm(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = hc_post_prenorm_gemm(**inputs)
    for name, tensor in hc_post_prenorm_gemm_inputs(shape, device=DEVICE, seed=7).items():
        if tensor is not None:
            inputs[name].copy_(tensor)
    graph.replay()
    for got, want in zip(captured, hc_post_prenorm_gemm(**inputs), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "tokens, width, splits",
    [(1, 4096, 128), (16, 7168, 224), (64, 4096, 94), (128, 4096, 47), (10**6, 4096, 1)],
)
def test_splits_fill_the_gpu_and_leave_no_empty_share(tokens, width, splits):
    """Worked by hand on 188 SMs: min(2 * 188 // ceil(T / 16), d // 32)."""
    assert splits_of(tokens, width, sms=188) == splits


def test_no_tokens_and_few_columns_still_give_one_split():
    assert splits_of(0, 16, sms=188) == splits_of(1, 1, sms=188) == 1


BAD = {
    "residual dims": ({"residual": lambda t: t[0]}, ValueError, r"residual: expected \[T, hc, d\]"),
    "streams": ({"residual": lambda t: t.repeat(1, 2, 1)}, ValueError, "hc of at most 4, got 8"),
    "residual dtype": ({"residual": lambda t: t.float()}, TypeError, "residual: expected dtype"),
    "x": ({"x": lambda t: t[:, :99]}, ValueError, r"x: expected \[3, 100\], got \[3, 99\]"),
    "x dtype": ({"x": lambda t: t.half()}, TypeError, "x: expected dtype torch.bfloat16"),
    "post_mix": ({"post_mix": lambda t: t[..., None]}, ValueError, r"post_mix: expected \[3, 4\]"),
    "comb_mix rows": (
        {"comb_mix": lambda t: t.transpose(1, 2)},
        ValueError,
        "comb_mix: expected contiguous rows",
    ),
    "fn dtype": ({"fn": lambda t: t.half()}, TypeError, "fn: expected dtype torch.float32"),
    "fn depth": ({"fn": lambda t: t[:, :99]}, ValueError, r"fn: expected \[24, 400\]"),
    "fn dims": ({"fn": lambda t: t[0]}, ValueError, r"fn: expected \[N, 400\]"),
    "fn rows": ({"fn": lambda t: t.repeat(3, 1)}, ValueError, "N from 1 to 32"),
    "fn device": ({"fn": lambda t: t.to("meta")}, ValueError, "fn: expected device"),
    "out": ({"streams": lambda _: torch.empty(3, 100)}, TypeError, "streams: expected dtype"),
    "splits": ({"num_splits": lambda _: 0}, ValueError, "num_splits: expected at least 1, got 0"),
}


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(change, error, message):
    inputs = hc_post_prenorm_gemm_inputs(HcPostPrenormGemmShape(3, width=100), device=DEVICE)
    for name, alter in change.items():
        inputs[name] = alter(inputs.get(name))
    with pytest.raises(error, match=message):
        hc_post_prenorm_gemm(**inputs)

# SPDX-License-Identifier: Apache-2.0
"""paged_mqa_logits against its fp32 oracle: interpreter on a CPU, native on a GPU."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from index_scores import assert_scores, magnitudes

from vllm_sm12x.ops import mqa_logits, paged_mqa_logits
from vllm_sm12x.ops.mqa_logits.reference import mqa_logits_reference
from vllm_sm12x.ops.paged_mqa_logits.config import choose, programs
from vllm_sm12x.ops.paged_mqa_logits.reference import paged_mqa_logits_reference
from vllm_sm12x.ops.paged_mqa_logits.spec import (
    PAGED_MQA_LOGITS,
    PagedMqaLogitsShape,
    pack_indexer_cache,
    paged_mqa_logits_inputs,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(inputs: dict) -> torch.Tensor:
    """Run into NaN-poisoned output and compare with the oracle."""
    rows = inputs["q"].shape[0] * inputs["q"].shape[1]
    out = torch.full((rows, inputs["max_model_len"]), math.nan, device=DEVICE)
    assert paged_mqa_logits(**inputs, out=out) is out
    assert_scores(
        out, paged_mqa_logits_reference(**inputs), magnitudes(paged_mqa_logits_reference, inputs)
    )
    return out


def paged(keys: torch.Tensor, scales: torch.Tensor, block_size: int) -> tuple:
    """A cache and a block table that hold `keys` back to front."""
    blocks = -(-len(keys) // block_size)
    all_keys = torch.zeros(blocks * block_size, 128, device=DEVICE).to(keys.dtype)
    all_scales = torch.zeros(blocks * block_size, device=DEVICE)
    all_keys[: len(keys)], all_scales[: len(keys)] = keys, scales
    cache = pack_indexer_cache(
        all_keys.view(blocks, block_size, 128).view(torch.uint8).flip(0).view(keys.dtype),
        all_scales.view(blocks, block_size).flip(0),
    )
    table = torch.arange(blocks, device=DEVICE, dtype=torch.int32).flip(0)[None].contiguous()
    return cache, table


@pytest.mark.parametrize("block_size", [2, 5, 64])
def test_pages_give_what_contiguous_keys_give(block_size):
    """Written without this op's oracle: the same keys by mqa_logits' oracle, and by mqa_logits."""
    gen = torch.Generator(device=DEVICE).manual_seed(0)
    context, heads = 150, 6
    keys = torch.randn(context, 128, generator=gen, device=DEVICE).to(torch.float8_e4m3fn)
    scales = torch.rand(context, generator=gen, device=DEVICE)
    q = torch.randn(1, 2, heads, 128, generator=gen, device=DEVICE).to(torch.float8_e4m3fn)
    weights = torch.randn(2, heads, generator=gen, device=DEVICE)
    cache, table = paged(keys, scales, block_size)
    lens = torch.tensor([context], dtype=torch.int32, device=DEVICE)
    got = paged_mqa_logits(q, cache, weights, lens, table, max_model_len=200)

    ks = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    ke = torch.tensor([context - 1, context], dtype=torch.int32, device=DEVICE)
    names = ("q", "k", "k_scale", "weights", "ks", "ke")
    arguments = dict(zip(names, (q[0], keys, scales, weights, ks, ke), strict=True))
    magnitude = magnitudes(mqa_logits_reference, arguments)
    assert_scores(got[:, :context], mqa_logits_reference(**arguments), magnitude)
    assert_scores(got[:, :context], mqa_logits(**arguments), magnitude)
    assert (got[:, context:] == -math.inf).all()


@pytest.mark.parametrize("shape", PAGED_MQA_LOGITS.small, ids=str)
def test_small_shapes(shape):
    check(paged_mqa_logits_inputs(shape, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", PAGED_MQA_LOGITS.full, ids=str)
def test_model_shapes(shape):
    check(paged_mqa_logits_inputs(shape, device=DEVICE))


@settings(max_examples=20)
@given(
    shape=st.builds(
        PagedMqaLogitsShape,
        requests=st.integers(1, 4),
        context=st.integers(1, 400),
        next_n=st.integers(1, 5),
        heads=st.integers(1, 128),
        columns=st.integers(1, 1500),
        block_size=st.sampled_from([1, 2, 3, 48, 64, 256]),
        lens=st.sampled_from(["full", "ragged", "rows"]),
        page_padding=st.sampled_from([0, 4, 64]),
    ),
    seed=st.integers(0, 1000),
)
def test_any_shape_length_and_page(shape, seed):
    check(paged_mqa_logits_inputs(shape, device=DEVICE, seed=seed))


def test_long_contexts_give_each_program_several_tiles():
    shape = PagedMqaLogitsShape(3, 4000, heads=2, columns=5000, lens="ragged", next_n=2)
    if DEVICE == "cpu":
        assert programs(choose(2, 16), 3, 5000, sms=8) * 64 < 4000
    check(paged_mqa_logits_inputs(shape, device=DEVICE))


def test_programs_are_bounded_by_the_gpu_and_not_by_the_model_length():
    for next_n in (1, 2, 3, 5):
        config = choose(next_n, 64)
        for requests in (1, 3, 100, 5000):
            most = max(1, config.programs_per_sm * 188 // requests)
            assert 1 <= programs(config, requests, 2**20, sms=188) <= most
        assert programs(config, 1, 60, sms=188) == 1


def test_a_short_context_in_a_million_columns():
    out = check(paged_mqa_logits_inputs(
        PagedMqaLogitsShape(1, 70, heads=2, columns=2**20 + 3, block_size=4096), device=DEVICE
    ))  # fmt: skip
    assert (out[0, 70:] == -math.inf).all()


@pytest.mark.parametrize("next_n", [1, 2])
def test_rows_without_context_are_all_minus_infinity(next_n):
    inputs = paged_mqa_logits_inputs(
        PagedMqaLogitsShape(3, 80, next_n=next_n, heads=2, columns=600), device=DEVICE
    )
    inputs["context_lens"] = torch.tensor([0, -1, 1], dtype=torch.int32, device=DEVICE)
    inputs["block_table"][:2] = -1
    out = check(inputs).view(3, next_n, 600)
    assert (out[:2] == -math.inf).all()
    assert (out[2].isfinite().sum(1) == torch.tensor([0] * (next_n - 1) + [1], device=DEVICE)).all()


def test_without_clean_logits_what_the_rows_see_is_the_same():
    inputs = paged_mqa_logits_inputs(
        PagedMqaLogitsShape(2, 90, next_n=3, heads=4, columns=700, lens="ragged"), device=DEVICE
    )
    want = paged_mqa_logits_reference(**inputs)
    got = paged_mqa_logits(**inputs, clean_logits=False)
    assert torch.equal(got[want.isfinite()], paged_mqa_logits(**inputs)[want.isfinite()])


def test_contexts_past_the_block_table_or_the_columns_are_cut():
    inputs = paged_mqa_logits_inputs(PagedMqaLogitsShape(2, 130, heads=3), device=DEVICE)
    inputs["context_lens"] = torch.tensor([2**31 - 1, 500], dtype=torch.int32, device=DEVICE)
    assert check(inputs).isfinite().all()
    inputs["block_table"] = inputs["block_table"][:, :1]
    assert (check(inputs)[:, 64:] == -math.inf).all()


def test_positions_past_the_context_do_not_matter():
    """Never-written rows hold any byte, NaN too; table entries past the context name no block."""
    inputs = paged_mqa_logits_inputs(PagedMqaLogitsShape(1, 250, heads=4), device=DEVICE)
    inputs["context_lens"][:] = 70
    want = paged_mqa_logits(**inputs)
    page = inputs["block_table"][0, 1].item()
    inputs["block_table"][0, 2:] = 2**31 - 1
    raw = inputs["cache"].as_strided((inputs["cache"].shape[0], 64 * 132), (64 * 132, 1))
    raw[page, 6 * 128 : 64 * 128] = 0x7F
    raw[page, 64 * 128 + 6 * 4 :] = 0xFF
    assert torch.equal(paged_mqa_logits(**inputs), want)
    assert want[0, :70].isfinite().all()


def test_strided_arguments_and_output():
    inputs = paged_mqa_logits_inputs(
        PagedMqaLogitsShape(2, 90, next_n=2, heads=3, lens="rows"), device=DEVICE
    )
    want = paged_mqa_logits_reference(**inputs)
    magnitude = magnitudes(paged_mqa_logits_reference, inputs)
    for name in ("q", "weights", "context_lens", "block_table"):
        tensor = inputs[name]
        wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 16, device=DEVICE)
        wide = wide.to(tensor.dtype)
        wide[..., : tensor.shape[-1]] = tensor
        inputs[name] = wide[..., : tensor.shape[-1]]
    out = torch.full((4, 110), math.nan, device=DEVICE)
    paged_mqa_logits(**inputs, out=out[:, 10:100])
    assert_scores(out[:, 10:100], want, magnitude)
    assert out[:, :10].isnan().all() and out[:, 100:].isnan().all(), "wrote past its columns"


def test_cache_addresses_beyond_32_bits():
    """A page whose byte offset does not fit 32 bits: int32 arithmetic would read elsewhere."""
    inputs = paged_mqa_logits_inputs(PagedMqaLogitsShape(1, 60, heads=2), device=DEVICE)
    small = inputs["cache"]
    page_bytes = 64 * 132
    pages = 2**32 // page_bytes + 2
    storage = torch.empty(pages * page_bytes, dtype=torch.uint8, device=DEVICE)
    storage[-page_bytes:] = small[inputs["block_table"][0, 0].item()].flatten()
    want = paged_mqa_logits_reference(**inputs)
    magnitude = magnitudes(paged_mqa_logits_reference, inputs)
    inputs["cache"] = storage.view(pages, 64, 1, 132)
    inputs["block_table"][:] = pages - 1
    assert_scores(paged_mqa_logits(**inputs), want, magnitude)


BAD = {
    "q dtype": ("q", lambda t: t.float(), TypeError, "q: expected dtype torch.float8_e4m3fn"),
    "q dims": ("q", lambda t: t[:, 0], ValueError, r"q: expected shape \[any, any, any, 128\]"),
    "q heads": ("q", lambda t: t.repeat(1, 1, 65, 1), ValueError, "q: expected from 1 to 128"),
    "cache dtype": ("cache", lambda t: t.float(), TypeError, "cache: expected dtype torch.uint8"),
    "cache shape": ("cache", lambda t: t[..., :128], ValueError, "cache: expected shape"),
    "cache rows": ("cache", lambda t: t[:, ::2], ValueError, "cache: expected strides"),
    "cache pages": (
        "cache",
        lambda t: t.flatten()[:-2].as_strided((2, 64, 1, 132), (8450, 132, 132, 1)),
        ValueError,
        "cache: pages must start at multiples of 4 bytes",
    ),
    "weights": ("weights", lambda t: t[:1], ValueError, "weights: expected shape"),
    "lens dtype": ("context_lens", lambda t: t.long(), TypeError, "context_lens: expected dtype"),
    "lens 1-D": ("context_lens", lambda t: t[:1], ValueError, r"context_lens: expected shape \[2]"),
    "lens 2-D": ("context_lens", lambda t: t[:, None], ValueError, r"expected shape \[2, 2]"),
    "table": ("block_table", lambda t: t[:1], ValueError, "block_table: expected shape"),
    "columns": ("max_model_len", lambda n: 0, ValueError, "max_model_len: expected at least 1"),
    "out": ("out", lambda t: t[:, :9], ValueError, "out: expected shape"),
    "device": ("weights", lambda t: t.to("meta"), ValueError, "weights: expected device"),
}


@pytest.mark.parametrize("name, alter, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_named_before_anything_is_written(name, alter, error, message):
    inputs = paged_mqa_logits_inputs(PagedMqaLogitsShape(2, 80, next_n=2, heads=2), device=DEVICE)
    out = inputs["out"] = torch.full((4, 80), math.nan, device=DEVICE)
    inputs[name] = alter(inputs[name])
    with pytest.raises(error, match=message):
        paged_mqa_logits(**inputs)
    assert out.isnan().all()

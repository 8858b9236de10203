# SPDX-License-Identifier: Apache-2.0
"""paged_mqa_topk against its fp32 oracle: interpreter on a CPU, native on a GPU."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from index_scores import INTERPRETER, magnitudes

from vllm_sm12x.ops.mqa_logits.reference import mqa_logits_reference
from vllm_sm12x.ops.paged_mqa_logits.spec import pack_indexer_cache
from vllm_sm12x.ops.paged_mqa_topk import MAX_SCRATCH_BYTES, _launch, paged_mqa_topk
from vllm_sm12x.ops.paged_mqa_topk.config import LaunchConfig, capacity, splits
from vllm_sm12x.ops.paged_mqa_topk.reference import paged_mqa_topk_scores
from vllm_sm12x.ops.paged_mqa_topk.spec import (
    PAGED_MQA_TOPK,
    PagedMqaTopkShape,
    paged_mqa_topk_inputs,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Lists of 64 entries up to topk 21, of which 32 are for the next chunk: they are cut often.
SMALL_LISTS = LaunchConfig(columns=128, block_n=16, num_warps=4, num_stages=2, chunk=32)


def compare(out: torch.Tensor, inputs: dict) -> None:
    """Each row of `out` is a top-k of the oracle's scores, up to what the order of sums changes."""
    arguments = {name: value for name, value in inputs.items() if name != "topk"}
    every_row = paged_mqa_topk_scores(**arguments)
    if out.is_cuda:
        tolerance, yardsticks = (
            PAGED_MQA_TOPK.tolerance,
            magnitudes(paged_mqa_topk_scores, arguments),
        )
    else:
        tolerance, yardsticks = INTERPRETER, every_row
    assert out.shape == (len(every_row), inputs["topk"]) and out.dtype == torch.int32
    for row, scores, yardstick in zip(out, every_row, yardsticks, strict=True):
        count = 0 if scores is None else min(inputs["topk"], len(scores))
        selected = row[:count].long()
        assert (row[count:] == -1).all(), "not -1 past the selected positions"
        if count == 0:
            continue
        assert (selected >= 0).all() and (selected < len(scores)).all(), "no position of the row"
        assert len(selected.unique()) == count, "a position twice"
        slack = tolerance * yardstick.nan_to_num(0, 0, 0).abs().max()
        least = scores.topk(count).values[-1]
        assert (scores[selected] >= least - slack).all(), PAGED_MQA_TOPK.tolerance_reason


def check(inputs: dict, **private) -> torch.Tensor:
    """Run into poisoned output and compare with the oracle."""
    shape = (inputs["q"].shape[0], inputs["topk"])
    out = torch.full(shape, 2**31 - 1, dtype=torch.int32, device=DEVICE)
    if private:
        private.setdefault("max_scratch_bytes", MAX_SCRATCH_BYTES)
        assert _launch(**inputs, out=out, **private) is out
    else:
        assert paged_mqa_topk(**inputs, out=out) is out
    compare(out, inputs)
    return out


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch):
    """What torch.empty gives is NaN, or a large integer: using it before it is written shows."""
    empty = torch.empty

    def poisoned(*size, **options):
        tensor = empty(*size, **options)
        poison = {torch.float32: math.nan, torch.int32: 2**31 - 1}.get(tensor.dtype)
        return tensor if poison is None else tensor.fill_(poison)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize("block_size", [2, 5, 64])
def test_it_selects_what_contiguous_keys_score_best(block_size):
    """Written without this op's oracle: the same keys by mqa_logits' oracle, and torch.topk."""
    gen = torch.Generator(device=DEVICE).manual_seed(0)
    keys = torch.randn(320, 128, generator=gen, device=DEVICE).to(torch.float8_e4m3fn)
    scales = torch.rand(320, generator=gen, device=DEVICE)
    q = torch.randn(3, 6, 128, generator=gen, device=DEVICE).to(torch.float8_e4m3fn)
    weights = torch.randn(3, 6, generator=gen, device=DEVICE)
    lens = torch.tensor([310, 40, 9], dtype=torch.int32, device=DEVICE)
    table = torch.arange(320 // block_size, dtype=torch.int32, device=DEVICE).flip(0)[None]
    pages = keys.view(torch.uint8).view(-1, block_size, 128).flip(0).view(keys.dtype)
    cache = pack_indexer_cache(pages, scales.view(-1, block_size).flip(0))
    starts = torch.tensor([0, 3], dtype=torch.int32, device=DEVICE)
    out = paged_mqa_topk(q, cache, weights, starts, lens, table.contiguous(), 10)

    logits = mqa_logits_reference(q, keys, scales, weights, torch.zeros_like(lens), lens)
    for row, best, count in zip(out, logits.topk(10).indices, (10, 10, 9), strict=True):
        assert set(row[:count].tolist()) == set(best[:count].tolist())
    assert out[2, 9] == -1


@pytest.mark.parametrize("shape", PAGED_MQA_TOPK.small, ids=str)
def test_small_shapes(shape):
    check(paged_mqa_topk_inputs(shape, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", PAGED_MQA_TOPK.full, ids=str)
def test_model_shapes(shape):
    check(paged_mqa_topk_inputs(shape, device=DEVICE))


@settings(max_examples=30)
@given(
    shape=st.builds(
        PagedMqaTopkShape,
        rows=st.integers(1, 9),
        keys=st.integers(1, 300),
        topk=st.integers(1, 40),
        requests=st.integers(1, 4),
        heads=st.integers(1, 128),
        block_size=st.sampled_from([2, 3, 16, 64, 128]),
        lens=st.sampled_from(["causal", "full", "ragged"]),
        scores=st.sampled_from(["random", "rising", "falling", "constant"]),
        padding=st.integers(0, 5),
        page_padding=st.sampled_from([0, 4, 64]),
    ),
    num_splits=st.sampled_from([1, 2, 8]),
    scratch=st.sampled_from([MAX_SCRATCH_BYTES, 3000]),
    seed=st.integers(0, 1000),
)
def test_any_shape_length_order_and_split(shape, num_splits, scratch, seed):
    inputs = paged_mqa_topk_inputs(shape, device=DEVICE, seed=seed)
    check(inputs, config=SMALL_LISTS, num_splits=num_splits, max_scratch_bytes=scratch)


@pytest.mark.parametrize("scores", ["random", "rising", "falling", "constant"])
@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("topk", [1, 4, 21, 22])
def test_lists_are_cut_many_times(scores, num_splits, topk):
    """800 keys past lists of 64 (topk 22: 128) entries."""
    assert [capacity(k, SMALL_LISTS.chunk) for k in (21, 22)] == [64, 128]
    shape = PagedMqaTopkShape(3, 800, topk, heads=2, scores=scores, block_size=16)
    inputs = paged_mqa_topk_inputs(shape, device=DEVICE)
    out = check(inputs, config=SMALL_LISTS, num_splits=num_splits)
    if scores in ("rising", "falling"):
        last = inputs["lens"][:, None] - 1 if scores == "rising" else topk - 1
        best = last - torch.arange(topk, device=DEVICE).flip(0)
        assert torch.equal(out.sort(1).values, best.expand(3, topk).int())


@pytest.mark.parametrize("num_splits", [1, 4])
def test_the_least_step_above_a_tie_wins(num_splits):
    """Lists full of ties are cut at the tie: one unit in the last place more must still pass."""
    inputs = paged_mqa_topk_inputs(
        PagedMqaTopkShape(2, 600, 6, heads=1, scores="constant", lens="full"), device=DEVICE
    )
    one_more = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    for position in (70, 299, 300, 580):
        page = inputs["cache"][inputs["block_table"][0, position // 64].item()].flatten()
        page[64 * 128 :].view(torch.float32)[position % 64] = one_more
    out = check(inputs, config=SMALL_LISTS, num_splits=num_splits)
    for row in out.tolist():
        assert {70, 299, 300, 580} < set(row)


@pytest.mark.parametrize("num_splits", [1, 4])
def test_every_length_around_topk_and_the_capacity_of_a_list(num_splits):
    topk = 8
    around = (0, topk, 16, SMALL_LISTS.chunk, capacity(topk, SMALL_LISTS.chunk), 130, 200)
    lens = [-5] + [length + step for length in around for step in (-1, 0, 1)]
    inputs = paged_mqa_topk_inputs(PagedMqaTopkShape(len(lens), 220, topk, heads=3), device=DEVICE)
    inputs["lens"] = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    out = check(inputs, config=SMALL_LISTS, num_splits=num_splits)
    assert (out >= 0).sum(1).tolist() == [min(topk, max(length, 0)) for length in lens]


@pytest.mark.parametrize("num_splits", [1, 4])
def test_nan_counts_as_minus_infinity(num_splits):
    """Both are selected only where the row has nothing better."""
    inputs = paged_mqa_topk_inputs(
        PagedMqaTopkShape(4, 100, 32, heads=2, lens="full", scores="rising"), device=DEVICE
    )
    page = inputs["cache"][inputs["block_table"][0, 0].item()].flatten()
    scales = page[64 * 128 :].view(torch.float32)
    scales[10:64:2], scales[11:64:2] = math.nan, -math.inf
    inputs["lens"] = torch.tensor([100, 64, 30, 12], dtype=torch.int32, device=DEVICE)
    out = check(inputs, config=SMALL_LISTS, num_splits=num_splits).sort(1).values
    assert out[0].tolist() == list(range(68, 100))
    assert out[1, :10].tolist() == list(range(10)) and out[1, -1] < 64
    assert out[2].tolist() == [-1, -1, *range(30)]
    assert out[3].tolist() == [-1] * 20 + list(range(12))


def test_rows_of_no_request_are_minus_one():
    inputs = paged_mqa_topk_inputs(
        PagedMqaTopkShape(4, 90, 8, requests=3, heads=2, padding=6, lens="full"), device=DEVICE
    )
    starts = torch.tensor([6, 6, 9, 9], dtype=torch.int32, device=DEVICE)  # 0, 3 and 0 rows
    inputs["query_start_loc"] = starts
    for num_splits in (1, 2):
        out = check(inputs, config=SMALL_LISTS, num_splits=num_splits)
        assert (out >= 0).sum(1).tolist() == [0] * 6 + [8] * 3 + [0] * 7


def test_lens_past_the_block_table_are_cut():
    inputs = paged_mqa_topk_inputs(PagedMqaTopkShape(2, 200, 8, heads=3), device=DEVICE)
    inputs["lens"] = torch.tensor([2**31 - 1, 500], dtype=torch.int32, device=DEVICE)
    inputs["block_table"] = inputs["block_table"][:, :2]
    assert check(inputs).max() < 128


@pytest.mark.parametrize("block_size", [16, 64])
def test_positions_past_the_context_do_not_matter(block_size):
    """Never-written rows hold any byte, NaN too; table entries past the context name no block."""
    shape = PagedMqaTopkShape(3, 250, 100, heads=4, block_size=block_size)
    inputs = paged_mqa_topk_inputs(shape, device=DEVICE)
    inputs["lens"][:] = 70
    used = -(-70 // block_size)
    inputs["block_table"][0, used:] = 2**31 - 1
    page = inputs["cache"][inputs["block_table"][0, used - 1].item()].flatten()
    page[70 % block_size * 128 : block_size * 128] = 0x7F
    page[block_size * 128 + 70 % block_size * 4 :] = 0xFF
    out = check(inputs)
    assert torch.equal(out[:, :70].sort(1).values[0], torch.arange(70, device=DEVICE).int())


def test_strided_arguments_and_output():
    inputs = paged_mqa_topk_inputs(PagedMqaTopkShape(5, 150, 7, requests=2, heads=3), device=DEVICE)
    for name in ("q", "weights", "block_table"):
        tensor = inputs[name]
        wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 16, device=DEVICE)
        wide = wide.to(tensor.dtype)
        wide[..., : tensor.shape[-1]] = tensor
        inputs[name] = wide[..., : tensor.shape[-1]]
    out = torch.full((5, 20), 77, dtype=torch.int32, device=DEVICE)
    paged_mqa_topk(**inputs, out=out[:, 6:13])
    compare(out[:, 6:13], inputs)
    assert (out[:, :6] == 77).all() and (out[:, 13:] == 77).all(), "wrote past its columns"


@pytest.mark.parametrize("block_size", [48, 64])
def test_cache_addresses_beyond_32_bits(block_size):
    """A page whose byte offset does not fit 32 bits: int32 arithmetic would read elsewhere."""
    shape = PagedMqaTopkShape(1, 40, 9, heads=2, block_size=block_size)
    inputs = paged_mqa_topk_inputs(shape, device=DEVICE)
    small = inputs["cache"]
    want = set(paged_mqa_topk(**inputs)[0].tolist())
    page_bytes = block_size * 132
    pages = 2**32 // page_bytes + 2
    storage = torch.empty(pages * page_bytes, dtype=torch.uint8, device=DEVICE)
    storage[-page_bytes:] = small[inputs["block_table"][0, 0].item()].flatten()
    inputs["cache"] = storage.view(pages, block_size, 1, 132)
    inputs["block_table"][:] = pages - 1
    assert set(paged_mqa_topk(**inputs)[0].tolist()) == want


def test_a_small_scratch_memory_gives_the_same_in_chunks():
    inputs = paged_mqa_topk_inputs(
        PagedMqaTopkShape(23, 120, 8, requests=3, heads=2, padding=2), device=DEVICE
    )
    one_row = 4 * (2 * SMALL_LISTS.chunk + 2 * capacity(8, SMALL_LISTS.chunk) + 1)
    want = check(inputs, config=SMALL_LISTS).sort(1).values
    for rows in (1, 5, 26):
        out = check(inputs, config=SMALL_LISTS, max_scratch_bytes=rows * one_row)
        assert torch.equal(out.sort(1).values, want)


def test_splits_fill_the_gpu_and_follow_from_shapes():
    assert splits(2048, 2**20, 512, sms=188) == 1
    assert splits(256, 32_768, 512, sms=188) == 1
    assert splits(90, 32_768, 512, sms=188) == 4
    assert splits(32, 32_768, 512, sms=188) == 16
    assert splits(1, 2**20, 2048, sms=188) == 4, "a merge would not hold more"
    assert splits(1, 3000, 512, sms=188) == 1, "too few keys for a second list"


BAD = {
    "q dtype": ("q", lambda t: t.float(), TypeError, "q: expected dtype torch.float8_e4m3fn"),
    "q dims": ("q", lambda t: t[:, 0], ValueError, r"q: expected shape \[any, any, 128\]"),
    "q heads": ("q", lambda t: t.repeat(1, 65, 1), ValueError, "q: expected from 1 to 128"),
    "cache dtype": ("cache", lambda t: t.float(), TypeError, "cache: expected dtype torch.uint8"),
    "cache shape": ("cache", lambda t: t[..., :128], ValueError, "cache: expected shape"),
    "weights": ("weights", lambda t: t[:1], ValueError, "weights: expected shape"),
    "starts": ("query_start_loc", lambda t: t[1:], ValueError, r"query_start_loc: expected shape"),
    "starts dtype": ("query_start_loc", lambda t: t.long(), TypeError, "query_start_loc: expected"),
    "lens": ("lens", lambda t: t[:1], ValueError, r"lens: expected shape \[4\]"),
    "table": ("block_table", lambda t: t[0], ValueError, "block_table: expected shape"),
    "topk 0": ("topk", lambda n: 0, ValueError, "topk: expected from 1 to 2048, got 0"),
    "topk 2049": ("topk", lambda n: 2049, ValueError, "topk: expected from 1 to 2048, got 2049"),
    "out": ("out", lambda t: t[:, :3], ValueError, r"out: expected shape \[4, 9\]"),
    "out dtype": ("out", lambda t: t.long(), TypeError, "out: expected dtype torch.int32"),
    "scratch": (
        "max_scratch_bytes",
        lambda n: 1000,
        ValueError,
        "max_scratch_bytes: expected at least 12292, what one row of topk 9 needs, got 1000",
    ),
    "device": ("weights", lambda t: t.to("meta"), ValueError, "weights: expected device"),
}


@pytest.mark.parametrize("name, alter, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_named_before_anything_is_written(name, alter, error, message):
    inputs = paged_mqa_topk_inputs(PagedMqaTopkShape(4, 80, 9, heads=2), device=DEVICE)
    out = inputs["out"] = torch.full((4, 9), 77, dtype=torch.int32, device=DEVICE)
    inputs["max_scratch_bytes"] = MAX_SCRATCH_BYTES
    inputs[name] = alter(inputs[name])
    with pytest.raises(error, match=message):
        paged_mqa_topk(**inputs)
    assert (out == 77).all()

# SPDX-License-Identifier: Apache-2.0
"""The packed cache, byte by byte against the format's description."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_sm12x.ops import pack_fp8_ds_mla, unpack_fp8_ds_mla
from vllm_sm12x.ops.fp8_ds_mla import packed_page_bytes


def test_bytes_of_a_page():
    """Row i: 448 e4m3 then 64 bf16 at i * 576; its 8 scale bytes at block * 576 + i * 8."""
    rows = torch.zeros(1, 2, 512, dtype=torch.bfloat16)
    rows[0, 0, :64] = 448.0  # amax 448: scale 2^0
    rows[0, 1, 64:128] = 3.0  # 3 / 448 -> 2^-7: stored 3 * 128 = 384
    rows[0, 1, 448:] = 1.5
    page = pack_fp8_ds_mla(rows).as_strided((1728,), (1,))
    assert page[:64].eq(0x7E).all(), "448 is the largest e4m3"
    assert page[576 + 64 : 576 + 128].eq(0x7C).all(), "384 is 1.5 * 2^8"
    assert page[576 + 448 : 1152].view(torch.bfloat16).eq(1.5).all()
    floor = math.ceil(math.log2(1e-4 / 448)) + 127
    assert page[1152:1168].tolist() == [127, *[floor] * 6, 0, floor, 120, *[floor] * 5, 0]
    assert page[1168:].eq(0).all()


@pytest.mark.parametrize("block, expected", [(64, 37_440), (2, 1_728), (256, 149_760)])
def test_page_bytes_are_vllms(block, expected):
    assert packed_page_bytes(block) == expected
    assert pack_fp8_ds_mla(torch.zeros(2, block, 512, dtype=torch.bfloat16)).stride(0) == expected


@given(
    blocks=st.integers(0, 4),
    block=st.integers(1, 70),
    pad=st.integers(0, 40),
    magnitude=st.integers(-20, 20),
    seed=st.integers(0, 99),
)
def test_round_trip_is_within_half_an_e4m3_step(blocks, block, pad, magnitude, seed):
    gen = torch.Generator().manual_seed(seed)
    rows = (torch.randn(blocks, block, 512, generator=gen) * 2.0**magnitude).to(torch.bfloat16)
    cache = pack_fp8_ds_mla(rows, page_bytes=block * 584 + 4 * pad)
    assert cache.shape == (blocks, block, 584) and cache.stride() == (block * 584 + 4 * pad, 584, 1)
    back = unpack_fp8_ds_mla(cache)
    assert torch.equal(back[..., 448:], rows[..., 448:].float())
    tiles = rows[..., :448].float().unflatten(-1, (7, 64))
    error = (back[..., :448].unflatten(-1, (7, 64)) - tiles).abs()
    # e4m3 has 3 mantissa bits: half a step is 2^-4 of the value, or 2^-10 scales when subnormal.
    scale = torch.exp2(torch.ceil(torch.log2(tiles.abs().amax(-1, True).clamp_min(1e-4) / 448)))
    assert (error <= torch.maximum(tiles.abs() * 2**-4, scale * 2**-10) * 1.0001).all()


@pytest.mark.parametrize(
    "rows, page_bytes, error, message",
    [
        (torch.zeros(1, 2, 512), None, TypeError, "rows: expected dtype torch.bfloat16"),
        (torch.zeros(2, 512, dtype=torch.bfloat16), None, ValueError, "rows: expected"),
        (torch.zeros(1, 2, 512, dtype=torch.bfloat16), 1000, ValueError, "at least 1168"),
    ],
)
def test_bad_input(rows, page_bytes, error, message):
    with pytest.raises(error, match=message):
        pack_fp8_ds_mla(rows, page_bytes=page_bytes)

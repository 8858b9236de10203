# SPDX-License-Identifier: Apache-2.0
"""What the Gluon kernels of sparse_mla, hopper.py and mma.py, have in common.

Tiles are BLOCK_N candidates, one a lane of the layout ROW.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# until: triton>=3.7, which has it under the second name only
barrier = getattr(gl, "thread_barrier", None) or gl.barrier

HEAD_DIM = gl.constexpr(512)
DATA_BYTES = gl.constexpr(576)
# A row in 32-bit words: 7 groups of 16 with one scale byte each, then 32 of RoPE.
GROUPS = gl.constexpr(8)
NOPE_GROUPS = gl.constexpr(7)
GROUP_WORDS = gl.constexpr(16)
MASKED = gl.constexpr(-1e30)
LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)

# Two words of bf16 pairs from a word of four e4m3 and a UE8M0 byte. e4m3 bits moved into bf16's
# places are the value times 2^-120, subnormal ones too: exact for all bytes but NaN, which becomes
# 480. A row with NaN has it among its RoPE values too, which are bf16. Products are sums with -0:
# before sm_90 there is no mul of bf16x2.
_UNPACK_E4M3 = gl.constexpr("""{
    .reg .b32 p0, p1, s0, s1, c, s, z;
    mov.b32 c, 0x7B807B80;
    mov.b32 z, 0x80008000;
    mul.lo.u32 s, $3, 0x00800080;
    prmt.b32 p0, $2, 0, 0x1404;
    prmt.b32 p1, $2, 0, 0x3424;
    and.b32 s0, p0, 0x80008000;
    and.b32 s1, p1, 0x80008000;
    shr.u32 p0, p0, 4;
    shr.u32 p1, p1, 4;
    lop3.b32 p0, p0, 0x07f007f0, s0, 0xEA;
    lop3.b32 p1, p1, 0x07f007f0, s1, 0xEA;
    fma.rn.bf16x2 p0, p0, c, z;
    fma.rn.bf16x2 p1, p1, c, z;
    fma.rn.bf16x2 $0, p0, s, z;
    fma.rn.bf16x2 $1, p1, s, z;
}""")


@gluon.jit
def token_and_head(num_heads, BLOCK_H: gl.constexpr, AGAIN: gl.constexpr):
    """The program's token and first head; AGAIN in a way that the compiler takes for another."""
    block = gl.program_id(0)
    if AGAIN:
        block = gl.inline_asm_elementwise(
            "mov.u32 $0, %ctaid.x;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )
    head_blocks = gl.cdiv(num_heads, BLOCK_H)
    return (block // head_blocks).to(gl.int64), (block % head_blocks) * BLOCK_H


@gluon.jit
def lengths(
    token,
    swa_lens_ptr,
    extra_lens_ptr,
    swa_width,
    extra_width,
    BLOCK_N: gl.constexpr,
    HAS_SWA_LENS: gl.constexpr,
    HAS_EXTRA: gl.constexpr,
    HAS_EXTRA_LENS: gl.constexpr,
    UNPACKED: gl.constexpr,
):
    """A token's window and extra candidates, and the tiles of the window's and of all packed."""
    swa_len = swa_width
    if HAS_SWA_LENS:
        swa_len = gl.minimum(gl.load(swa_lens_ptr + token), swa_width)
    swa_tiles = gl.cdiv(gl.maximum(swa_len, 0), BLOCK_N)
    extra_len = 0
    num_tiles = swa_tiles
    if HAS_EXTRA or UNPACKED:
        extra_len = extra_width
        if HAS_EXTRA_LENS:
            extra_len = gl.minimum(gl.load(extra_lens_ptr + token), extra_width)
    if HAS_EXTRA:
        num_tiles += gl.cdiv(gl.maximum(extra_len, 0), BLOCK_N)
    return swa_len, extra_len, swa_tiles, num_tiles


@gluon.jit
def load_entries(
    tile,
    last,
    swa_tiles,
    swa_len,
    extra_len,
    swa_indices_ptr,
    extra_indices_ptr,
    HAS_EXTRA: gl.constexpr,
    BLOCK_N: gl.constexpr,
    ROW: gl.constexpr,
):
    """What a tile's lists have, int32 [BLOCK_N]; negative for nothing, and from tile `last` on."""
    n = tile * BLOCK_N + gl.arange(0, BLOCK_N, layout=ROW)
    limit = swa_len
    indices_ptr = swa_indices_ptr
    if HAS_EXTRA:
        in_extra = tile >= swa_tiles
        n -= gl.where(in_extra, swa_tiles * BLOCK_N, 0)
        limit = gl.where(in_extra, extra_len, swa_len)
        indices_ptr = gl.where(in_extra, extra_indices_ptr, swa_indices_ptr)
    listed = n < gl.where(tile < last, limit, 0)
    return gl.load(indices_ptr + gl.where(listed, n, 0), mask=listed, other=-1)


@gluon.jit
def find_slots(
    tile,
    swa_tiles,
    entry,
    table_ptr,
    table_width,
    EXTRA_BLOCK: gl.constexpr,
    HAS_EXTRA: gl.constexpr,
    HAS_TABLE: gl.constexpr,
):
    """The global slots of a tile's entries; extra ones are positions where there is a table."""
    slot = entry
    if HAS_EXTRA and HAS_TABLE:
        in_extra = tile >= swa_tiles
        position = gl.maximum(entry, 0)
        page = position // EXTRA_BLOCK
        known = in_extra & (entry >= 0) & (page < table_width)
        page = gl.load(table_ptr + gl.where(known, page, 0), mask=known, other=-1)
        mapped = gl.where(page < 0, -1, page * EXTRA_BLOCK + position % EXTRA_BLOCK)
        slot = gl.where(in_extra, mapped, entry)
    return slot


@gluon.jit
def load_positions(first, indices_ptr, limit, BLOCK_N: gl.constexpr, ROW: gl.constexpr):
    """Entries [BLOCK_N] of one index row from `first` on; -1 at or past `limit`."""
    n = first + gl.arange(0, BLOCK_N, layout=ROW)
    listed = n < limit
    return gl.load(indices_ptr + gl.where(listed, n, 0), mask=listed, other=-1)


@gluon.jit
def find_rows(
    tile,
    swa_tiles,
    slot,
    swa_ptr,
    extra_ptr,
    swa_page_stride,
    extra_page_stride,
    SWA_BLOCK: gl.constexpr,
    EXTRA_BLOCK: gl.constexpr,
    HAS_EXTRA: gl.constexpr,
):
    """Where a tile's rows are, each in a page.

    An int32 pointer to the words of all pages; of the page of each row its first byte (int64) and,
    from there, the byte after the last row's data, where scales begin; and the row of the page.
    """
    base = swa_ptr
    stride = swa_page_stride
    slot = gl.maximum(slot, 0)
    page = slot // SWA_BLOCK
    row = slot % SWA_BLOCK
    scale_offset = SWA_BLOCK * DATA_BYTES
    if HAS_EXTRA:
        in_extra = tile >= swa_tiles
        base = gl.where(in_extra, extra_ptr, swa_ptr)
        stride = gl.where(in_extra, extra_page_stride, swa_page_stride)
        page = gl.where(in_extra, slot // EXTRA_BLOCK, page)
        row = gl.where(in_extra, slot % EXTRA_BLOCK, row)
        scale_offset = gl.where(in_extra, EXTRA_BLOCK * DATA_BYTES, SWA_BLOCK * DATA_BYTES)
    return base.to(gl.pointer_type(gl.int32)), page.to(gl.int64) * stride, scale_offset, row


@gluon.jit
def unpack_e4m3(words, scale):
    """bf16 pairs [row, group, 16, 2] of words [row, group, 16] and scale bytes [row, group, 1]."""
    scale = gl.broadcast(words, scale)[1]
    first, second = gl.inline_asm_elementwise(
        _UNPACK_E4M3,
        "=r,=r,r,r",
        [words, scale],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    return gl.join(first, second)


@gluon.jit
def weigh(
    head,
    num_heads,
    running_max,
    running_sum,
    sink_ptr,
    HAS_SINK: gl.constexpr,
    PARTIAL: gl.constexpr,
):
    """What O is multiplied by at the end, and the base-2 LSE, -inf where no candidate was seen."""
    seen = running_sum > 0
    denominator = running_sum
    if HAS_SINK and not PARTIAL:
        sink = gl.load(sink_ptr + head, mask=head < num_heads, other=-float("inf"))
        # Without candidates the running maximum means nothing; the row is zero either way.
        denominator += gl.exp2(gl.where(seen, sink * LOG2E - running_max, -float("inf")))
    inverse = 1.0 / gl.where(seen, denominator, 1.0)
    lse = running_max + gl.log2(gl.where(seen, running_sum, 1.0))
    return inverse, gl.where(seen, lse, -float("inf"))

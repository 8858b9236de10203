# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of sparse_mla.

Design constraints, please keep them when editing:
- Candidates are read straight from the packed 584-byte rows: no gather workspace.
- The raw bytes of tile i+1 and the slots of tile i+2 are in flight while tile i is multiplied;
  dequantisation happens at the top of the loop, so K is staged once for both dots.
- `K @ Q^T` then `P @ K`: with 64 heads and 16 candidates a tile, no warp repeats another's MMA on
  mma.sync hardware (README.md, "Tile forms").
- SWA and extra candidates are one list of tiles, so one online softmax serves both.
- The widest tile leaves no register over. What the epilogue needs of the place in the grid
  it works out again: kept through the loop, it spills in Triton 3.7 and 3.8.
"""

import triton
import triton.language as tl

HEAD_DIM = tl.constexpr(512)
NOPE_DIM = tl.constexpr(448)
DATA_BYTES = tl.constexpr(576)
SCALES = tl.constexpr(8)
MASKED = tl.constexpr(-1e30)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)

# Sizes that change from call to call: specialising on them would only compile more variants.
_RUNTIME_SIZES = [
    "num_heads",
    "swa_width",
    "extra_width",
    "table_width",
    "table_stride",
    "num_splits",
]
# Read one number at a time. A prefill's begin wherever the decodes of its batch end, and knowing
# that they are aligned would only compile more variants.
_SCALAR_LOADS = ["swa_lens_ptr", "extra_lens_ptr", "table_ptr", "request_ids_ptr"]


@triton.jit
def _load_slots(
    tile,
    swa_tiles,
    swa_len,
    extra_len,
    swa_indices_ptr,
    extra_indices_ptr,
    table_ptr,
    table_width,
    SWA_BLOCK: tl.constexpr,
    EXTRA_BLOCK: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Page, row and validity of one tile's candidates, each [BLOCK_N]; int32 page ids."""
    offsets = tl.arange(0, BLOCK_N)
    if not HAS_EXTRA:
        n = tile * BLOCK_N + offsets
        slot = tl.load(swa_indices_ptr + n, mask=n < swa_len, other=-1)
        valid = slot >= 0
        slot = tl.where(valid, slot, 0)
        return slot // SWA_BLOCK, slot % SWA_BLOCK, valid

    in_extra = tile >= swa_tiles
    n = tl.where(in_extra, tile - swa_tiles, tile) * BLOCK_N + offsets
    limit = tl.where(in_extra, extra_len, swa_len)
    indices_ptr = tl.where(in_extra, extra_indices_ptr, swa_indices_ptr)
    slot = tl.load(indices_ptr + n, mask=n < limit, other=-1)
    valid = slot >= 0
    slot = tl.where(valid, slot, 0)
    page = tl.where(in_extra, slot // EXTRA_BLOCK, slot // SWA_BLOCK)
    row = tl.where(in_extra, slot % EXTRA_BLOCK, slot % SWA_BLOCK)
    if HAS_TABLE:
        valid = valid & ((page < table_width) | (not in_extra))
        mapped = tl.load(table_ptr + page, mask=valid & in_extra, other=0)
        page = tl.where(in_extra, mapped, page)
    return page, row, valid


@triton.jit
def _load_rows(
    tile,
    swa_tiles,
    page,
    row,
    valid,
    swa_ptr,
    extra_ptr,
    swa_page_stride,
    extra_page_stride,
    SWA_BLOCK: tl.constexpr,
    EXTRA_BLOCK: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Raw bytes of one tile: NoPE [BLOCK_N, 512] uint8, scales [BLOCK_N, 8] uint8, RoPE bf16."""
    d = tl.arange(0, HEAD_DIM)
    if HAS_EXTRA:
        in_extra = tile >= swa_tiles
        base = tl.where(in_extra, extra_ptr, swa_ptr)
        stride = tl.where(in_extra, extra_page_stride, swa_page_stride)
        scale_offset = tl.where(in_extra, EXTRA_BLOCK * DATA_BYTES, SWA_BLOCK * DATA_BYTES)
    else:
        base = swa_ptr
        stride = swa_page_stride
        scale_offset = SWA_BLOCK * DATA_BYTES
    start = page.to(tl.int64) * stride
    data = start + row * DATA_BYTES
    nope = tl.load(
        base + data[:, None] + d[None, :],
        mask=valid[:, None] & (d < NOPE_DIM)[None, :],
        other=0,
    )
    scale = tl.load(
        base + (start + scale_offset + row * SCALES)[:, None] + tl.arange(0, SCALES)[None, :],
        mask=valid[:, None],
        other=127,
    )
    # In bf16 elements, RoPE value d is 448 / 2 + (d - 448) past the row's start.
    rope_ptr = base.to(tl.pointer_type(tl.bfloat16)) + (data // 2)[:, None]
    rope = tl.load(
        rope_ptr + (d - NOPE_DIM // 2)[None, :],
        mask=valid[:, None] & (d >= NOPE_DIM)[None, :],
        other=0.0,
    )
    return nope, scale, rope


@triton.jit
def _dequantise(nope, scale, rope, DOT_DTYPE: tl.constexpr, BLOCK_N: tl.constexpr):
    """K tile [BLOCK_N, 512]; exact in bf16, as e4m3 has 4 significant bits and scales are 2^n."""
    d = tl.arange(0, HEAD_DIM)
    factor = (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    factor = tl.broadcast_to(factor[:, :, None], (BLOCK_N, SCALES, HEAD_DIM // SCALES))
    factor = tl.reshape(factor, (BLOCK_N, HEAD_DIM))
    value = nope.to(tl.float8e4nv, bitcast=True).to(tl.float32) * factor
    return tl.where((d < NOPE_DIM)[None, :], value.to(DOT_DTYPE), rope.to(DOT_DTYPE))


@triton.jit
def _place(head_blocks, num_heads, BLOCK_H: tl.constexpr, AGAIN: tl.constexpr):
    """The program's token, its heads [BLOCK_H], and which of them there are.

    Head blocks of a token are neighbours in the grid: the second reads its rows from L2.
    AGAIN reads tl.program_id(0) in a way that the compiler does not take for the same value.
    """
    if AGAIN:
        block = tl.inline_asm_elementwise(
            "mov.u32 $0, %ctaid.x;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        block = tl.program_id(0)
    h = (block % head_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    return (block // head_blocks).to(tl.int64), h, h < num_heads


@triton.jit(do_not_specialize=_RUNTIME_SIZES, do_not_specialize_on_alignment=_SCALAR_LOADS)
def sparse_mla_kernel(
    q_ptr,
    swa_ptr,
    swa_indices_ptr,
    swa_lens_ptr,
    extra_ptr,
    extra_indices_ptr,
    extra_lens_ptr,
    table_ptr,
    request_ids_ptr,
    sink_ptr,
    out_ptr,
    lse_ptr,
    softmax_scale,
    num_heads,
    swa_width,
    extra_width,
    table_width,
    q_stride_t,
    q_stride_h,
    swa_page_stride,
    swa_indices_stride,
    extra_page_stride,
    extra_indices_stride,
    table_stride,
    out_stride_t,
    out_stride_s,
    out_stride_h,
    lse_stride_t,
    lse_stride_s,
    num_splits,
    SWA_BLOCK: tl.constexpr,
    EXTRA_BLOCK: tl.constexpr,
    HAS_SWA_LENS: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    HAS_EXTRA_LENS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_LSE: tl.constexpr,
    PARTIAL: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """One query token, BLOCK_H heads, one split of its candidates.

    PARTIAL writes the split's normalised fp32 result and its base-2 LSE (-inf if it saw no
    candidate); otherwise the final bf16 row and, if asked, the natural LSE without the sink.
    """
    head_blocks = tl.cdiv(num_heads, BLOCK_H)
    token, h, head_mask = _place(head_blocks, num_heads, BLOCK_H, False)
    split = tl.program_id(1)
    d = tl.arange(0, HEAD_DIM)

    swa_len = swa_width
    if HAS_SWA_LENS:
        swa_len = tl.minimum(tl.load(swa_lens_ptr + token), swa_width)
    swa_tiles = tl.cdiv(tl.maximum(swa_len, 0), BLOCK_N)
    extra_len = 0
    num_tiles = swa_tiles
    if HAS_EXTRA:
        extra_len = extra_width
        if HAS_EXTRA_LENS:
            extra_len = tl.minimum(tl.load(extra_lens_ptr + token), extra_width)
        num_tiles += tl.cdiv(tl.maximum(extra_len, 0), BLOCK_N)
    swa_row_ptr = swa_indices_ptr + token * swa_indices_stride
    extra_row_ptr = extra_indices_ptr + token * extra_indices_stride
    table_row_ptr = table_ptr
    if HAS_TABLE:
        table_row_ptr = table_ptr + tl.load(request_ids_ptr + token).to(tl.int64) * table_stride

    per_split = tl.cdiv(num_tiles, num_splits)
    first = split * per_split
    last = tl.minimum(first + per_split, num_tiles)

    q_row_ptr = q_ptr + token * q_stride_t
    q_ptrs = q_row_ptr + h[:, None] * q_stride_h + d[None, :]
    q = tl.load(q_ptrs, mask=head_mask[:, None], other=0.0).to(DOT_DTYPE)

    page, row, valid = _load_slots(
        first, swa_tiles, swa_len, extra_len, swa_row_ptr, extra_row_ptr, table_row_ptr,
        table_width, SWA_BLOCK, EXTRA_BLOCK, HAS_EXTRA, HAS_TABLE, BLOCK_N,
    )  # fmt: skip
    nope, scale, rope = _load_rows(
        first, swa_tiles, page, row, valid, swa_ptr, extra_ptr, swa_page_stride,
        extra_page_stride, SWA_BLOCK, EXTRA_BLOCK, HAS_EXTRA, BLOCK_N,
    )  # fmt: skip
    next_page, next_row, next_valid = _load_slots(
        first + 1, swa_tiles, swa_len, extra_len, swa_row_ptr, extra_row_ptr, table_row_ptr,
        table_width, SWA_BLOCK, EXTRA_BLOCK, HAS_EXTRA, HAS_TABLE, BLOCK_N,
    )  # fmt: skip

    running_max = tl.full((BLOCK_H,), MASKED, tl.float32)
    running_sum = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, HEAD_DIM), tl.float32)
    scale_log2 = softmax_scale * LOG2E
    for tile in tl.range(first, last, num_stages=1):
        k = _dequantise(nope, scale, rope, DOT_DTYPE, BLOCK_N)
        tile_valid = valid
        valid = next_valid
        nope, scale, rope = _load_rows(
            tile + 1, swa_tiles, next_page, next_row, next_valid, swa_ptr, extra_ptr,
            swa_page_stride, extra_page_stride, SWA_BLOCK, EXTRA_BLOCK, HAS_EXTRA, BLOCK_N,
        )  # fmt: skip
        next_page, next_row, next_valid = _load_slots(
            tile + 2, swa_tiles, swa_len, extra_len, swa_row_ptr, extra_row_ptr, table_row_ptr,
            table_width, SWA_BLOCK, EXTRA_BLOCK, HAS_EXTRA, HAS_TABLE, BLOCK_N,
        )  # fmt: skip
        s = tl.dot(k, tl.trans(q)) * scale_log2  # [BLOCK_N, BLOCK_H]
        s = tl.where(tile_valid[:, None], s, MASKED)
        new_max = tl.maximum(running_max, tl.max(s, 0))
        p = tl.where(tile_valid[:, None], tl.exp2(s - new_max[None, :]), 0.0)
        rescale = tl.exp2(running_max - new_max)
        running_sum = running_sum * rescale + tl.sum(p, 0)
        acc = tl.dot(tl.trans(p).to(DOT_DTYPE), k, acc * rescale[:, None])
        running_max = new_max

    token, h, head_mask = _place(head_blocks, num_heads, BLOCK_H, NATIVE)
    seen = running_sum > 0
    lse = tl.where(seen, running_max + tl.log2(tl.where(seen, running_sum, 1.0)), -float("inf"))
    denominator = running_sum
    if HAS_SINK and not PARTIAL:
        sink = tl.load(sink_ptr + h, mask=head_mask, other=-float("inf"))
        # Without candidates the running maximum means nothing; the row is zero either way.
        denominator += tl.exp2(tl.where(seen, sink * LOG2E - running_max, -float("inf")))
    result = acc / tl.where(seen, denominator, 1.0)[:, None]
    out_row_ptr = out_ptr + token * out_stride_t
    if PARTIAL:
        out_row_ptr += split.to(tl.int64) * out_stride_s
        lse_row_ptr = lse_ptr + token * lse_stride_t + split.to(tl.int64) * lse_stride_s
        tl.store(lse_row_ptr + h, lse, mask=head_mask)
    elif HAS_LSE:
        tl.store(lse_ptr + token * lse_stride_t + h, lse * LN2, mask=head_mask)
    # A split without candidates leaves its row unwritten: the merge reads it by its LSE only.
    write = head_mask
    if PARTIAL:
        write = head_mask & (last > first)
    tl.store(
        out_row_ptr + h[:, None] * out_stride_h + d[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=write[:, None],
    )


@triton.jit(do_not_specialize=["num_heads", "num_splits"])
def sparse_mla_merge_kernel(
    partial_ptr,
    partial_lse_ptr,
    sink_ptr,
    out_ptr,
    lse_ptr,
    num_heads,
    num_splits,
    partial_stride_t,
    partial_stride_s,
    partial_stride_h,
    partial_lse_stride_t,
    partial_lse_stride_s,
    out_stride_t,
    out_stride_h,
    lse_stride_t,
    HAS_SINK: tl.constexpr,
    HAS_LSE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Merge the splits of one token and head, in split order: same inputs, same bits."""
    head = tl.program_id(0) % num_heads
    token = (tl.program_id(0) // num_heads).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    lse_in = tl.load(
        partial_lse_ptr + token * partial_lse_stride_t + s * partial_lse_stride_s + head,
        mask=s < num_splits,
        other=-float("inf"),
    )
    peak = tl.max(lse_in, 0)
    seen = peak > -float("inf")
    weight = tl.where(lse_in > -float("inf"), tl.exp2(lse_in - tl.where(seen, peak, 0.0)), 0.0)
    total = tl.sum(weight, 0)
    denominator = total
    if HAS_SINK:
        sink = tl.load(sink_ptr + head)
        denominator += tl.exp2(tl.where(seen, sink * LOG2E - peak, -float("inf")))
    weight = weight / tl.where(seen, denominator, 1.0)
    if HAS_LSE:
        lse = tl.where(seen, (peak + tl.log2(tl.where(seen, total, 1.0))) * LN2, -float("inf"))
        tl.store(lse_ptr + token * lse_stride_t + head, lse)

    for start in tl.static_range(0, HEAD_DIM, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        part = tl.load(
            partial_ptr
            + token * partial_stride_t
            + s[:, None] * partial_stride_s
            + head * partial_stride_h
            + d[None, :],
            mask=(weight > 0)[:, None],
            other=0.0,
        )
        row = tl.sum(part * weight[:, None], 0)
        tl.store(
            out_ptr + token * out_stride_t + head * out_stride_h + d,
            row.to(out_ptr.dtype.element_ty),
        )

# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of sparse_mla.

Design constraints, please keep them when editing:
- Candidates are read straight from the packed 584-byte rows: no gather workspace, but in a prefill,
  whose tokens share their rows (README.md, "Prefill").
- The raw words of tile i+1 and the slots of tile i+2 are in flight while tile i is multiplied;
  dequantisation happens at the top of the loop, so K is staged once for both dots.
- Raw rows are 32-bit words, unpacked by inline assembly: as bytes they are taken apart and put
  together again in each iteration, and bf16 values are converted one by one.
- `K @ Q^T` then `P @ K`: with 64 heads and 16 candidates a tile, no warp repeats another's MMA on
  mma.sync hardware (README.md, "Tile forms").
- A row is two halves of 256 values, each with its own dot and accumulator: the 32 MMAs of one dot
  over 512 values wait for each other, those of two halves need not (README.md, "Halves").
- SWA and extra candidates are one list of tiles, so one online softmax serves both.
- A result that is to be quantised is rounded to bf16 first: the bits are those of a quantiser that
  reads what this kernel else writes.
- The widest tiles leave no register over. What the epilogue needs of the place in the grid
  it works out again: kept through the loop, it spills in Triton 3.7 and 3.8.
- Lanes that a mask leaves out have addresses inside the tensor all the same: Triton 3.6 is said to
  fault on others on SM12x (vLLM's sparse_swa.py).
"""

import triton
import triton.language as tl

HEAD_DIM = tl.constexpr(512)
HALF_DIM = tl.constexpr(256)
DATA_BYTES = tl.constexpr(576)
# A row in 32-bit words: 7 groups of 16 with one scale each, then RoPE. Four groups are a half.
GROUPS = tl.constexpr(8)
HALF_GROUPS = tl.constexpr(4)
NOPE_GROUPS = tl.constexpr(7)
GROUP_WORDS = tl.constexpr(16)
ROPE_WORDS = tl.constexpr(32)
# Values of a quantised result that share a scale. The least and the largest magnitude that scales
# are made for: vLLM's (fused_inv_rope_fp8_quant.py), and e4m3's.
RUN = tl.constexpr(128)
LEAST = tl.constexpr(1e-10)
E4M3_MAX = tl.constexpr(448.0)
MASKED = tl.constexpr(-1e30)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)

# Sizes that change from call to call: specialising on them would only compile more variants.
RUNTIME_SIZES = [
    "num_heads",
    "swa_width",
    "extra_width",
    "table_width",
    "unpacked_width",
    "table_stride",
    "num_splits",
]
# Read one number at a time. A prefill's begin wherever the decodes of its batch end, and knowing
# that they are aligned would only compile more variants.
SCALAR_LOADS = [
    "swa_lens_ptr",
    "extra_lens_ptr",
    "table_ptr",
    "request_ids_ptr",
    "unpacked_lens_ptr",
    "positions_ptr",
]


# Two words of bf16 pairs from a word of four e4m3 and a scale. Exact: e4m3 has 4 significant bits,
# and scales are powers of two.
_UNPACK_E4M3 = tl.constexpr("""{
    .reg .b16 b0, b1, h0, h1, h2, h3;
    .reg .b32 p0, p1;
    .reg .f32 f0, f1, f2, f3;
    mov.b32 {b0, b1}, $2;
    cvt.rn.f16x2.e4m3x2 p0, b0;
    cvt.rn.f16x2.e4m3x2 p1, b1;
    mov.b32 {h0, h1}, p0;
    mov.b32 {h2, h3}, p1;
    cvt.f32.f16 f0, h0;
    cvt.f32.f16 f1, h1;
    cvt.f32.f16 f2, h2;
    cvt.f32.f16 f3, h3;
    mul.f32 f0, f0, $3;
    mul.f32 f1, f1, $3;
    mul.f32 f2, f2, $3;
    mul.f32 f3, f3, $3;
    cvt.rn.bf16x2.f32 $0, f1, f0;
    cvt.rn.bf16x2.f32 $1, f3, f2;
}""")


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
    EXTRA_BLOCK: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The global slots of one tile's candidates, int32 [BLOCK_N]; negative where there is none."""
    in_extra = tile >= swa_tiles
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    limit = swa_len
    indices_ptr = swa_indices_ptr
    if HAS_EXTRA:
        n -= tl.where(in_extra, swa_tiles * BLOCK_N, 0)
        limit = tl.where(in_extra, extra_len, swa_len)
        indices_ptr = tl.where(in_extra, extra_indices_ptr, swa_indices_ptr)
    listed = n < limit
    slot = tl.load(indices_ptr + tl.where(listed, n, 0), mask=listed, other=-1)
    if HAS_EXTRA and HAS_TABLE:
        position = tl.maximum(slot, 0)
        page = position // EXTRA_BLOCK
        known = in_extra & (slot >= 0) & (page < table_width)
        page = tl.load(table_ptr + tl.where(known, page, 0), mask=known, other=-1)
        mapped = tl.where(page < 0, -1, page * EXTRA_BLOCK + position % EXTRA_BLOCK)
        slot = tl.where(in_extra, mapped, slot)
    return slot


@triton.jit
def _load_positions(first, indices_ptr, limit, BLOCK_N: tl.constexpr):
    """Entries [BLOCK_N] of one index row from `first` on; -1 at or past `limit`."""
    n = first + tl.arange(0, BLOCK_N)
    listed = n < limit
    return tl.load(indices_ptr + tl.where(listed, n, 0), mask=listed, other=-1)


@triton.jit
def _load_rows(
    tile,
    swa_tiles,
    slot,
    swa_ptr,
    extra_ptr,
    swa_page_stride,
    extra_page_stride,
    SWA_BLOCK: tl.constexpr,
    EXTRA_BLOCK: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
):
    """Raw rows of one tile: `_load_half` of both halves, and RoPE words [BLOCK_N, 32]."""
    base = swa_ptr
    stride = swa_page_stride
    valid = slot >= 0
    slot = tl.maximum(slot, 0)
    page = slot // SWA_BLOCK
    row = slot % SWA_BLOCK
    scale_offset = SWA_BLOCK * DATA_BYTES
    if HAS_EXTRA:
        in_extra = tile >= swa_tiles
        base = tl.where(in_extra, extra_ptr, swa_ptr)
        stride = tl.where(in_extra, extra_page_stride, swa_page_stride)
        page = tl.where(in_extra, slot // EXTRA_BLOCK, page)
        row = tl.where(in_extra, slot % EXTRA_BLOCK, row)
        scale_offset = tl.where(in_extra, EXTRA_BLOCK * DATA_BYTES, SWA_BLOCK * DATA_BYTES)
    start = page.to(tl.int64) * stride
    data = start + row * DATA_BYTES
    words_ptr = base.to(tl.pointer_type(tl.int32)) + data // 4
    scales_ptr = base + (start + scale_offset + row * GROUPS)
    low, low_scale = _load_half(words_ptr, scales_ptr, valid, False)
    high, high_scale = _load_half(words_ptr, scales_ptr, valid, True)
    rope = tl.load(
        words_ptr[:, None] + (tl.arange(0, ROPE_WORDS) + NOPE_GROUPS * GROUP_WORDS)[None, :],
        mask=valid[:, None],
        other=0,
    )
    return low, low_scale, high, high_scale, rope


@triton.jit
def _load_half(words_ptr, scales_ptr, valid, HIGH: tl.constexpr):
    """NoPE words [BLOCK_N, 4, 16] and scale bytes [BLOCK_N, 4] of the low or high half of each row.

    The last group of the high half is RoPE's and has no NoPE words.
    """
    group = tl.arange(0, HALF_GROUPS)
    nope = valid[:, None, None]
    if HIGH:
        group += HALF_GROUPS
        nope = nope & (group < NOPE_GROUPS)[None, :, None]
    words = tl.load(
        words_ptr[:, None, None]
        + (group * GROUP_WORDS)[None, :, None]
        + tl.arange(0, GROUP_WORDS)[None, None, :],
        mask=nope,
        other=0,
    )
    scale = tl.load(scales_ptr[:, None] + group[None, :], mask=valid[:, None], other=127)
    return words, scale


@triton.jit
def _dequantise(
    words, scale, rope, HIGH: tl.constexpr, BLOCK_N: tl.constexpr, NATIVE: tl.constexpr
):
    """Half a K tile, [BLOCK_N, 256], of `_load_half`: bf16, or fp32 in the interpreter.

    HIGH takes its last group from `rope`.
    """
    is_nope = (tl.arange(0, HALF_GROUPS) < NOPE_GROUPS - HALF_GROUPS)[None, :, None]
    factor = (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    factor = tl.broadcast_to(factor[:, :, None], (BLOCK_N, HALF_GROUPS, GROUP_WORDS))
    if NATIVE:
        first, second = tl.inline_asm_elementwise(
            _UNPACK_E4M3,
            "=r,=r,r,r",
            [words, factor],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        pairs = tl.reshape(tl.join(first, second), (BLOCK_N, HALF_GROUPS, ROPE_WORDS))
        if HIGH:
            pairs = tl.where(is_nope, pairs, rope[:, None, :])
        even, odd = tl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;",
            "=h,=h,r",
            [pairs],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=1,
        )
        k = tl.reshape(tl.join(even, odd), (BLOCK_N, HALF_DIM))
        # Not pure, so that Triton does not look through it: from a join it concludes that the dot
        # has 8-bit operands, and then loads them without ldmatrix.
        k = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [k], dtype=tl.bfloat16, is_pure=False, pack=2
        )
    else:
        even = tl.join(_e4m3(words, 0), _e4m3(words, 2))
        odd = tl.join(_e4m3(words, 1), _e4m3(words, 3))
        k = tl.join(even, odd) * factor[:, :, :, None, None]
        k = tl.reshape(k, (BLOCK_N, HALF_GROUPS, HEAD_DIM // GROUPS))
        if HIGH:
            even = (rope << 16).to(tl.float32, bitcast=True)
            odd = (rope & -65536).to(tl.float32, bitcast=True)
            rope_values = tl.reshape(tl.join(even, odd), (BLOCK_N, 1, HEAD_DIM // GROUPS))
            k = tl.where(is_nope, k, rope_values)
        k = tl.reshape(k, (BLOCK_N, HALF_DIM))
    return k


@triton.jit
def _e4m3(words, BYTE: tl.constexpr):
    """One byte of each word as the e4m3 that it is, in fp32."""
    byte = (words >> (8 * BYTE)) & 0xFF
    return byte.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)


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


@triton.jit
def _attend(
    k_low,
    k_high,
    valid,
    q_low,
    q_high,
    scale_log2,
    running_max,
    running_sum,
    acc_low,
    acc_high,
    DOT_DTYPE: tl.constexpr,
):
    """Add one tile, two halves [BLOCK_N, 256], to the online softmax; its new state."""
    # Scaled before the sum, which Triton would make one chain of MMAs again.
    s = tl.dot(k_low, tl.trans(q_low)) * scale_log2
    s += tl.dot(k_high, tl.trans(q_high)) * scale_log2
    s = tl.where(valid[:, None], s, MASKED)
    new_max = tl.maximum(running_max, tl.max(s, 0))
    rescale = tl.exp2(running_max - new_max)
    # Before P is staged, so that the two share their shared memory.
    acc_low = acc_low * rescale[:, None]
    acc_high = acc_high * rescale[:, None]
    p = tl.exp2(s - tl.maximum(new_max, MASKED / 2)[None, :])  # 0 where s is MASKED
    running_sum = running_sum * rescale + tl.sum(p, 0)
    p = tl.trans(p).to(DOT_DTYPE)
    acc_low = tl.dot(p, k_low, acc_low)
    acc_high = tl.dot(p, k_high, acc_high)
    return new_max, running_sum, acc_low, acc_high


@triton.jit
def _lse(running_max, running_sum):
    """The base-2 LSE; -inf where no candidate was seen."""
    seen = running_sum > 0
    return tl.where(seen, running_max + tl.log2(tl.where(seen, running_sum, 1.0)), -float("inf"))


@triton.jit
def _rotation(token, positions_ptr, cos_sin_ptr, cos_sin_stride, COLUMNS: tl.constexpr):
    """cos and sin [COLUMNS / 2] of the pairs of a token's last columns; 1 and 0 before RoPE's."""
    pair = tl.arange(0, COLUMNS // 2)
    is_rope = pair >= COLUMNS // 2 - ROPE_WORDS
    row_ptr = cos_sin_ptr + tl.load(positions_ptr + token) * cos_sin_stride
    # Of a multiple of ROPE_WORDS pairs the last are these.
    cos = tl.load(row_ptr + pair % ROPE_WORDS, mask=is_rope, other=1.0)
    sin = tl.load(row_ptr + (ROPE_WORDS + pair % ROPE_WORDS), mask=is_rope, other=0.0)
    return cos[None, :], sin[None, :]


@triton.jit
def _unrotate(x, cos, sin, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows x [ROWS, COLUMNS] without the RoPE of their position."""
    even, odd = tl.split(tl.reshape(x, (ROWS, COLUMNS // 2, 2)))
    return tl.reshape(tl.join(even * cos + odd * sin, odd * cos - even * sin), (ROWS, COLUMNS))


@triton.jit
def _quantise(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """e4m3 of x [ROWS, COLUMNS], and a power of two for each run of 128 columns."""
    runs = tl.reshape(x, (ROWS, COLUMNS // RUN, RUN))
    largest = tl.maximum(tl.max(tl.abs(runs), 2), LEAST)
    exponent = tl.ceil(tl.log2(largest * (1.0 / E4M3_MAX)))
    values = (runs * tl.exp2(-exponent)[:, :, None]).to(tl.float8e4nv)
    return tl.reshape(values, (ROWS, COLUMNS)), tl.exp2(exponent)


@triton.jit(do_not_specialize=RUNTIME_SIZES, do_not_specialize_on_alignment=SCALAR_LOADS)
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
    unpacked_lens_ptr,
    sink_ptr,
    out_ptr,
    lse_ptr,
    softmax_scale,
    num_heads,
    swa_width,
    extra_width,
    table_width,
    unpacked_width,
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
    out_scale_ptr,
    positions_ptr,
    cos_sin_ptr,
    out_scale_stride_t,
    out_scale_stride_h,
    cos_sin_stride,
    SWA_BLOCK: tl.constexpr,
    EXTRA_BLOCK: tl.constexpr,
    HAS_SWA_LENS: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    HAS_EXTRA_LENS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    UNPACKED: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_LSE: tl.constexpr,
    PARTIAL: tl.constexpr,
    QUANTISE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """One query token, BLOCK_H heads, one split of its candidates.

    UNPACKED has the extra candidates' rows in bf16, those of one request by position, at
    `extra_ptr` with `extra_page_stride` values between requests; it takes one split, without
    HAS_EXTRA.
    PARTIAL writes the split's normalised fp32 result and its base-2 LSE (-inf if it saw no
    candidate); otherwise the final bf16 row and, if asked, the natural LSE without the sink.
    QUANTISE writes e4m3 and scales of the final row, without the RoPE of its position.
    """
    head_blocks = tl.cdiv(num_heads, BLOCK_H)
    token, h, head_mask = _place(head_blocks, num_heads, BLOCK_H, False)
    split = tl.program_id(1)
    d = tl.arange(0, HALF_DIM)

    swa_len = swa_width
    if HAS_SWA_LENS:
        swa_len = tl.minimum(tl.load(swa_lens_ptr + token), swa_width)
    swa_tiles = tl.cdiv(tl.maximum(swa_len, 0), BLOCK_N)
    extra_len = 0
    num_tiles = swa_tiles
    if HAS_EXTRA or UNPACKED:
        extra_len = extra_width
        if HAS_EXTRA_LENS:
            extra_len = tl.minimum(tl.load(extra_lens_ptr + token), extra_width)
    if HAS_EXTRA:
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
    q_low = tl.load(q_ptrs, mask=head_mask[:, None], other=0.0).to(DOT_DTYPE)
    q_high = tl.load(q_ptrs + HALF_DIM, mask=head_mask[:, None], other=0.0).to(DOT_DTYPE)

    slot = _load_slots(
        first, swa_tiles, swa_len, extra_len, swa_row_ptr, extra_row_ptr, table_row_ptr,
        table_width, EXTRA_BLOCK, HAS_EXTRA, HAS_TABLE, BLOCK_N,
    )  # fmt: skip
    low, low_scale, high, high_scale, rope = _load_rows(
        first, swa_tiles, slot, swa_ptr, extra_ptr, swa_page_stride, extra_page_stride,
        SWA_BLOCK, EXTRA_BLOCK, HAS_EXTRA,
    )  # fmt: skip
    next_slot = _load_slots(
        first + 1, swa_tiles, swa_len, extra_len, swa_row_ptr, extra_row_ptr, table_row_ptr,
        table_width, EXTRA_BLOCK, HAS_EXTRA, HAS_TABLE, BLOCK_N,
    )  # fmt: skip

    running_max = tl.full((BLOCK_H,), MASKED, tl.float32)
    running_sum = tl.zeros((BLOCK_H,), tl.float32)
    acc_low = tl.zeros((BLOCK_H, HALF_DIM), tl.float32)
    acc_high = tl.zeros((BLOCK_H, HALF_DIM), tl.float32)
    scale_log2 = softmax_scale * LOG2E
    for tile in tl.range(first, last, num_stages=1):
        k_low = _dequantise(low, low_scale, rope, False, BLOCK_N, NATIVE)
        k_high = _dequantise(high, high_scale, rope, True, BLOCK_N, NATIVE)
        valid = slot >= 0
        slot = next_slot
        low, low_scale, high, high_scale, rope = _load_rows(
            tile + 1, swa_tiles, slot, swa_ptr, extra_ptr, swa_page_stride, extra_page_stride,
            SWA_BLOCK, EXTRA_BLOCK, HAS_EXTRA,
        )  # fmt: skip
        next_slot = _load_slots(
            tile + 2, swa_tiles, swa_len, extra_len, swa_row_ptr, extra_row_ptr, table_row_ptr,
            table_width, EXTRA_BLOCK, HAS_EXTRA, HAS_TABLE, BLOCK_N,
        )  # fmt: skip
        running_max, running_sum, acc_low, acc_high = _attend(
            k_low, k_high, valid, q_low, q_high, scale_log2,
            running_max, running_sum, acc_low, acc_high, DOT_DTYPE,
        )  # fmt: skip

    if UNPACKED:
        request = tl.load(request_ids_ptr + token)
        rows = tl.minimum(tl.load(unpacked_lens_ptr + request), unpacked_width)
        request_ptr = extra_ptr + request.to(tl.int64) * extra_page_stride
        position = _load_positions(0, extra_row_ptr, extra_len, BLOCK_N)
        for start in tl.range(0, extra_len, BLOCK_N, num_stages=STAGES):
            valid = (position >= 0) & (position < rows)
            row = tl.where(valid, position, 0).to(tl.int64)
            # Loaded a tile ahead here, or Triton would stage it in shared memory, of which two
            # programs of 32 heads leave none over.
            position = _load_positions(start + BLOCK_N, extra_row_ptr, extra_len, BLOCK_N)
            k_ptrs = request_ptr + row[:, None] * HEAD_DIM + d[None, :]
            k_low = tl.load(k_ptrs).to(DOT_DTYPE)
            k_high = tl.load(k_ptrs + HALF_DIM).to(DOT_DTYPE)
            running_max, running_sum, acc_low, acc_high = _attend(
                k_low, k_high, valid, q_low, q_high, scale_log2,
                running_max, running_sum, acc_low, acc_high, DOT_DTYPE,
            )  # fmt: skip

    # The LSE of a result before its row, that of a part after it: the other way round either spills
    # with 32 heads in Triton 3.7 or 3.8.
    token, h, head_mask = _place(head_blocks, num_heads, BLOCK_H, NATIVE)
    seen = running_sum > 0
    denominator = running_sum
    if HAS_SINK and not PARTIAL:
        sink = tl.load(sink_ptr + h, mask=head_mask, other=-float("inf"))
        # Without candidates the running maximum means nothing; the row is zero either way.
        denominator += tl.exp2(tl.where(seen, sink * LOG2E - running_max, -float("inf")))
    inverse = 1.0 / tl.where(seen, denominator, 1.0)[:, None]
    if HAS_LSE and not PARTIAL:
        lse = _lse(running_max, running_sum)
        tl.store(lse_ptr + token * lse_stride_t + h, lse * LN2, mask=head_mask)
    out_row_ptr = out_ptr + token * out_stride_t
    # A split without candidates leaves its row unwritten: the merge reads it by its LSE only.
    write = head_mask
    if PARTIAL:
        out_row_ptr += split.to(tl.int64) * out_stride_s
        write = head_mask & (running_max > MASKED)
    out_ptrs = out_row_ptr + h[:, None] * out_stride_h + d[None, :]
    if QUANTISE:
        run = tl.arange(0, HALF_DIM // RUN)
        scale_row_ptr = out_scale_ptr + token * out_scale_stride_t
        scale_ptrs = scale_row_ptr + h[:, None] * out_scale_stride_h + run[None, :]
        low = (acc_low * inverse).to(tl.bfloat16).to(tl.float32)
        low, scale = _quantise(low, BLOCK_H, HALF_DIM)
        tl.store(out_ptrs, low, mask=head_mask[:, None])
        tl.store(scale_ptrs, scale, mask=head_mask[:, None])
        # Without extra candidates Triton 3.8 spills what it would keep of the first half's.
        token, h, head_mask = _place(head_blocks, num_heads, BLOCK_H, NATIVE)
        cos, sin = _rotation(token, positions_ptr, cos_sin_ptr, cos_sin_stride, HALF_DIM)
        high = (acc_high * inverse).to(tl.bfloat16).to(tl.float32)
        high = _unrotate(high, cos, sin, BLOCK_H, HALF_DIM)
        high, scale = _quantise(high, BLOCK_H, HALF_DIM)
        tl.store(out_ptrs + HALF_DIM, high, mask=head_mask[:, None])
        tl.store(scale_ptrs + HALF_DIM // RUN, scale, mask=head_mask[:, None])
    else:
        out_dtype = out_ptr.dtype.element_ty
        tl.store(out_ptrs, (acc_low * inverse).to(out_dtype), mask=write[:, None])
        tl.store(out_ptrs + HALF_DIM, (acc_high * inverse).to(out_dtype), mask=write[:, None])
    if PARTIAL:
        lse = _lse(running_max, running_sum)
        lse_row_ptr = lse_ptr + token * lse_stride_t + split.to(tl.int64) * lse_stride_s
        tl.store(lse_row_ptr + h, lse, mask=head_mask)


@triton.jit(
    do_not_specialize=["table_stride", "table_width", "unpacked_width"],
    do_not_specialize_on_alignment=["table_ptr", "unpacked_lens_ptr"],
)
def unpack_rows_kernel(
    cache_ptr,
    table_ptr,
    unpacked_lens_ptr,
    unpacked_ptr,
    page_stride,
    table_stride,
    table_width,
    unpacked_width,
    unpacked_stride,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """BLOCK_N rows of one request, of packed pages, in bf16 and by position.

    Rows past the request's length are not written, but those of its first BLOCK_N, which are zero:
    the attention reads row 0 for candidates that it leaves out.
    """
    request = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_N
    rows = tl.minimum(tl.load(unpacked_lens_ptr + request), unpacked_width)
    if (first < rows) | (first == 0):
        position = first + tl.arange(0, BLOCK_N)
        page = position // BLOCK
        held = (position < rows) & (page < table_width)
        page = tl.load(
            table_ptr + request.to(tl.int64) * table_stride + tl.where(held, page, 0),
            mask=held,
            other=-1,
        )
        slot = tl.where(page < 0, -1, page * BLOCK + position % BLOCK)
        low, low_scale, high, high_scale, rope = _load_rows(
            0, 0, slot, cache_ptr, cache_ptr, page_stride, page_stride, BLOCK, BLOCK, False
        )
        # The value of a masked scale is 1, and of a masked word 0.
        k_low = _dequantise(low, low_scale, rope, False, BLOCK_N, NATIVE)
        k_high = _dequantise(high, high_scale, rope, True, BLOCK_N, NATIVE)
        d = tl.arange(0, HALF_DIM)
        out_ptrs = (
            unpacked_ptr
            + request.to(tl.int64) * unpacked_stride
            + position[:, None].to(tl.int64) * HEAD_DIM
            + d[None, :]
        )
        written = (position < unpacked_width)[:, None]
        tl.store(out_ptrs, k_low.to(tl.bfloat16), mask=written)
        tl.store(out_ptrs + HALF_DIM, k_high.to(tl.bfloat16), mask=written)


@triton.jit(
    do_not_specialize=["num_heads", "num_splits"],
    do_not_specialize_on_alignment=["positions_ptr"],
)
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
    out_scale_ptr,
    positions_ptr,
    cos_sin_ptr,
    out_scale_stride_t,
    out_scale_stride_h,
    cos_sin_stride,
    HAS_SINK: tl.constexpr,
    HAS_LSE: tl.constexpr,
    QUANTISE: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Merge the splits of one token and head, in split order: same inputs, same bits.

    QUANTISE as in `sparse_mla_kernel`.

    A whole row at a time: with the 4 warps side by side on 512 values, each thread has all splits
    of its values and the sum leaves no warp. In blocks of 128 values it went through shared memory,
    47 us on an H100 for 64 tokens, 64 heads and 4 splits, where an H200 now takes 8.
    """
    head = tl.program_id(0) % num_heads
    token = (tl.program_id(0) // num_heads).to(tl.int64)
    d = tl.arange(0, HEAD_DIM)
    s = tl.arange(0, BLOCK_S)
    if QUANTISE:
        # Asked for first, as the parts are: behind their sum it would be waited for again.
        cos, sin = _rotation(token, positions_ptr, cos_sin_ptr, cos_sin_stride, HEAD_DIM)
    lse_in = tl.load(
        partial_lse_ptr + token * partial_lse_stride_t + s * partial_lse_stride_s + head,
        mask=s < num_splits,
        other=-float("inf"),
    )
    part = tl.load(
        partial_ptr
        + token * partial_stride_t
        + s[:, None] * partial_stride_s
        + head * partial_stride_h
        + d[None, :],
        mask=(lse_in > -float("inf"))[:, None],
        other=0.0,
    )
    peak = tl.max(lse_in, 0)
    seen = peak > -float("inf")
    weight = tl.where(lse_in > -float("inf"), tl.exp2(lse_in - tl.where(seen, peak, 0.0)), 0.0)
    total = tl.sum(weight, 0)
    denominator = total
    if HAS_SINK:
        sink = tl.load(sink_ptr + head)
        denominator += tl.exp2(tl.where(seen, sink * LOG2E - peak, -float("inf")))
    if HAS_LSE:
        lse = tl.where(seen, (peak + tl.log2(tl.where(seen, total, 1.0))) * LN2, -float("inf"))
        tl.store(lse_ptr + token * lse_stride_t + head, lse)
    weight = weight / tl.where(seen, denominator, 1.0)
    row = tl.sum(part * weight[:, None], 0)
    out_ptrs = out_ptr + token * out_stride_t + head * out_stride_h + d
    if QUANTISE:
        rows = row.to(tl.bfloat16).to(tl.float32)[None, :]
        rows, scale = _quantise(_unrotate(rows, cos, sin, 1, HEAD_DIM), 1, HEAD_DIM)
        scale_ptr = out_scale_ptr + token * out_scale_stride_t + head * out_scale_stride_h
        tl.store(scale_ptr + tl.arange(0, HEAD_DIM // RUN)[None, :], scale)
        tl.store(out_ptrs[None, :], rows)
    else:
        tl.store(out_ptrs, row.to(out_ptr.dtype.element_ty))

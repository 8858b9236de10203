# SPDX-License-Identifier: Apache-2.0
"""The attention kernel of sparse_mla for Hopper GPUs: wgmma, in Gluon (README.md, "On Hopper").

SM12x has no wgmma. On Hopper, where VLLM_TRITON_MLA_SPARSE=1 asks for our attention, `tl.dot` makes
each warpgroup compute all scores and spills; here layouts, buffers and waits are explicit.

64 heads by 64 candidates, two warpgroups of 4 warps. Each has half of a tile's scores S and 256 of
the 512 columns of the output O, fp32 in registers. K [64, 512] in bf16 has two buffers and is read
by both dots:

    issue S = Q K(i)^T     store half of K(i+1), find the rows of tile i+2
    wait for S, softmax    row maxima and P cross the warpgroups through shared memory
    issue O += P K(i)      store the rest of K(i+1), load the raw rows of tile i+2
    wait for O

Constraints, please keep them when editing:
- O is waited for at the loop's end. Left in flight over the loop's edge, ptxas serialises every
  wgmma (C7514).
- What wgmma reads from shared memory needs `fence_async_shared` between the write, by a thread or
  by cp.async after its wait, and the barrier. P has none: it is read back into registers.
- Raw rows are loaded after that fence, which waits for loads in flight.
- Every register is taken: what the epilogue needs of the place in the grid it works out again.
- As in kernel.py, masked lanes have addresses inside the tensor, and the arguments are the same.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from vllm_sm12x.ops.sparse_mla.gluon_parts import (
    DATA_BYTES,
    GROUP_WORDS,
    GROUPS,
    HEAD_DIM,
    LN2,
    LOG2E,
    MASKED,
    NOPE_GROUPS,
    barrier,
    find_rows,
    find_slots,
    lengths,
    load_entries,
    load_positions,
    token_and_head,
    unpack_e4m3,
    weigh,
)
from vllm_sm12x.ops.sparse_mla.kernel import RUNTIME_SIZES, SCALAR_LOADS

BLOCK_H = gl.constexpr(64)
BLOCK_N = gl.constexpr(64)
# UE8M0 bytes of 1.0.
ONES = gl.constexpr(0x7F7F7F7F)

# Raw words [BLOCK_N, groups, words of a group], 16 bytes a thread.
RAW = gl.constexpr(gl.BlockedLayout([1, 1, 4], [8, 1, 4], [8, 1, 1], [2, 1, 0]))
RAW_ROW = gl.constexpr(gl.SliceLayout(1, gl.SliceLayout(2, RAW.value)))
# bf16 rows of 512, 16 bytes a thread.
ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
COPY_ROW = gl.constexpr(gl.SliceLayout(1, ROWS.value))
# S and O: 4 warps on the heads, and a warpgroup for each half of the columns.
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16]))
SCORES_ROW = gl.constexpr(gl.SliceLayout(1, SCORES.value))
SCORES_COL = gl.constexpr(gl.SliceLayout(0, SCORES.value))
OUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16]))
OUT_ROW = gl.constexpr(gl.SliceLayout(1, OUT.value))
OUT_COL = gl.constexpr(gl.SliceLayout(0, OUT.value))
# Sums [head, warpgroup, thread of a quad], one share of each row for each thread of SCORES.
SHARES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[8, 0, 0]],
        [[0, 0, 1], [0, 0, 2], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0], [0, 1, 0]],
        [],
        [64, 2, 4],
    )
)
SHARES_ROW = gl.constexpr(gl.SliceLayout(1, gl.SliceLayout(2, SHARES.value)))
# Maxima [head, warpgroup], both in each thread that has the head in SCORES.
PEAKS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[8, 0], [0, 1]],
        [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0], [0, 0]],
        [],
        [64, 2],
    )
)
TILE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
# The same bytes in 32-bit words.
TILE_WORDS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2))
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
FLAT_ROWS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def _load_slots(
    tile,
    swa_tiles,
    swa_len,
    extra_len,
    swa_indices_ptr,
    extra_indices_ptr,
    table_ptr,
    table_width,
    EXTRA_BLOCK: gl.constexpr,
    HAS_EXTRA: gl.constexpr,
    HAS_TABLE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    ROW: gl.constexpr,
):
    """The global slots of one tile's candidates, int32 [BLOCK_N]; negative where there is none."""
    entry = load_entries(
        tile, tile + 1, swa_tiles, swa_len, extra_len, swa_indices_ptr, extra_indices_ptr,
        HAS_EXTRA, BLOCK_N, ROW,
    )  # fmt: skip
    return find_slots(
        tile, swa_tiles, entry, table_ptr, table_width, EXTRA_BLOCK, HAS_EXTRA, HAS_TABLE
    )


@gluon.jit
def _row_pointers(
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
    """Where the words and the 8 scale bytes of each row of a tile begin, int32 pointers."""
    words, page, scale_offset, row = find_rows(
        tile, swa_tiles, slot, swa_ptr, extra_ptr, swa_page_stride, extra_page_stride,
        SWA_BLOCK, EXTRA_BLOCK, HAS_EXTRA,
    )  # fmt: skip
    return words + (page + row * DATA_BYTES) // 4, words + (page + scale_offset + row * GROUPS) // 4


@gluon.jit
def _load_groups(words_ptr, valid, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """Raw words [BLOCK_N, COUNT, 16] of each row from group FIRST on."""
    group = gl.arange(0, COUNT, layout=gl.SliceLayout(0, gl.SliceLayout(2, RAW))) + FIRST
    word = gl.arange(0, GROUP_WORDS, layout=gl.SliceLayout(0, gl.SliceLayout(1, RAW)))
    pointers = words_ptr[:, None][:, :, None] + (group * GROUP_WORDS)[None, :][:, :, None]
    return gl.load(pointers + word[None, :][:, None, :], mask=valid[:, None][:, :, None], other=0)


@gluon.jit
def _load_rows(words_ptr, scales_ptr, valid):
    """Raw rows: groups 0-1, 2-3, 4-5, 6 and RoPE (7-8), and scale bytes 0-3 and 4-7."""
    low_scale = gl.load(scales_ptr, mask=valid, other=ONES)
    first = _load_groups(words_ptr, valid, 0, 2)
    second = _load_groups(words_ptr, valid, 2, 2)
    high_scale = gl.load(scales_ptr + 1, mask=valid, other=ONES)
    third = _load_groups(words_ptr, valid, 4, 2)
    last = _load_groups(words_ptr, valid, 6, 1)
    rope = _load_groups(words_ptr, valid, NOPE_GROUPS, 2)
    return low_scale, first, second, high_scale, third, last, rope


@gluon.jit
def _load_tile(
    bias,
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
    """The raw rows of a tile, whose bias is stored."""
    words_ptr, scales_ptr = _row_pointers(
        tile, swa_tiles, slot, swa_ptr, extra_ptr, swa_page_stride, extra_page_stride,
        SWA_BLOCK, EXTRA_BLOCK, HAS_EXTRA,
    )  # fmt: skip
    valid = slot >= 0
    bias.store(gl.where(valid, 0.0, MASKED))
    return _load_rows(words_ptr, scales_ptr, valid)


@gluon.jit
def _store_groups(k_words, words, scale, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """Dequantise groups FIRST to FIRST + COUNT of a tile into shared memory."""
    group = gl.arange(0, COUNT, layout=gl.SliceLayout(0, gl.SliceLayout(2, RAW))) + FIRST % 4
    byte = (scale[:, None] >> (group * 8)[None, :]) & 0xFF
    pairs = unpack_e4m3(words, byte[:, :, None])
    pairs = gl.reshape(pairs, (BLOCK_N, COUNT * 2 * GROUP_WORDS))
    k_words.slice(FIRST * 2 * GROUP_WORDS, COUNT * 2 * GROUP_WORDS, dim=1).store(pairs)


@gluon.jit
def _store_low(k_words, low_scale, first, second):
    """Dequantise the first 256 values of each row."""
    _store_groups(k_words, first, low_scale, 0, 2)
    _store_groups(k_words, second, low_scale, 2, 2)


@gluon.jit
def _store_high(k_words, high_scale, third, last, rope):
    """Dequantise the other 256 values of each row, of which 64 are RoPE's."""
    _store_groups(k_words, third, high_scale, 4, 2)
    _store_groups(k_words, last, high_scale, 6, 1)
    k_words.slice(NOPE_GROUPS * 2 * GROUP_WORDS, 2 * GROUP_WORDS, dim=1).store(
        gl.reshape(rope, (BLOCK_N, 2 * GROUP_WORDS))
    )


@gluon.jit
def _attend(s, bias, scale_log2, running_max, running_sum, acc, peaks, weights, k):
    """Add one tile's scores S to the online softmax, and issue O += P K; the new state."""
    s = s * scale_log2 + bias[None, :]
    peaks.store(gl.max(gl.reshape(s, (BLOCK_H, 2, BLOCK_N // 2)), 2))
    barrier()
    peak = gl.convert_layout(gl.max(peaks.load(PEAKS), 1), SCORES_ROW)
    new_max = gl.maximum(running_max, peak)
    rescale = gl.exp2(running_max - new_max)
    p = gl.exp2(s - gl.maximum(new_max, MASKED / 2)[:, None])  # 0 where the bias is MASKED
    # A thread's own share of each row; the threads' are added at the end.
    share = gl.sum(gl.sum(gl.reshape(p, (BLOCK_H, 2, BLOCK_N // 16, 4, 2)), 4), 2)
    share = gl.convert_layout(share, SHARES)
    factor = gl.convert_layout(rescale, SHARES_ROW)
    running_sum = running_sum * factor[:, None][:, :, None] + share
    weights.store(p.to(gl.bfloat16))
    acc = acc * gl.convert_layout(rescale, OUT_ROW)[:, None]
    barrier()
    acc = warpgroup_mma(weights.load(gl.DotOperandLayout(0, OUT, 2)), k, acc, is_async=True)
    return new_max, running_sum, acc


@gluon.jit(do_not_specialize=RUNTIME_SIZES, do_not_specialize_on_alignment=SCALAR_LOADS)
def sparse_mla_hopper_kernel(
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
    SWA_BLOCK: gl.constexpr,
    EXTRA_BLOCK: gl.constexpr,
    HAS_SWA_LENS: gl.constexpr,
    HAS_EXTRA: gl.constexpr,
    HAS_EXTRA_LENS: gl.constexpr,
    HAS_TABLE: gl.constexpr,
    UNPACKED: gl.constexpr,
    HAS_SINK: gl.constexpr,
    HAS_LSE: gl.constexpr,
    PARTIAL: gl.constexpr,
):
    """One query token, 64 heads, one split of its candidates; as `sparse_mla_kernel`."""
    token, first_head = token_and_head(num_heads, BLOCK_H, False)
    split = gl.program_id(1)
    d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, ROWS))
    h = first_head + gl.arange(0, BLOCK_H, layout=COPY_ROW)

    swa_len, extra_len, swa_tiles, num_tiles = lengths(
        token, swa_lens_ptr, extra_lens_ptr, swa_width, extra_width,
        BLOCK_N, HAS_SWA_LENS, HAS_EXTRA, HAS_EXTRA_LENS, UNPACKED,
    )  # fmt: skip
    swa_row_ptr = swa_indices_ptr + token * swa_indices_stride
    extra_row_ptr = extra_indices_ptr + token * extra_indices_stride
    table_row_ptr = table_ptr
    if HAS_TABLE:
        table_row_ptr = table_ptr + gl.load(request_ids_ptr + token).to(gl.int64) * table_stride

    per_split = gl.cdiv(num_tiles, num_splits)
    first = split * per_split
    last = gl.minimum(first + per_split, num_tiles)

    q = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_H, HEAD_DIM], TILE)
    k_buffers = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK_N, HEAD_DIM], TILE)
    k_words = k_buffers._reinterpret(gl.int32, [2, BLOCK_N, HEAD_DIM // 2], TILE_WORDS)
    weights = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_H, BLOCK_N], TILE)
    peaks = gl.allocate_shared_memory(gl.float32, [BLOCK_H, 2], FLAT_ROWS)
    # For each candidate 0 or MASKED, of the tile that is attended to and of those on their way.
    biases = gl.allocate_shared_memory(gl.float32, [4, BLOCK_N], FLAT)

    q_ptrs = q_ptr + token * q_stride_t + h[:, None] * q_stride_h + d[None, :]
    async_copy.async_copy_global_to_shared(q, q_ptrs, mask=(h < num_heads)[:, None])
    async_copy.commit_group()

    slot = _load_slots(
        first, swa_tiles, swa_len, extra_len, swa_row_ptr, extra_row_ptr, table_row_ptr,
        table_width, EXTRA_BLOCK, HAS_EXTRA, HAS_TABLE, BLOCK_N, RAW_ROW,
    )  # fmt: skip
    next_slot = _load_slots(
        first + 1, swa_tiles, swa_len, extra_len, swa_row_ptr, extra_row_ptr, table_row_ptr,
        table_width, EXTRA_BLOCK, HAS_EXTRA, HAS_TABLE, BLOCK_N, RAW_ROW,
    )  # fmt: skip
    low_scale, raw_0, raw_1, high_scale, raw_2, raw_3, rope = _load_tile(
        biases.index(0), first, swa_tiles, slot, swa_ptr, extra_ptr,
        swa_page_stride, extra_page_stride, SWA_BLOCK, EXTRA_BLOCK, HAS_EXTRA,
    )  # fmt: skip
    _store_low(k_words.index(0), low_scale, raw_0, raw_1)
    _store_high(k_words.index(0), high_scale, raw_2, raw_3, rope)

    low_scale, raw_0, raw_1, high_scale, raw_2, raw_3, rope = _load_tile(
        biases.index(1), first + 1, swa_tiles, next_slot, swa_ptr, extra_ptr,
        swa_page_stride, extra_page_stride, SWA_BLOCK, EXTRA_BLOCK, HAS_EXTRA,
    )  # fmt: skip
    slot = _load_slots(
        first + 2, swa_tiles, swa_len, extra_len, swa_row_ptr, extra_row_ptr, table_row_ptr,
        table_width, EXTRA_BLOCK, HAS_EXTRA, HAS_TABLE, BLOCK_N, RAW_ROW,
    )  # fmt: skip

    running_max = gl.full([BLOCK_H], MASKED, gl.float32, layout=SCORES_ROW)
    running_sum = gl.full([BLOCK_H, 2, 4], 0.0, gl.float32, layout=SHARES)
    zero = gl.full([BLOCK_H, BLOCK_N], 0.0, gl.float32, layout=SCORES)
    acc = gl.full([BLOCK_H, HEAD_DIM], 0.0, gl.float32, layout=OUT)
    scale_log2 = softmax_scale * LOG2E

    async_copy.wait_group(0)
    fence_async_shared()
    barrier()

    for tile in range(first, last):
        place = tile - first
        k = k_buffers.index(place & 1)
        next_k = k_words.index(1 - (place & 1))
        s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        _store_low(next_k, low_scale, raw_0, raw_1)
        valid = slot >= 0
        words_ptr, scales_ptr = _row_pointers(
            tile + 2, swa_tiles, slot, swa_ptr, extra_ptr, swa_page_stride, extra_page_stride,
            SWA_BLOCK, EXTRA_BLOCK, HAS_EXTRA,
        )  # fmt: skip
        slot = _load_slots(
            tile + 3, swa_tiles, swa_len, extra_len, swa_row_ptr, extra_row_ptr, table_row_ptr,
            table_width, EXTRA_BLOCK, HAS_EXTRA, HAS_TABLE, BLOCK_N, RAW_ROW,
        )  # fmt: skip
        bias = biases.index(place & 3).load(SCORES_COL)
        s = warpgroup_mma_wait(0, [s])
        running_max, running_sum, acc = _attend(
            s, bias, scale_log2, running_max, running_sum, acc, peaks, weights, k
        )
        biases.index((place + 2) & 3).store(gl.where(valid, 0.0, MASKED))
        _store_high(next_k, high_scale, raw_2, raw_3, rope)
        fence_async_shared()
        low_scale, raw_0, raw_1, high_scale, raw_2, raw_3, rope = _load_rows(
            words_ptr, scales_ptr, valid
        )
        acc = warpgroup_mma_wait(0, [acc])
        barrier()

    if UNPACKED:
        request = gl.load(request_ids_ptr + token)
        rows = gl.minimum(gl.load(unpacked_lens_ptr + request), unpacked_width)
        request_ptr = extra_ptr + request.to(gl.int64) * extra_page_stride
        position = load_positions(0, extra_row_ptr, extra_len, BLOCK_N, COPY_ROW)
        valid = (position >= 0) & (position < rows)
        row = gl.where(valid, position, 0).to(gl.int64)
        biases.index(0).store(gl.where(valid, 0.0, MASKED))
        position = load_positions(BLOCK_N, extra_row_ptr, extra_len, BLOCK_N, COPY_ROW)
        async_copy.async_copy_global_to_shared(
            k_buffers.index(0), request_ptr + row[:, None] * HEAD_DIM + d[None, :]
        )
        async_copy.commit_group()
        for start in range(0, extra_len, BLOCK_N):
            buffer = (start // BLOCK_N) & 1
            k = k_buffers.index(buffer)
            valid = (position >= 0) & (position < rows)
            row = gl.where(valid, position, 0).to(gl.int64)
            async_copy.wait_group(0)
            fence_async_shared()
            barrier()
            # Every warp has waited for the last tile's O: the other buffer is free.
            async_copy.async_copy_global_to_shared(
                k_buffers.index(1 - buffer), request_ptr + row[:, None] * HEAD_DIM + d[None, :]
            )
            async_copy.commit_group()
            s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
            position = load_positions(
                start + 2 * BLOCK_N, extra_row_ptr, extra_len, BLOCK_N, COPY_ROW
            )
            bias = biases.index(buffer).load(SCORES_COL)
            s = warpgroup_mma_wait(0, [s])
            running_max, running_sum, acc = _attend(
                s, bias, scale_log2, running_max, running_sum, acc, peaks, weights, k
            )
            biases.index(1 - buffer).store(gl.where(valid, 0.0, MASKED))
            acc = warpgroup_mma_wait(0, [acc])
        async_copy.wait_group(0)

    token, first_head = token_and_head(num_heads, BLOCK_H, True)
    running_sum = gl.convert_layout(gl.sum(gl.sum(running_sum, 2), 1), SCORES_ROW)
    head = first_head + gl.arange(0, BLOCK_H, layout=SCORES_ROW)
    inverse, lse = weigh(head, num_heads, running_max, running_sum, sink_ptr, HAS_SINK, PARTIAL)
    if HAS_LSE and not PARTIAL:
        gl.store(lse_ptr + token * lse_stride_t + head, lse * LN2, mask=head < num_heads)
    acc = acc * gl.convert_layout(inverse, OUT_ROW)[:, None]
    if PARTIAL:
        # A split without candidates leaves its row unwritten: the merge reads it by its LSE only.
        write = gl.convert_layout(running_max, OUT_ROW) > MASKED
        h = first_head + gl.arange(0, BLOCK_H, layout=OUT_ROW)
        d = gl.arange(0, HEAD_DIM, layout=OUT_COL)
        part_ptr = out_ptr + token * out_stride_t + split.to(gl.int64) * out_stride_s
        part_ptrs = part_ptr + h[:, None] * out_stride_h + d[None, :]
        gl.store(part_ptrs, acc, mask=(write & (h < num_heads))[:, None])
        lse_row_ptr = lse_ptr + token * lse_stride_t + split.to(gl.int64) * lse_stride_s
        gl.store(lse_row_ptr + head, lse, mask=head < num_heads)
    else:
        # Through Q's memory, which no warp reads any more, for stores of 16 bytes.
        barrier()
        q.store(acc.to(gl.bfloat16))
        barrier()
        h = first_head + gl.arange(0, BLOCK_H, layout=COPY_ROW)
        out_ptrs = out_ptr + token * out_stride_t + h[:, None] * out_stride_h + d[None, :]
        gl.store(out_ptrs, q.load(ROWS), mask=(h < num_heads)[:, None])

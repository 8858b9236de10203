# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of paged_mqa_topk.

A program streams the keys of one request past BLOCK_M of its query rows, CHUNK keys at a time. The
scores of a chunk are stored, and read back in a layout that suits selection. Each row has a list of
candidates and a bound, a score that TOPK of them reach; what reaches it is appended. A list without
room for another chunk is cut, which raises its bound.

Scores are selected as unsigned integers in the same order, "ranks"; 0 is below every score.
"""

import triton
import triton.language as tl

HEAD_DIM = tl.constexpr(128)


@triton.jit
def _rank(score):
    """uint32 in the order of fp32; NaN ranks as -inf, and -inf above 0."""
    bits = tl.where(score == score, score, -float("inf")).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -(2**31))).to(tl.uint32, bitcast=True)


@triton.jit
def _select(rank, limit, TOPK: tl.constexpr):
    """At least the TOPK largest of `rank` [N], and at most `limit` >= TOPK; all if there are fewer.

    0 is an empty place. Ties go by place.

    Returns:
        (least, count, slot, keep): the least rank that a later score needs; how many are kept;
        where they go, from 0 on, and which those are [N].
    """
    threshold = tl.full((), 0, tl.uint32)
    count = tl.sum((rank > 0).to(tl.int32), 0)
    bit = 31
    while (bit >= 0) & (count > limit):
        higher = threshold | (tl.full((), 1, tl.uint32) << bit)
        reached = tl.sum((rank >= higher).to(tl.int32), 0)
        threshold = tl.where(reached >= TOPK, higher, threshold)
        count = tl.where(reached >= TOPK, reached, count)
        bit -= 1
    # Too many after the last bit: ties, of which some have to go.
    tied = count > limit
    kept = tl.where(tied, TOPK, count)
    least = tl.where(tied, threshold + 1, tl.maximum(threshold, 1))
    above = (rank > threshold).to(tl.int32)
    equal = ((rank == threshold) & (rank > 0)).to(tl.int32)
    # Both running counts in one scan: N is less than 2**15.
    places = tl.cumsum(above + (equal << 16), 0)
    slot = tl.where(above != 0, places & 0xFFFF, tl.sum(above, 0) + (places >> 16)) - 1
    return least, kept, slot, (above + equal != 0) & (slot < kept)


@triton.jit
def _cut_list(ranks_ptr, positions_ptr, count, limit, TOPK: tl.constexpr, CAPACITY: tl.constexpr):
    """Cut one list, as `_select` does: its new count and least rank."""
    place = tl.arange(0, CAPACITY)
    filled = place < count
    rank = tl.load(ranks_ptr + place, mask=filled, other=0).to(tl.uint32, bitcast=True)
    least, count, slot, keep = _select(rank, limit, TOPK)
    position = tl.load(positions_ptr + place, mask=keep, other=0)
    tl.debug_barrier()  # every thread has read its part of the list
    tl.store(ranks_ptr + slot, rank.to(tl.int32, bitcast=True), mask=keep)
    tl.store(positions_ptr + slot, position, mask=keep)
    return least, count


@triton.jit
def _part_row(query_start_loc_ptr, request, part_start, part_rows):
    """First row of a request, counted from the part's first row and kept within the part."""
    row = tl.load(query_start_loc_ptr + request) - part_start
    return tl.maximum(tl.minimum(row, part_rows), 0)


# Sizes that change from call to call: specialising on them would only compile more variants. So
# would the alignment of what is read one number at a time and begins at any request.
@triton.jit(
    do_not_specialize=["part_start", "part_rows", "num_requests", "table_width", "table_stride"],
    do_not_specialize_on_alignment=["query_start_loc_ptr", "lens_ptr", "block_table_ptr"],
)
def paged_mqa_topk_kernel(
    q_ptr,
    cache_ptr,
    weights_ptr,
    query_start_loc_ptr,
    lens_ptr,
    block_table_ptr,
    scores_ptr,
    ranks_ptr,
    positions_ptr,
    counts_ptr,
    out_ptr,
    part_start,
    part_rows,
    num_requests,
    table_width,
    q_stride_t,
    q_stride_h,
    page_stride,
    weights_stride,
    table_stride,
    out_stride,
    BLOCK_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    TOPK: tl.constexpr,
    SPLITS: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """BLOCK_M rows of one request, all heads, and one of SPLITS equal shares of its keys.

    With one split the selected positions go to `out`; with more they stay in the lists, and their
    number goes to `counts`.
    """
    # A request has at most as many tiles as lie between first_tile(r) = first row // BLOCK_M + r
    # and first_tile(r + 1): so a search finds a tile's request without sums over the requests.
    # Later rows see more keys: they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    split = tl.program_id(1)
    low = 0
    high = num_requests
    while low < high:
        middle = (low + high) // 2
        row = _part_row(query_start_loc_ptr, middle, part_start, part_rows)
        if row // BLOCK_M + middle <= tile:
            low = middle + 1
        else:
            high = middle
    request = low - 1
    if request < 0:
        return
    start = _part_row(query_start_loc_ptr, request, part_start, part_rows)
    end = _part_row(query_start_loc_ptr, request + 1, part_start, part_rows)
    first_row = start + (tile - start // BLOCK_M - request) * BLOCK_M
    if first_row >= end:
        return

    # Row numbers below count from part_start + first_row.
    first_row = first_row.to(tl.int64)
    num_rows = (end - first_row).to(tl.int32)
    q_ptr += (part_start + first_row) * q_stride_t
    weights_ptr += (part_start + first_row) * weights_stride
    list_stride = SPLITS * CAPACITY
    scores_ptr += (first_row * SPLITS + split) * (2 * CHUNK)
    ranks_ptr += first_row * list_stride + split * CAPACITY
    positions_ptr += first_row * list_stride + split * CAPACITY
    table_row_ptr = block_table_ptr + tl.cast(request, tl.int64) * table_stride

    m = tl.arange(0, BLOCK_M)
    lens = tl.load(lens_ptr + part_start + first_row + m, mask=m < num_rows, other=0)
    most = tl.minimum(table_width.to(tl.int64) * BLOCK_SIZE, 2147483647).to(tl.int32)
    lens = tl.maximum(tl.minimum(lens, most), 0)
    limit = tl.max(lens, 0)
    num_tiles = tl.cdiv(limit, BLOCK_N)
    share = tl.cdiv(num_tiles, SPLITS)
    first = split * share
    last = tl.minimum(first + share, num_tiles)
    if first >= last:
        return

    # All rows' heads side by side on the dot's N axis.
    column = tl.arange(0, BLOCK_M * BLOCK_H)
    row = column // BLOCK_H
    head = column % BLOCK_H
    present = (row < num_rows) & (head < NUM_HEADS)
    d = tl.arange(0, HEAD_DIM)
    q = tl.load(
        q_ptr + (row.to(tl.int64) * q_stride_t + head * q_stride_h)[:, None] + d[None, :],
        mask=present[:, None],
        other=0.0,
    ).to(DOT_DTYPE)

    keys_ptr = cache_ptr.to(tl.pointer_type(tl.float8e4nv))
    scales_ptr = (cache_ptr + BLOCK_SIZE * HEAD_DIM).to(tl.pointer_type(tl.float32))
    list_offset = m * list_stride
    score_offset = m * (SPLITS * 2 * CHUNK)
    i = tl.arange(0, BLOCK_N)
    key_offsets = (i * HEAD_DIM)[:, None] + d[None, :]
    score_offsets = i[:, None] + score_offset[None, :]
    count = tl.zeros((BLOCK_M,), tl.int32)
    least = tl.zeros((BLOCK_M,), tl.uint32) + 1
    buffer = 0
    while first < last:
        # Scores of up to CHUNK keys. Two buffers by turns: the other one may still be read.
        stop = tl.minimum(first + CHUNK // BLOCK_N, last)
        weights = tl.load(
            weights_ptr + row.to(tl.int64) * weights_stride + head, mask=present, other=0.0
        )
        for key_tile in tl.range(first, stop, num_stages=NUM_STAGES):
            first_key = key_tile * BLOCK_N
            if BLOCK_SIZE % BLOCK_N == 0:
                page = tl.load(table_row_ptr + first_key // BLOCK_SIZE).to(tl.int64)
                page_start = page * page_stride
                in_page = first_key % BLOCK_SIZE
                # What lies past the context is in the page, and is not used: no mask is needed.
                k = tl.load(keys_ptr + (page_start + in_page * HEAD_DIM) + key_offsets)
                k_scale = tl.load(scales_ptr + (page_start // 4 + in_page) + i)
            else:
                n = first_key + i
                in_page = n % BLOCK_SIZE
                valid = n < limit
                page = tl.load(table_row_ptr + n // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
                page_start = page * page_stride
                k = tl.load(
                    keys_ptr + (page_start + in_page * HEAD_DIM)[:, None] + d[None, :],
                    mask=valid[:, None],
                    other=0.0,
                )
                k_scale = tl.load(scales_ptr + page_start // 4 + in_page, mask=valid, other=0.0)
            scores = tl.dot(k.to(DOT_DTYPE), tl.trans(q))  # [BLOCK_N, BLOCK_M * BLOCK_H]
            scores = tl.maximum(scores, 0.0) * weights[None, :]
            scores = tl.sum(tl.reshape(scores, (BLOCK_N, BLOCK_M, BLOCK_H)), 2) * k_scale[:, None]
            tl.store(
                scores_ptr + (buffer + first_key - first * BLOCK_N) + score_offsets,
                scores,
                mask=(m < num_rows)[None, :],
            )
        tl.debug_barrier()

        # Append what reaches the lists' bounds.
        slot = tl.arange(0, CHUNK)[None, :]
        n = first * BLOCK_N + slot
        seen = n < tl.minimum(lens, stop * BLOCK_N)[:, None]
        score = tl.load(scores_ptr + score_offset[:, None] + (buffer + slot), mask=seen, other=0.0)
        rank = tl.where(seen, _rank(score), 0)
        hit = rank >= least[:, None]
        hits = tl.cumsum(hit.to(tl.int32), 1)
        place = list_offset[:, None] + (count[:, None] + hits - 1)
        tl.store(ranks_ptr + place, rank.to(tl.int32, bitcast=True), mask=hit)
        tl.store(positions_ptr + place, tl.broadcast_to(n, (BLOCK_M, CHUNK)), mask=hit)
        count += tl.max(hits, 1)
        first = stop
        buffer = CHUNK - buffer

        # Cut lists that have no room for another chunk; not further than it must be, except at the
        # end: that takes fewer steps.
        full = tl.where(first < last, CAPACITY - CHUNK, TOPK)
        if tl.max(count, 0) > full:
            keep_most = tl.where(first < last, TOPK + (CAPACITY - CHUNK - TOPK) // 4, TOPK)
            tl.debug_barrier()  # the lists are read by other threads than those that wrote them
            for list_row in tl.range(0, BLOCK_M):
                own = m == list_row
                row_count = tl.sum(tl.where(own, count, 0), 0)
                if row_count > full:
                    row_least, row_count = _cut_list(
                        ranks_ptr + list_row * list_stride,
                        positions_ptr + list_row * list_stride,
                        row_count,
                        keep_most,
                        TOPK,
                        CAPACITY,
                    )
                    count = tl.where(own, row_count, count)
                    least = tl.where(own, row_least, least)
    tl.debug_barrier()

    if SPLITS == 1:
        slot = tl.arange(0, BLOCK_K)
        selected = slot[None, :] < count[:, None]
        position = tl.load(
            positions_ptr + list_offset[:, None] + slot[None, :], mask=selected, other=0
        )
        out_row_ptrs = out_ptr + (part_start + first_row + m) * out_stride
        tl.store(out_row_ptrs[:, None] + slot[None, :], position, mask=selected)
    else:
        tl.store(counts_ptr + (first_row + m) * SPLITS + split, count, mask=m < num_rows)


@triton.jit(do_not_specialize=["part_start"])
def merge_splits_kernel(
    ranks_ptr,
    positions_ptr,
    counts_ptr,
    out_ptr,
    part_start,
    out_stride,
    TOPK: tl.constexpr,
    SPLITS: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The best TOPK of one row's lists."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_S * BLOCK_K)
    split = i // BLOCK_K
    slot = i % BLOCK_K
    count = tl.load(counts_ptr + row * SPLITS + split, mask=split < SPLITS, other=0)
    filled = slot < count
    place = (row * SPLITS + split) * CAPACITY + slot
    rank = tl.load(ranks_ptr + place, mask=filled, other=0).to(tl.uint32, bitcast=True)
    _, _, slot, keep = _select(rank, TOPK, TOPK)
    position = tl.load(positions_ptr + place, mask=keep, other=0)
    tl.store(out_ptr + (part_start + row) * out_stride + slot, position, mask=keep)

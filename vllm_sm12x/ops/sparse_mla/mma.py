# SPDX-License-Identifier: Apache-2.0
"""The attention kernel of sparse_mla for more than 32 heads on SM12x: mma.sync, in Gluon.

`tl.dot` in kernel.py reads both operands of both dots from shared memory, and that is what the loop
over candidates waits for. Here Q stays in registers (README.md, "Q in registers").

64 heads by 16 candidates, 8 warps: 4 groups of 16 heads, times 2 halves of a row. A warp has Q and
O of its 16 heads and 256 columns, in 64 and 128 registers of a thread. Its scores are a share, of
its half of each row; the two warps of a group add theirs through shared memory, and both compute
the same P. K [2 halves, 16, 256] in bf16 has three buffers, and the packed rows that it is made of
have two:

    wait for the packed rows of tile i+2
    barrier
    S of tile i: both shares, scaled, + bias
    K(i+2) from the packed rows
    barrier (Triton's)
    copy the packed rows of tile i+4; bias of tile i+4, slots of tile i+5
    softmax of tile i
    O += P K(i), and among its MMAs those of the shares of Q K(i+1)
    store the shares

Constraints, please keep them when editing:
- Every register is taken, and since Triton 3.7 ptxas keeps on the stack what it finds no room for,
  addresses first. K is in parts of 64 columns, so that parts differ by an immediate only. O leaves
  in another layout than Q came, or addresses would be kept from one to the other. The place in the
  grid is worked out again at the end. Order matters: look at every release (tests/compile).
- Triton knows an allocation, not the part of it that is used: its barrier between the store of
  K(i+2) and the loads of K(i+1) is not needed for K. It is what keeps the shares of tile i and the
  packed rows of tile i+2 until all warps have read them.
- A tile's rows are stored by one store, and copied by one copy: between two Triton puts a barrier.
- What a turn loads for the next one must not be moved to another register: it would be waited for.
- The exchange and the packed rows have 16 bytes of a thread side by side, and those of a warp's
  threads in their order: loads and stores of 16 bytes without bank conflicts.
- As in kernel.py, masked lanes have addresses inside the tensor, and the arguments are the same.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from vllm_sm12x.ops.sparse_mla.gluon_parts import (
    DATA_BYTES,
    GROUP_WORDS,
    GROUPS,
    HEAD_DIM,
    LN2,
    LOG2E,
    MASKED,
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
from vllm_sm12x.ops.sparse_mla.kernel import (
    E4M3_MAX,
    LEAST,
    ROPE_WORDS,
    RUN,
    RUNTIME_SIZES,
    SCALAR_LOADS,
)

BLOCK_H = gl.constexpr(64)
BLOCK_N = gl.constexpr(16)
HALF = gl.constexpr(256)
# Groups of a half; the last one of the high half is RoPE's.
HALF_GROUPS = gl.constexpr(4)
BUFFERS = gl.constexpr(3)
# Of packed rows, and so many tiles have their slots before the first is attended to.
RAW_BUFFERS = gl.constexpr(2)
LEAD = gl.constexpr(5)
# Of Q and O, each of 64 columns of both halves.
PARTS = gl.constexpr(4)
PART = gl.constexpr(64)

# S and O: [half, head, column].
MMA = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [2, 4, 1], [1, 16, 8]))
Q_OPERAND = gl.constexpr(gl.DotOperandLayout(0, MMA.value, 2))
K_OPERAND = gl.constexpr(gl.DotOperandLayout(1, MMA.value, 2))
SCORES = gl.constexpr(gl.SliceLayout(0, MMA.value))
SCORES_ROW = gl.constexpr(gl.SliceLayout(1, SCORES.value))
SCORES_COL = gl.constexpr(gl.SliceLayout(0, SCORES.value))
# Sums [head, thread of a quad]: a thread's own share of its rows.
SHARES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[8, 0]],
        [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0], [0, 0]],
        [],
        [64, 4],
    )
)
SHARES_ROW = gl.constexpr(gl.SliceLayout(1, SHARES.value))
# bf16 rows [part, half, row, 64], 16 bytes a thread, 128 of a row and instruction.
COPY = gl.constexpr(gl.BlockedLayout([1, 1, 1, 8], [1, 1, 4, 8], [1, 2, 4, 1], [3, 2, 1, 0]))
COPY_ROW = gl.constexpr(gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(3, COPY.value))))
COPY_PART = gl.constexpr(gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, COPY.value))))
COPY_HALF = gl.constexpr(gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, COPY.value))))
COPY_COL = gl.constexpr(gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(0, COPY.value))))
# Raw words [row, group, word], 16 bytes a thread, and 32 bytes of what they unpack to.
RAW = gl.constexpr(gl.BlockedLayout([1, 1, 4], [8, 1, 4], [2, 4, 1], [2, 1, 0]))
RAW_ROW = gl.constexpr(gl.SliceLayout(1, gl.SliceLayout(2, RAW.value)))
RAW_GROUP = gl.constexpr(gl.SliceLayout(0, gl.SliceLayout(2, RAW.value)))
RAW_WORD = gl.constexpr(gl.SliceLayout(0, gl.SliceLayout(1, RAW.value)))
RAW_ROW_GROUP = gl.constexpr(gl.SliceLayout(2, RAW.value))
SCALE_WORD = gl.constexpr(gl.SliceLayout(0, gl.SliceLayout(2, RAW.value)))
PAIRS = gl.constexpr(gl.BlockedLayout([1, 1, 8], [8, 1, 4], [2, 4, 1], [2, 1, 0]))
PAIRS_GROUP = gl.constexpr(gl.SliceLayout(0, gl.SliceLayout(2, PAIRS.value)))
# One part [half, row, 64], all of them, and the same bytes in 32-bit words.
TILE = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0]))
TILES = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [3, 2, 1, 0]))
TILES_WORDS = gl.constexpr(gl.SwizzledSharedLayout(4, 1, 8, [3, 2, 1, 0]))
# The result [half, head, 256], and 16 bytes of it a thread.
OUT = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 16, [2, 1, 0]))
OUT_COPY = gl.constexpr(gl.BlockedLayout([1, 1, 8], [1, 1, 32], [2, 4, 1], [2, 1, 0]))
OUT_HALF = gl.constexpr(gl.SliceLayout(1, gl.SliceLayout(2, OUT_COPY.value)))
OUT_ROW = gl.constexpr(gl.SliceLayout(0, gl.SliceLayout(2, OUT_COPY.value)))
OUT_COL = gl.constexpr(gl.SliceLayout(0, gl.SliceLayout(0, OUT_COPY.value)))
# The same rows, as pairs of columns.
OUT_PAIRS = gl.constexpr(gl.BlockedLayout([1, 1, 4], [1, 1, 32], [2, 4, 1], [2, 1, 0]))
PAIRS_HALF = gl.constexpr(gl.SliceLayout(1, gl.SliceLayout(2, OUT_PAIRS.value)))
PAIRS_COL = gl.constexpr(gl.SliceLayout(0, gl.SliceLayout(0, OUT_PAIRS.value)))
# Their scales [half, head, run].
SCALE_COPY = gl.constexpr(gl.BlockedLayout([1, 1, 1], [1, 16, 2], [2, 4, 1], [2, 1, 0]))
SCALE_HALF = gl.constexpr(gl.SliceLayout(1, gl.SliceLayout(2, SCALE_COPY.value)))
SCALE_ROW = gl.constexpr(gl.SliceLayout(0, gl.SliceLayout(2, SCALE_COPY.value)))
SCALE_RUN = gl.constexpr(gl.SliceLayout(0, gl.SliceLayout(0, SCALE_COPY.value)))
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
# Raw words in the order of the threads of RAW, and scale bytes [row, 8] in 32-bit words.
RAW_MEMORY = gl.constexpr(
    gl.SharedLinearLayout(
        [
            *([0, 0, 1], [0, 0, 2]),
            *([0, 0, 4], [0, 0, 8], [1, 0, 0], [2, 0, 0], [4, 0, 0]),
            *([0, 1, 0], [0, 2, 0], [8, 0, 0]),
        ],
        [],
        16,
    )
)
SCALES = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
# Shares of scores [half, head, candidate], and those of one half: of a thread 16 bytes, then the
# lanes, then its other 16 bytes and the warps.
EXCHANGE_HALF = gl.constexpr(
    gl.SharedLinearLayout(
        [
            *([0, 1], [8, 0]),
            *([0, 2], [0, 4], [1, 0], [2, 0], [4, 0]),
            *([0, 8], [16, 0], [32, 0]),
        ],
        [],
        16,
    )
)
EXCHANGE = gl.constexpr(
    gl.SharedLinearLayout(
        [
            *([0, 0, 1], [0, 8, 0]),
            *([0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]),
            *([0, 0, 8], [0, 16, 0], [0, 32, 0], [1, 0, 0]),
        ],
        [],
        16,
    )
)


@gluon.jit
def _columns():
    """Where in a row its values are, [part, half, 1, 64]."""
    part = gl.arange(0, PARTS, layout=COPY_PART)[:, None][:, :, None][:, :, :, None]
    half = gl.arange(0, 2, layout=COPY_HALF)[None, :][:, :, None][:, :, :, None]
    column = gl.arange(0, PART, layout=COPY_COL)[None, :][None, :, :][None, :, :, :]
    return half * HALF + part * PART + column


@gluon.jit
def _of_rows(row):
    """[row] as [1, 1, row, 1]."""
    return row[None, :][None, :, :][:, :, :, None]


@gluon.jit
def _first_entries(
    first, last, swa_tiles, swa_len, extra_len, swa_indices_ptr, extra_indices_ptr, HAS_EXTRA
):
    """What the lists have for the first tiles. All are asked for before one is waited for."""
    entries = ()
    for i in gl.static_range(LEAD + 1):
        entry = load_entries(
            first + i, last, swa_tiles, swa_len, extra_len, swa_indices_ptr, extra_indices_ptr,
            HAS_EXTRA, BLOCK_N, RAW_ROW,
        )  # fmt: skip
        entries = entries + (entry,)
    return entries


@gluon.jit
def _first_slots(
    first, swa_tiles, entries, table_ptr, table_width, EXTRA_BLOCK, HAS_EXTRA, HAS_TABLE
):
    """The global slots of all entries but the last."""
    slots = ()
    for i in gl.static_range(LEAD):
        slot = find_slots(
            first + i, swa_tiles, entries[i], table_ptr, table_width,
            EXTRA_BLOCK, HAS_EXTRA, HAS_TABLE,
        )  # fmt: skip
        slots = slots + (slot,)
    return slots


@gluon.jit
def _copy_raw(
    memory,
    buffer,
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
    """Copy a tile's packed rows to a buffer of `memory`, in a group of copies; zeros for no row.

    In place of the high half's last group are words of RoPE, which has twice as many: 4 of each 8
    there, and the other 4 in the rest.
    """
    low, high, rest, scales = memory
    words_ptr, page, scale_offset, row = find_rows(
        tile, swa_tiles, slot, swa_ptr, extra_ptr, swa_page_stride, extra_page_stride,
        SWA_BLOCK, EXTRA_BLOCK, HAS_EXTRA,
    )  # fmt: skip
    # Within a page in 32 bits: sums with the pointer would stay in registers, 64 bits each.
    words_ptr += page // 4
    valid = slot >= 0
    scale = (scale_offset + row * GROUPS) // 4
    scale = scale[:, None] + gl.arange(0, 2, layout=SCALE_WORD)[None, :]
    async_copy.async_copy_global_to_shared(
        scales.index(buffer), words_ptr[:, None] + scale, mask=valid[:, None]
    )
    group = gl.arange(0, HALF_GROUPS, layout=RAW_GROUP)[None, :][:, :, None]
    word = gl.arange(0, GROUP_WORDS, layout=RAW_WORD)[None, :][:, None, :]
    valid = valid[:, None][:, :, None]
    words_ptr = words_ptr[:, None][:, :, None]
    row = (row * (DATA_BYTES // 4))[:, None][:, :, None]
    async_copy.async_copy_global_to_shared(
        low.index(buffer), words_ptr + (row + (group * GROUP_WORDS + word)), mask=valid
    )
    # Word 4 c + j of RoPE's group is word 8 c + j of RoPE, and of the rest word 8 c + 4 + j.
    is_rope = group == HALF_GROUPS - 1
    at = (group + HALF_GROUPS) * GROUP_WORDS + word + gl.where(is_rope, word // 4 * 4, 0)
    at = gl.max_contiguous(gl.multiple_of(at, [1, 1, 4]), [1, 1, 4])
    async_copy.async_copy_global_to_shared(high.index(buffer), words_ptr + (row + at), mask=valid)
    async_copy.async_copy_global_to_shared(
        rest.index(buffer), words_ptr + (row + at + 4), mask=valid & is_rope
    )
    async_copy.commit_group()


@gluon.jit
def _pairs(words, scale):
    """bf16 pairs [BLOCK_N, 4, 32] of a half's raw words, and scale bytes [BLOCK_N, 4]."""
    pairs = unpack_e4m3(words, scale.to(gl.int32)[:, :, None])
    return gl.convert_layout(gl.reshape(pairs, (BLOCK_N, HALF_GROUPS, 2 * GROUP_WORDS)), PAIRS)


@gluon.jit
def _dequantise(k_words, memory, buffer):
    """Dequantise a buffer's rows to words [part, half, BLOCK_N, 32]: a part is a group."""
    low, high, rest, scales = memory
    scales = scales._reinterpret(gl.uint8, [RAW_BUFFERS, BLOCK_N, GROUPS], SCALES).index(buffer)
    low_scale = scales.slice(0, HALF_GROUPS, dim=1).load(RAW_ROW_GROUP)
    high_scale = scales.slice(HALF_GROUPS, HALF_GROUPS, dim=1).load(RAW_ROW_GROUP)
    low = _pairs(low.index(buffer).load(RAW), low_scale)
    words = high.index(buffer).load(RAW)
    pairs = _pairs(words, high_scale)
    quads: gl.constexpr = (BLOCK_N, HALF_GROUPS, 4, 4)
    # [row, group, c, j, which]
    rope = gl.join(gl.reshape(words, quads), gl.reshape(rest.index(buffer).load(RAW), quads))
    rope = gl.reshape(gl.permute(rope, (0, 1, 2, 4, 3)), (BLOCK_N, HALF_GROUPS, 2 * GROUP_WORDS))
    rope = gl.convert_layout(rope, PAIRS)
    is_rope = gl.arange(0, HALF_GROUPS, layout=PAIRS_GROUP) == HALF_GROUPS - 1
    pairs = gl.where(is_rope[None, :][:, :, None], rope, pairs)
    k_words.store(gl.permute(gl.join(low, pairs), (1, 3, 0, 2)))


@gluon.jit
def _copy_rows(k_copies, bias, request_ptr, position, rows):
    """Copy a tile's unpacked rows to shared memory, and store its bias."""
    valid = (position >= 0) & (position < rows)
    row = gl.where(valid, position, 0).to(gl.int64) * HEAD_DIM
    async_copy.async_copy_global_to_shared(k_copies, request_ptr + (_of_rows(row) + _columns()))
    bias.store(gl.where(valid, 0.0, MASKED))


@gluon.jit
def _copy_positions(memory, first, indices_ptr, limit):
    """Copy the entries of one index row from `first` on to shared memory."""
    n = first + gl.arange(0, BLOCK_N, layout=COPY_ROW)
    async_copy.async_copy_global_to_shared(memory, indices_ptr + n, mask=n < limit)


@gluon.jit
def _multiply(q, k_parts, buffer):
    """Shares [half, head, BLOCK_N] of the scores of the tile that is in a buffer."""
    s = gl.full([2, BLOCK_H, BLOCK_N], 0.0, gl.float32, layout=MMA)
    for i in gl.static_range(PARTS):
        s = mma_v2(q[i], k_parts.index(buffer * PARTS + i).permute((0, 2, 1)).load(K_OPERAND), s)
    return s


@gluon.jit
def _tile_weights(s, running_max, running_sum):
    """P of a tile's scaled and masked scores S, what O is to be rescaled by, and the new state."""
    new_max = gl.maximum(running_max, gl.max(s, 1))
    rescale = gl.exp2(running_max - new_max)
    p = gl.exp2(s - gl.maximum(new_max, MASKED / 2)[:, None])  # 0 where the bias is MASKED
    # A thread's own share of each row; the threads' are added at the end.
    share = gl.sum(gl.sum(gl.reshape(p, (BLOCK_H, BLOCK_N // 8, 4, 2)), 3), 1)
    share = gl.convert_layout(share, SHARES)
    factor = gl.convert_layout(rescale, SHARES_ROW)
    running_sum = running_sum * factor[:, None] + share
    p = gl.convert_layout(p.to(gl.bfloat16), SCORES)[None, :, :]
    p = gl.broadcast(p, gl.full([2, BLOCK_H, BLOCK_N], 0.0, gl.bfloat16, layout=MMA))[0]
    return gl.convert_layout(p, Q_OPERAND), rescale[:, None][None, :, :], new_max, running_sum


@gluon.jit
def _multiply_both(p, rescale, acc, q, k_parts, buffer, after):
    """O with P K of a buffer's tile, and the shares of the scores of the tile after it.

    MMAs of the shares, each of which waits for the last, stand among those of P K, which do not.
    """
    s = gl.full([2, BLOCK_H, BLOCK_N], 0.0, gl.float32, layout=MMA)
    parts = ()
    for i in gl.static_range(PARTS):
        k = k_parts.index(after * PARTS + i).permute((0, 2, 1)).load(K_OPERAND)
        s = mma_v2(q[i], k, s)
        k = k_parts.index(buffer * PARTS + i).load(K_OPERAND)
        parts = parts + (mma_v2(p, k, acc[i] * rescale),)
    return parts, s


@gluon.jit
def _unrotate(x, cos_sin_row_ptr):
    """Rows x [half, head, HALF], without the RoPE of a position."""
    half = gl.arange(0, 2, layout=PAIRS_HALF)[:, None][:, :, None]
    pair = gl.arange(0, HALF // 2, layout=PAIRS_COL)[None, :][None, :, :]
    is_rope = half * (HALF // 2) + pair >= HALF - ROPE_WORDS
    # A half is a multiple of ROPE_WORDS pairs, of which the last are these.
    cos = gl.load(cos_sin_row_ptr + pair % ROPE_WORDS, mask=is_rope, other=1.0)
    sin = gl.load(cos_sin_row_ptr + (ROPE_WORDS + pair % ROPE_WORDS), mask=is_rope, other=0.0)
    even, odd = gl.split(gl.reshape(x, (2, BLOCK_H, HALF // 2, 2)))
    even = gl.convert_layout(even, OUT_PAIRS)
    odd = gl.convert_layout(odd, OUT_PAIRS)
    rows = gl.join(even * cos + odd * sin, odd * cos - even * sin)
    return gl.reshape(rows, (2, BLOCK_H, HALF))


@gluon.jit
def _quantise(x):
    """e4m3 of rows x [half, head, HALF], and a power of two for each run of 128 columns."""
    runs = gl.reshape(x, (2, BLOCK_H, HALF // RUN, RUN))
    largest = gl.maximum(gl.max(gl.abs(runs), 3), LEAST)
    exponent = gl.ceil(gl.log2(largest * (1.0 / E4M3_MAX)))
    values = (runs * gl.exp2(-exponent)[:, :, :, None]).to(gl.float8e4nv)
    return gl.reshape(values, (2, BLOCK_H, HALF)), gl.exp2(exponent)


@gluon.jit(do_not_specialize=RUNTIME_SIZES, do_not_specialize_on_alignment=SCALAR_LOADS)
def sparse_mla_mma_kernel(
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
    QUANTISE: gl.constexpr,
):
    """One query token, 64 heads, one split of its candidates; as `sparse_mla_kernel`."""
    token, first_head = token_and_head(num_heads, BLOCK_H, False)
    split = gl.program_id(1)
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

    # Q by way of shared memory, which is K's afterwards.
    h = first_head + gl.arange(0, BLOCK_H, layout=COPY_ROW)
    q_memory = gl.allocate_shared_memory(gl.bfloat16, [PARTS, 2, BLOCK_H, PART], TILE)
    async_copy.async_copy_global_to_shared(
        q_memory._reinterpret(gl.bfloat16, [PARTS, 2, BLOCK_H, PART], TILES),
        q_ptr + token * q_stride_t + (_of_rows(h * q_stride_h) + _columns()),
        mask=_of_rows(h < num_heads),
    )
    async_copy.commit_group()

    # For each candidate 0 or MASKED, of the tile that is attended to and of the four after it.
    biases = gl.allocate_shared_memory(gl.float32, [8, BLOCK_N], FLAT)
    words: gl.constexpr = [RAW_BUFFERS, BLOCK_N, HALF_GROUPS, GROUP_WORDS]
    raw = (
        gl.allocate_shared_memory(gl.int32, words, RAW_MEMORY),
        gl.allocate_shared_memory(gl.int32, words, RAW_MEMORY),
        gl.allocate_shared_memory(gl.int32, words, RAW_MEMORY),
        gl.allocate_shared_memory(gl.int32, [RAW_BUFFERS, BLOCK_N, 2], SCALES),
    )
    entries = _first_entries(
        first, last, swa_tiles, swa_len, extra_len, swa_row_ptr, extra_row_ptr, HAS_EXTRA
    )
    slots = _first_slots(
        first, swa_tiles, entries, table_row_ptr, table_width, EXTRA_BLOCK, HAS_EXTRA, HAS_TABLE
    )
    for i in gl.static_range(2):
        _copy_raw(
            raw, (first + i) & 1, first + i, swa_tiles, slots[i], swa_ptr, extra_ptr,
            swa_page_stride, extra_page_stride, SWA_BLOCK, EXTRA_BLOCK, HAS_EXTRA,
        )  # fmt: skip
    for i in gl.static_range(4):
        biases.index((first + i) & 7).store(gl.where(slots[i] >= 0, 0.0, MASKED))
    async_copy.wait_group(2)
    barrier()
    q = (
        q_memory.index(0).load(Q_OPERAND),
        q_memory.index(1).load(Q_OPERAND),
        q_memory.index(2).load(Q_OPERAND),
        q_memory.index(3).load(Q_OPERAND),
    )

    running_max = gl.full([BLOCK_H], MASKED, gl.float32, layout=SCORES_ROW)
    running_sum = gl.full([BLOCK_H, 4], 0.0, gl.float32, layout=SHARES)
    zero = gl.full([2, BLOCK_H, PART], 0.0, gl.float32, layout=MMA)
    acc = (zero, zero, zero, zero)
    scale_log2 = softmax_scale * LOG2E

    # Parts of the three buffers, one after the other.
    k_parts = gl.allocate_shared_memory(gl.bfloat16, [BUFFERS * PARTS, 2, BLOCK_N, PART], TILE)
    k_copies = k_parts._reinterpret(gl.bfloat16, [BUFFERS, PARTS, 2, BLOCK_N, PART], TILES)
    k_words = k_parts._reinterpret(gl.int32, [BUFFERS, PARTS, 2, BLOCK_N, PART // 2], TILES_WORDS)
    exchange = gl.allocate_shared_memory(gl.float32, [2, BLOCK_H, BLOCK_N], EXCHANGE)
    shares = exchange._reinterpret(gl.float32, [2, BLOCK_H, BLOCK_N], EXCHANGE_HALF)

    for i in gl.static_range(2):
        async_copy.wait_group(1)
        barrier()
        _dequantise(k_words.index(i), raw, (first + i) & 1)
        _copy_raw(
            raw, (first + i) & 1, first + i + 2, swa_tiles, slots[i + 2], swa_ptr, extra_ptr,
            swa_page_stride, extra_page_stride, SWA_BLOCK, EXTRA_BLOCK, HAS_EXTRA,
        )  # fmt: skip
    exchange.store(_multiply(q, k_parts, 0))

    slot = slots[4]
    entry = entries[5]
    buffer = 0
    for tile in range(first, last):
        # The raw rows of tile + 2 and tile + 3 are here or on their way, and the slots of tile + 4.
        after = gl.where(buffer == BUFFERS - 1, 0, buffer + 1)
        then = gl.where(after == BUFFERS - 1, 0, after + 1)
        async_copy.wait_group(1)
        barrier()
        s = shares.index(0).load(SCORES) + shares.index(1).load(SCORES)
        s = s * scale_log2 + biases.index(tile & 7).load(SCORES_COL)[None, :]
        _dequantise(k_words.index(then), raw, tile & 1)
        _copy_raw(
            raw, tile & 1, tile + 4, swa_tiles, slot, swa_ptr, extra_ptr,
            swa_page_stride, extra_page_stride, SWA_BLOCK, EXTRA_BLOCK, HAS_EXTRA,
        )  # fmt: skip
        biases.index((tile + 4) & 7).store(gl.where(slot >= 0, 0.0, MASKED))
        if HAS_TABLE:
            slot = find_slots(
                tile + 5, swa_tiles, entry, table_row_ptr, table_width,
                EXTRA_BLOCK, HAS_EXTRA, HAS_TABLE,
            )  # fmt: skip
            entry = load_entries(
                tile + 6, last, swa_tiles, swa_len, extra_len, swa_row_ptr, extra_row_ptr,
                HAS_EXTRA, BLOCK_N, RAW_ROW,
            )  # fmt: skip
        else:
            slot = load_entries(
                tile + 5, last, swa_tiles, swa_len, extra_len, swa_row_ptr, extra_row_ptr,
                HAS_EXTRA, BLOCK_N, RAW_ROW,
            )  # fmt: skip
        p, rescale, running_max, running_sum = _tile_weights(s, running_max, running_sum)
        acc, s = _multiply_both(p, rescale, acc, q, k_parts, buffer, after)
        exchange.store(s)
        buffer = after

    if UNPACKED:
        request = gl.load(request_ids_ptr + token)
        rows = gl.minimum(gl.load(unpacked_lens_ptr + request), unpacked_width)
        request_ptr = extra_ptr + request.to(gl.int64) * extra_page_stride
        positions = gl.allocate_shared_memory(gl.int32, [2, BLOCK_N], FLAT)
        barrier()
        position = load_positions(0, extra_row_ptr, extra_len, BLOCK_N, COPY_ROW)
        _copy_rows(k_copies.index(buffer), biases.index(buffer), request_ptr, position, rows)
        async_copy.commit_group()
        after = gl.where(buffer == BUFFERS - 1, 0, buffer + 1)
        position = load_positions(BLOCK_N, extra_row_ptr, extra_len, BLOCK_N, COPY_ROW)
        _copy_rows(k_copies.index(after), biases.index(after), request_ptr, position, rows)
        _copy_positions(positions.index(0), 2 * BLOCK_N, extra_row_ptr, extra_len)
        async_copy.commit_group()
        async_copy.wait_group(1)
        barrier()
        exchange.store(_multiply(q, k_parts, buffer))
        for tile in range(0, gl.cdiv(extra_len, BLOCK_N)):
            # Copies of the next tile, and of the positions of that after it, are on their way.
            after = gl.where(buffer == BUFFERS - 1, 0, buffer + 1)
            then = gl.where(after == BUFFERS - 1, 0, after + 1)
            async_copy.wait_group(0)
            barrier()
            s = shares.index(0).load(SCORES) + shares.index(1).load(SCORES)
            s = s * scale_log2 + biases.index(buffer).load(SCORES_COL)[None, :]
            n = (tile + 2) * BLOCK_N + gl.arange(0, BLOCK_N, layout=COPY_ROW)
            position = gl.where(n < extra_len, positions.index(tile & 1).load(COPY_ROW), -1)
            _copy_rows(k_copies.index(then), biases.index(then), request_ptr, position, rows)
            _copy_positions(
                positions.index((tile + 1) & 1), (tile + 3) * BLOCK_N, extra_row_ptr, extra_len
            )
            async_copy.commit_group()
            p, rescale, running_max, running_sum = _tile_weights(s, running_max, running_sum)
            acc, s = _multiply_both(p, rescale, acc, q, k_parts, buffer, after)
            exchange.store(s)
            buffer = after

    # Of tiles that there are not.
    async_copy.wait_group(0)
    token, first_head = token_and_head(num_heads, BLOCK_H, True)
    running_sum = gl.convert_layout(gl.sum(running_sum, 1), SCORES_ROW)
    head = first_head + gl.arange(0, BLOCK_H, layout=SCORES_ROW)
    inverse, lse = weigh(head, num_heads, running_max, running_sum, sink_ptr, HAS_SINK, PARTIAL)
    if HAS_LSE and not PARTIAL:
        gl.store(lse_ptr + token * lse_stride_t + head, lse * LN2, mask=head < num_heads)
    inverse = inverse[:, None][None, :, :]
    if PARTIAL:
        # A split without candidates leaves its row unwritten: the merge reads it by its LSE only.
        write = (head < num_heads) & (running_max > MASKED)
        half = gl.arange(0, 2, layout=gl.SliceLayout(1, gl.SliceLayout(2, MMA)))
        column = gl.arange(0, PART, layout=gl.SliceLayout(0, gl.SliceLayout(0, MMA)))
        column = half[:, None][:, :, None] * HALF + column[None, :][None, :, :]
        part_ptr = out_ptr + token * out_stride_t + split.to(gl.int64) * out_stride_s
        part_ptrs = part_ptr + ((head * out_stride_h)[:, None][None, :, :] + column)
        for i in gl.static_range(PARTS):
            gl.store(part_ptrs + i * PART, acc[i] * inverse, mask=write[:, None][None, :, :])
        lse_row_ptr = lse_ptr + token * lse_stride_t + split.to(gl.int64) * lse_stride_s
        gl.store(lse_row_ptr + head, lse, mask=head < num_heads)
    else:
        # Through shared memory, for stores of 16 bytes. Not in Q's layout, of which the compiler
        # would keep the addresses through the loops.
        out_memory = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK_H, HALF], OUT)
        for i in gl.static_range(PARTS):
            out_memory.slice(i * PART, PART, dim=2).store((acc[i] * inverse).to(gl.bfloat16))
        barrier()
        half = gl.arange(0, 2, layout=OUT_HALF)[:, None][:, :, None]
        d = half * HALF + gl.arange(0, HALF, layout=OUT_COL)[None, :][None, :, :]
        h = first_head + gl.arange(0, BLOCK_H, layout=OUT_ROW)
        out_ptrs = out_ptr + token * out_stride_t + ((h * out_stride_h)[None, :][:, :, None] + d)
        rows = out_memory.load(OUT_COPY)
        if QUANTISE:
            position = gl.load(positions_ptr + token)
            rows = _unrotate(rows.to(gl.float32), cos_sin_ptr + position * cos_sin_stride)
            rows, scale = _quantise(rows)
            rows = gl.convert_layout(rows, OUT_COPY)
            scale = gl.convert_layout(scale, SCALE_COPY)
            half = gl.arange(0, 2, layout=SCALE_HALF)[:, None][:, :, None]
            run = gl.arange(0, HALF // RUN, layout=SCALE_RUN)[None, :][None, :, :]
            head = first_head + gl.arange(0, BLOCK_H, layout=SCALE_ROW)
            scale_ptrs = out_scale_ptr + token * out_scale_stride_t + (half * (HALF // RUN) + run)
            scale_ptrs += (head * out_scale_stride_h)[None, :][:, :, None]
            gl.store(scale_ptrs, scale, mask=(head < num_heads)[None, :][:, :, None])
        gl.store(out_ptrs, rows, mask=(h < num_heads)[None, :][:, :, None])

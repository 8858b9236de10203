# SPDX-License-Identifier: Apache-2.0
"""Sparse MLA attention over the packed fp8_ds_mla cache, for DeepSeek V4 (README.md)."""

import functools
import importlib
import warnings
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from vllm_sm12x.ops.fp8_ds_mla import HEAD_DIM, ROPE_DIM, check_packed_cache
from vllm_sm12x.ops.launch import (
    dot_dtype,
    has_mma,
    has_wgmma,
    interpreted,
    multiprocessors,
    on_device,
)
from vllm_sm12x.ops.sparse_mla.config import (
    UNPACK_BLOCK,
    Kernel,
    LaunchConfig,
    LaunchPolicy,
    choose,
    choose_unpacked,
)
from vllm_sm12x.ops.sparse_mla.kernel import (
    RUN,
    sparse_mla_kernel,
    sparse_mla_merge_kernel,
    unpack_rows_kernel,
)

MAX_HEADS = 128


def sparse_mla(
    q: torch.Tensor,
    swa_cache: torch.Tensor,
    swa_indices: torch.Tensor,
    swa_lens: torch.Tensor | None = None,
    *,
    extra_cache: torch.Tensor | None = None,
    extra_indices: torch.Tensor | None = None,
    extra_lens: torch.Tensor | None = None,
    extra_block_table: torch.Tensor | None = None,
    request_ids: torch.Tensor | None = None,
    unpacked: torch.Tensor | None = None,
    unpacked_lens: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    softmax_scale: float,
    out: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    cos_sin_cache: torch.Tensor | None = None,
    return_lse: bool = False,
    policy: LaunchPolicy | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """One softmax over a query's sliding-window and extra candidates, K = V = the 512-dim row.

    For token t and head h, with C the candidates of t and s_c = softmax_scale * q[t,h] . k_c:
    out[t,h] = sum_c exp(s_c) k_c / (exp(sink[h]) + sum_c exp(s_c)). A token without a valid
    candidate gives zeros and lse -inf. Same inputs give the same bits.

    Args:
        q: bf16 [T, H, 512], H from 1 to 128; any strides with contiguous rows.
        swa_cache: uint8 [blocks, block_size, 584], packed (ops/fp8_ds_mla); any block size, pages
            may be padded.
        swa_indices: int32 [T, W] or [T, 1, W]; global slots `block * block_size + row`; a negative
            entry is empty, wherever it stands.
        swa_lens: int32 [T]; entries of a row at or past it are ignored. None: all W count.
        extra_cache, extra_indices, extra_lens: the compressed candidates, in the same form.
        extra_block_table: int32 [R, P]; if given, `extra_indices` are positions local to a request
            and page p of request r lives in block `extra_block_table[r, p]`; positions past the
            table are ignored.
        request_ids: int32 [T], row of `extra_block_table` for each token; required with it.
        unpacked: bf16 [R, N, 512], contiguous, overwritten: the rows of each request, by position,
            are unpacked into it once and read from there, which pays where tokens share them
            (`config.unpacks`). Needs `extra_block_table` of R rows.
        unpacked_lens: int32 [R], how many rows each request has; positions at or past it or N are
            ignored. Required with `unpacked`.
        sink: fp32 [H], natural log units, added to the denominator only; -inf is none.
        softmax_scale: factor of the scores.
        out: bf16 [T, H, 512] to write into, rows contiguous; allocated if None. With `out_scale`
            e4m3, and required.
        out_scale: fp32 [T, H, 4], rows contiguous, written: what a quantised grouped output
            projection multiplies is left in place of the bf16 rows. Those lose the RoPE of their
            token's position in the last 64 values, and each run of 128 values v has the scale
            s = 2^ceil(log2(max(|v|) / 448)) and is left as v / s, as by vLLM's
            fused_inv_rope_fp8_quant of the bf16 rows. The kernel of wgmma has no such result, so
            that on Hopper too the tiles of SM12x serve.
        positions: int64 [T]; required with `out_scale`.
        cos_sin_cache: fp32 [positions, 64], 32 cosines and 32 sines of the angles of the pairs of
            neighbours among a row's last 64 values; required with `out_scale`.
        return_lse: also return the natural LSE over the candidates, without the sink.
        policy: launch limits, and whether a token's bits may depend on how many there are; None:
            the defaults.

    Returns:
        out, or (out, lse) with lse fp32 [T, H].

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device than above; nothing
            has been launched or written then.
    """
    _check_query(q)
    tokens, heads, _ = q.shape
    swa_indices = _check_candidates("swa", swa_cache, swa_indices, swa_lens, tokens)
    if extra_cache is not None and extra_indices is not None:
        extra_indices = _check_candidates("extra", extra_cache, extra_indices, extra_lens, tokens)
    elif any(t is not None for t in (extra_cache, extra_indices, extra_lens, extra_block_table)):
        raise ValueError(
            "extra_cache and extra_indices: give both or neither, and neither extra_lens nor "
            "extra_block_table without them"
        )
    if (extra_block_table is None) != (request_ids is None):
        raise ValueError("extra_block_table and request_ids: give both or neither")
    if extra_block_table is not None:
        _check_matrix("extra_block_table", extra_block_table, torch.int32)
    _check_vector("request_ids", request_ids, torch.int32, tokens)
    _check_unpacked(unpacked, unpacked_lens, extra_block_table)
    _check_vector("sink", sink, torch.float32, heads)
    _check_output(out, out_scale, positions, cos_sin_cache, q)
    _check_devices(
        q.device,
        swa_cache=swa_cache,
        swa_indices=swa_indices,
        swa_lens=swa_lens,
        extra_cache=extra_cache,
        extra_indices=extra_indices,
        extra_lens=extra_lens,
        extra_block_table=extra_block_table,
        request_ids=request_ids,
        unpacked=unpacked,
        unpacked_lens=unpacked_lens,
        sink=sink,
        out=out,
        out_scale=out_scale,
        positions=positions,
        cos_sin_cache=cos_sin_cache,
    )
    gpu: dict[str, Any] = {"sms": multiprocessors("q", q.device), **gluon_kernels(q.device)}

    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((tokens, heads), dtype=torch.float32) if return_lse else None
    if tokens:
        policy = policy or LaunchPolicy()
        if out_scale is not None:
            policy = replace(policy, wgmma=False)  # hopper.py has no such result
        if unpacked is not None:
            plan = choose_unpacked(heads, policy=policy, **gpu)
            _unpack(extra_cache, extra_block_table, unpacked_lens, unpacked)
        else:
            candidates = swa_indices.shape[1]
            if extra_indices is not None:
                candidates += extra_indices.shape[1]
            plan = choose(tokens, heads, candidates, policy=policy, **gpu)
        for start in range(0, tokens, plan.tokens_per_launch):
            rows = slice(start, start + plan.tokens_per_launch)
            _launch(
                plan.config,
                plan.num_splits,
                softmax_scale=softmax_scale,
                sink=sink,
                swa_cache=swa_cache,
                extra_cache=extra_cache,
                table=extra_block_table,
                unpacked=unpacked,
                unpacked_lens=unpacked_lens,
                q=q[rows],
                swa_indices=swa_indices[rows],
                swa_lens=_rows(swa_lens, rows),
                extra_indices=_rows(extra_indices, rows),
                extra_lens=_rows(extra_lens, rows),
                request_ids=_rows(request_ids, rows),
                out=out[rows],
                out_scale=_rows(out_scale, rows),
                positions=_rows(positions, rows),
                cos_sin_cache=cos_sin_cache,
                lse=_rows(lse, rows),
            )
    return out if lse is None else (out, lse)


def gluon_kernels(device: torch.device) -> dict[str, bool]:
    """Whether mma.py's and hopper.py's kernels run on `device`, as `config.choose` wants to know.

    Gluon is experimental: where this Triton's cannot be imported by them, kernel.py's tiles serve,
    slower, and a RuntimeWarning says so once.
    """
    return {
        "mma": has_mma(device) and _imports("mma"),
        "wgmma": has_wgmma(device) and _imports("hopper"),
    }


@functools.cache
def _imports(module: str) -> bool:
    try:
        importlib.import_module(f"{__name__}.{module}")
    except Exception as error:
        warnings.warn(
            f"sparse_mla takes slower tiles for more than 32 heads: {module}.py needs another "
            f"Gluon than that of Triton {triton.__version__} ({type(error).__name__}: {error})",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def _rows(tensor: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return None if tensor is None else tensor[rows]


def _launch(
    config: LaunchConfig,
    num_splits: int,
    *,
    softmax_scale: float,
    sink: torch.Tensor | None,
    swa_cache: torch.Tensor,
    extra_cache: torch.Tensor | None,
    table: torch.Tensor | None,
    unpacked: torch.Tensor | None,
    unpacked_lens: torch.Tensor | None,
    q: torch.Tensor,
    swa_indices: torch.Tensor,
    swa_lens: torch.Tensor | None,
    extra_indices: torch.Tensor | None,
    extra_lens: torch.Tensor | None,
    request_ids: torch.Tensor | None,
    out: torch.Tensor,
    out_scale: torch.Tensor | None,
    positions: torch.Tensor | None,
    cos_sin_cache: torch.Tensor | None,
    lse: torch.Tensor | None,
) -> None:
    tokens, heads, _ = q.shape
    has_extra = extra_cache is not None and extra_indices is not None
    if extra_cache is None or extra_indices is None:
        extra_cache, extra_indices = swa_cache, swa_indices  # never read
    extra_block = extra_cache.shape[1]
    if unpacked is not None:
        extra_cache, extra_block, has_extra, table = unpacked, 1, False, None
    partial = num_splits > 1
    target, target_lse = out, lse
    if partial:
        target = q.new_empty((tokens, num_splits, heads, HEAD_DIM), dtype=torch.float32)
        target_lse = q.new_empty((tokens, num_splits, heads), dtype=torch.float32)
    # Strides of token and split; without splits there is one, and its stride is never used.
    out_strides = (target.stride(0), target.stride(1) if partial else 0, target.stride(-2))
    lse_strides = (0, 0)
    if target_lse is not None:
        lse_strides = (target_lse.stride(0), target_lse.stride(1) if partial else 0)
    finish = _quantisation(out_scale, positions, cos_sin_cache)
    # Gluon is imported where a kernel of it is taken. Those have tiles of their own.
    options = _quantisation(None, None, None) if partial else finish
    if config.kernel is Kernel.HOPPER:
        from vllm_sm12x.ops.sparse_mla.hopper import sparse_mla_hopper_kernel as kernel

        options = {}
    elif config.kernel is Kernel.MMA:
        from vllm_sm12x.ops.sparse_mla.mma import sparse_mla_mma_kernel as kernel
    else:
        kernel = sparse_mla_kernel
        options = options | {
            "BLOCK_H": config.block_h,
            "BLOCK_N": config.block_n,
            "STAGES": config.stages,
            "DOT_DTYPE": dot_dtype(tl.bfloat16),
            "NATIVE": not interpreted(),
        }
    with on_device(q.device):
        kernel[(tokens * triton.cdiv(heads, config.block_h), num_splits)](
            q,
            swa_cache,
            swa_indices,
            swa_lens,
            extra_cache,
            extra_indices,
            extra_lens,
            table,
            request_ids,
            unpacked_lens,
            sink,
            target,
            target_lse,
            softmax_scale,
            heads,
            swa_indices.shape[1],
            extra_indices.shape[1],
            0 if table is None else table.shape[1],
            0 if unpacked is None else unpacked.shape[1],
            q.stride(0),
            q.stride(1),
            swa_cache.stride(0),
            swa_indices.stride(0),
            extra_cache.stride(0),
            extra_indices.stride(0),
            0 if table is None else table.stride(0),
            *out_strides,
            *lse_strides,
            num_splits,
            SWA_BLOCK=swa_cache.shape[1],
            EXTRA_BLOCK=extra_block,
            HAS_SWA_LENS=swa_lens is not None,
            HAS_EXTRA=has_extra,
            HAS_EXTRA_LENS=extra_lens is not None,
            HAS_TABLE=table is not None,
            UNPACKED=unpacked is not None,
            HAS_SINK=sink is not None,
            HAS_LSE=lse is not None,
            PARTIAL=partial,
            **options,
            num_warps=config.num_warps,
            num_stages=1,
        )
        if partial:
            sparse_mla_merge_kernel[(tokens * heads,)](
                target,
                target_lse,
                sink,
                out,
                lse,
                heads,
                num_splits,
                *out_strides,
                *lse_strides,
                out.stride(0),
                out.stride(1),
                0 if lse is None else lse.stride(0),
                HAS_SINK=sink is not None,
                HAS_LSE=lse is not None,
                **finish,
                BLOCK_S=triton.next_power_of_2(num_splits),
                num_warps=4,
            )


def _quantisation(
    out_scale: torch.Tensor | None,
    positions: torch.Tensor | None,
    cos_sin_cache: torch.Tensor | None,
) -> dict[str, Any]:
    """What a kernel that writes a result is given of these, by name."""
    strides = [0, 0, 0]
    if out_scale is not None and cos_sin_cache is not None:
        strides = [*out_scale.stride()[:2], cos_sin_cache.stride(0)]
    return {
        "out_scale_ptr": out_scale,
        "positions_ptr": positions,
        "cos_sin_ptr": cos_sin_cache,
        "out_scale_stride_t": strides[0],
        "out_scale_stride_h": strides[1],
        "cos_sin_stride": strides[2],
        "QUANTISE": out_scale is not None,
    }


def _unpack(cache: Any, table: Any, lens: Any, unpacked: torch.Tensor) -> None:
    requests, width, _ = unpacked.shape
    with on_device(unpacked.device):
        unpack_rows_kernel[(triton.cdiv(width, UNPACK_BLOCK), requests)](
            cache,
            table,
            lens,
            unpacked,
            cache.stride(0),
            table.stride(0),
            table.shape[1],
            width,
            unpacked.stride(0),
            BLOCK=cache.shape[1],
            BLOCK_N=UNPACK_BLOCK,
            NATIVE=not interpreted(),
            num_warps=4,
        )


def _check_query(q: torch.Tensor) -> None:
    if q.dtype != torch.bfloat16:
        raise TypeError(f"q: expected dtype torch.bfloat16, got {q.dtype}")
    if q.dim() != 3 or q.shape[2] != HEAD_DIM or not 1 <= q.shape[1] <= MAX_HEADS:
        raise ValueError(
            f"q: expected [T, H, {HEAD_DIM}] with H from 1 to {MAX_HEADS}, got {list(q.shape)}"
        )
    if q.stride(2) != 1:
        raise ValueError(f"q: expected contiguous rows, got strides {tuple(q.stride())}")


def _check_unpacked(
    unpacked: torch.Tensor | None, lens: torch.Tensor | None, table: torch.Tensor | None
) -> None:
    if (unpacked is None) != (lens is None):
        raise ValueError("unpacked and unpacked_lens: give both or neither")
    if unpacked is None:
        return
    if table is None:
        raise ValueError("unpacked: needs extra_block_table and request_ids")
    if unpacked.dtype != torch.bfloat16:
        raise TypeError(f"unpacked: expected dtype torch.bfloat16, got {unpacked.dtype}")
    requests = table.shape[0]
    shape = list(unpacked.shape)
    if len(shape) != 3 or shape[::2] != [requests, HEAD_DIM] or not shape[1]:
        raise ValueError(
            f"unpacked: expected [{requests}, N, {HEAD_DIM}] with N from 1 on and the "
            f"{requests} rows of extra_block_table, got {shape}"
        )
    if not unpacked.is_contiguous():
        raise ValueError(f"unpacked: expected contiguous, got strides {tuple(unpacked.stride())}")
    _check_vector("unpacked_lens", lens, torch.int32, requests)


def _check_output(
    out: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    positions: torch.Tensor | None,
    cos_sin_cache: torch.Tensor | None,
    q: torch.Tensor,
) -> None:
    tokens, heads, _ = q.shape
    if out_scale is None or positions is None or cos_sin_cache is None:
        if not out_scale is positions is cos_sin_cache is None:
            raise ValueError("out_scale, positions and cos_sin_cache: give all or none")
        if out is not None:
            _check_rows("out", out, torch.bfloat16, (tokens, heads, HEAD_DIM))
        return
    if out is None:
        raise ValueError("out: required with out_scale")
    _check_rows("out", out, torch.float8_e4m3fn, (tokens, heads, HEAD_DIM))
    _check_rows("out_scale", out_scale, torch.float32, (tokens, heads, HEAD_DIM // RUN.value))
    _check_vector("positions", positions, torch.int64, tokens)
    _check_matrix("cos_sin_cache", cos_sin_cache, torch.float32)
    if cos_sin_cache.shape[1] != ROPE_DIM:
        shape = list(cos_sin_cache.shape)
        raise ValueError(f"cos_sin_cache: expected [positions, {ROPE_DIM}], got {shape}")


def _check_rows(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected {list(shape)}, got {list(tensor.shape)}")
    if tensor.stride(2) != 1:
        raise ValueError(f"{name}: expected contiguous rows, got strides {tuple(tensor.stride())}")


def _check_candidates(
    kind: str,
    cache: torch.Tensor,
    indices: torch.Tensor,
    lens: torch.Tensor | None,
    tokens: int,
) -> torch.Tensor:
    """Validate the cache, indices and lengths of one kind; return the [T, W] view of indices."""
    check_packed_cache(f"{kind}_cache", cache)
    name = f"{kind}_indices"
    if indices.dim() == 3 and indices.shape[1] == 1:
        indices = indices.squeeze(1)
    _check_matrix(name, indices, torch.int32)
    if indices.shape[0] != tokens:
        raise ValueError(f"{name}: expected {tokens} rows (those of q), got {indices.shape[0]}")
    _check_vector(f"{kind}_lens", lens, torch.int32, tokens)
    return indices


def _check_devices(device: torch.device, **tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name}: expected device {device} (that of q), got {tensor.device}")


def _check_matrix(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
    if tensor.dim() != 2:
        raise ValueError(f"{name}: expected 2 dimensions, got shape {list(tensor.shape)}")
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(f"{name}: expected contiguous rows, got strides {tuple(tensor.stride())}")


def _check_vector(name: str, tensor: torch.Tensor | None, dtype: torch.dtype, length: int) -> None:
    if tensor is None:
        return
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
    if tensor.shape != (length,) or (length > 1 and tensor.stride(0) != 1):
        raise ValueError(
            f"{name}: expected a contiguous vector of {length}, got shape {list(tensor.shape)} "
            f"and strides {tuple(tensor.stride())}"
        )

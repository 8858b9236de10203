# SPDX-License-Identifier: Apache-2.0
"""Index scores of DeepSeek sparse attention over contiguous FP8 keys (README.md)."""

import torch
import triton
import triton.language as tl

from vllm_sm12x.ops.launch import dot_dtype, multiprocessors, on_device
from vllm_sm12x.ops.mqa_logits.config import MAX_BLOCK_H, choose
from vllm_sm12x.ops.mqa_logits.kernel import mqa_logits_kernel

HEAD_DIM = 128
MAX_HEADS = 128


def mqa_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scores of every key for every query row, -inf for keys outside the row's [ks, ke).

    out[m, n] = k_scale[n] * sum_h weights[m, h] * relu(q[m, h] . k[n]).

    Args:
        q: e4m3 [M, H, 128], H from 1 to 128; any strides with contiguous rows. Its scale is part
            of `weights`.
        k: e4m3 [N, 128]; any row stride.
        k_scale: fp32 [N].
        weights: fp32 [M, H]; any row stride.
        ks, ke: int32 [M]; row m sees the keys ks[m] <= n < ke[m]. None if ks >= ke.
        out: fp32 [M, N] to write into, any row stride; allocated if None. Every element is
            written.

    Returns:
        out.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device than above; nothing
            has been launched or written then.
    """
    check_tensor("q", q, torch.float8_e4m3fn, (None, None, HEAD_DIM))
    rows, heads, _ = q.shape
    check_heads(heads)
    check_tensor("k", k, torch.float8_e4m3fn, (None, HEAD_DIM))
    keys = k.shape[0]
    check_tensor("k_scale", k_scale, torch.float32, (keys,))
    check_tensor("weights", weights, torch.float32, (rows, heads))
    check_tensor("ks", ks, torch.int32, (rows,))
    check_tensor("ke", ke, torch.int32, (rows,))
    if out is not None:
        check_tensor("out", out, torch.float32, (rows, keys))
    check_devices(q.device, k=k, k_scale=k_scale, weights=weights, ks=ks, ke=ke, out=out)

    if out is None:
        out = torch.empty((rows, keys), dtype=torch.float32, device=q.device)
    if rows and keys:
        config = choose(keys, heads)
        grid = (triton.cdiv(rows, config.block_m) * triton.cdiv(keys, config.block_n),)
        with on_device(q.device):
            mqa_logits_kernel[grid](
                q,
                k,
                k_scale,
                weights,
                ks,
                ke,
                out,
                rows,
                keys,
                q.stride(0),
                q.stride(1),
                k.stride(0),
                weights.stride(0),
                out.stride(0),
                NUM_HEADS=heads,
                BLOCK_M=config.block_m,
                BLOCK_N=config.block_n,
                BLOCK_H=block_heads(heads),
                DOT_DTYPE=dot_dtype(tl.float8e4nv),
                NUM_STAGES=config.num_stages,
                num_warps=config.num_warps,
            )
    return out


def block_heads(heads: int) -> int:
    """Heads of one dot: a power of two, at least the 16 columns that a dot takes."""
    return min(MAX_BLOCK_H, max(16, triton.next_power_of_2(heads)))


def check_heads(heads: int) -> None:
    """Raise `ValueError` unless q's head count is one that the kernels take."""
    if not 1 <= heads <= MAX_HEADS:
        raise ValueError(f"q: expected from 1 to {MAX_HEADS} heads, got {heads}")


def check_tensor(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]
) -> None:
    """Raise unless `tensor` has this dtype and shape (None: any size) and contiguous rows."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
    sizes = zip(tensor.shape, shape, strict=False)
    if tensor.dim() != len(shape) or any(want not in (None, got) for got, want in sizes):
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{expected}], got {list(tensor.shape)}")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: expected contiguous rows, got strides {tuple(tensor.stride())}")


def check_devices(device: torch.device, **tensors: torch.Tensor | None) -> None:
    """Raise `ValueError` unless `device`, that of q, runs kernels and holds every tensor."""
    multiprocessors("q", device)
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name}: expected device {device} (that of q), got {tensor.device}")

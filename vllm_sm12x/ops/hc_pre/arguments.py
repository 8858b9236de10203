# SPDX-License-Identifier: Apache-2.0
"""Checks of the tensors that hc_pre, hc_post and hc_head take."""

import torch

MAX_WIDTH = 16384
STREAM_COUNTS = (1, 2, 4, 8)


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: torch.device,
) -> None:
    """Raise TypeError or ValueError unless `tensor` is as said, with contiguous rows."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")
    if shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: expected contiguous rows, got strides {tuple(tensor.stride())}")


def check_streams(name: str, tensor: torch.Tensor) -> tuple[int, int, int]:
    """T, hc and d of a bf16 [T, hc, d]; the same errors."""
    if tensor.dim() != 3 or tensor.shape[1] not in STREAM_COUNTS:
        raise ValueError(
            f"{name}: expected [T, hc, d] with hc of {', '.join(map(str, STREAM_COUNTS))}, got "
            f"{list(tensor.shape)}"
        )
    tokens, streams, width = tensor.shape
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"{name}: expected d from 1 to {MAX_WIDTH}, got {width}")
    check_tensor(name, tensor, torch.bfloat16, (tokens, streams, width), tensor.device)
    return tokens, streams, width

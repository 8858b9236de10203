# SPDX-License-Identifier: Apache-2.0
"""Where an op may launch, on how many multiprocessors, and what its dots multiply there."""

import contextlib
import functools

import torch
import triton
import triton.language as tl


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device; this makes it `device` meanwhile."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def multiprocessors(name: str, device: torch.device) -> int:
    """Multiprocessors of `device`; a ValueError naming the argument if no kernel can run there."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return 8
    raise ValueError(
        f"{name}: expected a CUDA device (or the CPU under TRITON_INTERPRET=1), got {device}"
    )


def has_mma(device: torch.device) -> bool:
    """Whether Gluon kernels of mma.sync run on `device`: any GPU from SM80 on, not interpreted."""
    if interpreted() or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device)[0] >= 8


def has_wgmma(device: torch.device) -> bool:
    """Whether kernels of wgmma run on `device`: Hopper's, and compiled for it."""
    if interpreted() or device.type != "cuda" or triton.knobs.runtime.override_arch:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which has no inline assembly."""
    return bool(triton.knobs.runtime.interpret)


def dot_dtype(native: tl.dtype) -> tl.dtype:
    """`native`, the operands' type on a GPU; fp32, which holds them exactly, in the interpreter.

    The interpreter's dot of bf16 operands is wrong in Triton 3.6 to 3.8, and it has none of fp8.
    """
    return tl.float32 if interpreted() else native

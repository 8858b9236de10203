# SPDX-License-Identifier: Apache-2.0
"""Global scratch memory for Triton kernels that are launched where nobody has set an allocator.

Triton keeps the allocator in a ContextVar: one that is set in a thread is unknown in every other,
whose launches get the variable's default, a NullAllocator that raises.
"""

import contextvars
from contextlib import ExitStack
from typing import Any

import torch
from triton.runtime import _allocation
from triton.runtime._allocation import NullAllocator


def default_allocator() -> Any:
    """What a launch in a thread gets that has set nothing."""
    return contextvars.Context().run(_allocation._allocator.get)


class TorchAllocator(NullAllocator):
    """The allocator of threads that have set none: torch's caching allocator, on the current GPU.

    Triton takes it as its NullAllocator, and so as nobody's choice. Up to 3.7 it also serves the
    scratch of a profiler that has set no allocator, for which 3.8 has a default of its own.
    """

    def __call__(self, size: int, alignment: int, stream: int | None) -> torch.Tensor:
        """`size` uninitialised bytes, a uint8 tensor whose address is a multiple of `alignment`.

        `stream` is the raw handle of the launch's stream, None for the current one. The launcher
        drops the tensor as soon as the kernel is queued; torch hands the bytes out again on that
        stream only, behind the kernel. In a CUDA-graph capture of torch's they come from the
        graph's own pool, which keeps the address valid for its replays.
        """
        if stream is None or stream == torch.cuda.current_stream().cuda_stream:
            return _aligned(size, alignment)
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            return _aligned(size, alignment)


def install(undo: ExitStack) -> None:
    """Make Triton's default allocator a TorchAllocator, which every thread sees at once.

    A ContextVar's default cannot be exchanged, so it stays the object that it is.
    """
    default = default_allocator()
    original = type(default)
    default.__class__ = TorchAllocator
    undo.callback(setattr, default, "__class__", original)


def _aligned(size: int, alignment: int) -> torch.Tensor:
    room = torch.empty(size + alignment - 1, dtype=torch.uint8, device="cuda")
    start = -room.data_ptr() % alignment
    return room[start : start + size]

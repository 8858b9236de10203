# SPDX-License-Identifier: Apache-2.0
"""Triton kernels as SM12x would run them, on a GPU that is none.

A Hopper GPU has `wgmma`, which SM12x has not, and 228 KiB of shared memory a multiprocessor, where
SM12x has 100. With both taken away, registers, instructions, shared memory and the programs that
fit a multiprocessor are close to those of sm_120. Memory, caches, clocks and the rates of the
tensor cores stay those of the GPU. FP8 dots are no such proxy: Hopper has no `mma.sync` for them,
and ptxas makes conversions and FP16 ones of it.
"""

import ctypes
from typing import Any

import torch
import triton

# What Triton generates for it is what it generates for sm_120, as far as our ops go.
ARCH = "sm89"
SHARED_BYTES_PER_SM = 100 << 10  # CUDA C++ Programming Guide, compute capability 12.x
# CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, in percent of what a multiprocessor has.
_CARVEOUT = 9


def run_as_sm12x(device: torch.device) -> None:
    """From now on, for every Triton kernel of this process that is not compiled yet.

    The carve-out is a wish: the driver rounds it up to a size that the GPU has (100 KiB on Hopper),
    and gives a kernel that needs more what it needs.

    Raises ValueError where a multiprocessor of `device` has no more shared memory than SM12x.
    """
    has = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    if has <= SHARED_BYTES_PER_SM:
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has {has >> 10} KiB of shared memory a "
            f"multiprocessor, SM12x {SHARED_BYTES_PER_SM >> 10}: only a larger GPU can run as SM12x"
        )
    percent = 100 * SHARED_BYTES_PER_SM // has
    driver = ctypes.CDLL("libcuda.so.1")

    def limit(module: Any, function: int, *_: Any) -> None:
        error = driver.cuFuncSetAttribute(ctypes.c_void_p(function), _CARVEOUT, percent)
        if error:
            raise RuntimeError(f"cuFuncSetAttribute(carve-out {percent} %) returned {error}")

    triton.knobs.runtime.override_arch = ARCH
    triton.knobs.runtime.kernel_load_end_hook.add(limit)

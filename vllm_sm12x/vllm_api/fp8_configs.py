# SPDX-License-Identifier: Apache-2.0
"""Launches of vLLM's block-scaled FP8 GEMM in Triton. Heavy to import: workers only."""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from vllm.model_executor.layers.quantization.utils import fp8_utils

LOOK_UP = "get_w8a8_block_fp8_configs"
_GEMM = "w8a8_triton_block_scaled_mm"
_KERNEL = f"_{_GEMM}"

# The keyword arguments of one launch, tile sizes and Triton's own, by vLLM's names.
Config = dict[str, int]
LookUp = Callable[[int, int, int, int], dict[int, Config] | None]


def look_up_of_vllm() -> LookUp:
    """What vLLM's GEMM asks for its configurations now: (N, K, block_n, block_k) -> by M, or None.

    It is read where the GEMM finds it, so a wrapper shows.
    """
    return getattr(fp8_utils, _GEMM).__globals__[LOOK_UP]


def gemm(kernel: Any, look_up: LookUp) -> Callable[..., torch.Tensor]:
    """vLLM's `w8a8_triton_block_scaled_mm` with another kernel and look-up; vLLM stays as it is.

    `kernel` is indexed with a grid and called with the kernel's arguments, as a Triton kernel is.
    """
    theirs = getattr(fp8_utils, _GEMM)
    names = {**theirs.__globals__, LOOK_UP: look_up, _KERNEL: kernel}
    return FunctionType(
        theirs.__code__, names, theirs.__name__, theirs.__defaults__, theirs.__closure__
    )


def kernel_of_vllm() -> Any:
    """The Triton kernel."""
    return getattr(fp8_utils, _KERNEL)


def launched_config(
    m: int, n: int, k: int, block: tuple[int, int], look_up: LookUp
) -> dict[str, int]:
    """The configuration with which vLLM's GEMM would launch its kernel. Launches nothing.

    Args:
        m, n, k: sizes of x [m, k] and weight [n, k].
        block: the weight's scale blocks (block_n, block_k).
        look_up: what stands in for vLLM's look-up; `lambda *shape: None` gives vLLM's default.
    """
    recorder = _Recorder()
    block_n, block_k = block
    blocks_of_k = -(-k // block_k)
    gemm(recorder, look_up)(
        torch.empty(m, k, dtype=torch.float8_e4m3fn, device="meta"),
        torch.empty(n, k, dtype=torch.float8_e4m3fn, device="meta"),
        torch.empty(m, blocks_of_k, device="meta"),
        torch.empty(-(-n // block_n), blocks_of_k, device="meta"),
        list(block),
        torch.bfloat16,
    )
    return recorder.config


class _Recorder:
    """Stands for the kernel, and keeps what it would be launched with."""

    config: dict[str, int]

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: Any, **config: int) -> None:
        self.config = config


def device_name() -> str:
    """The GPU's name, of which vLLM makes the names of its configuration files."""
    return fp8_utils.current_platform.get_device_name()


def folder_of_vllm() -> Path:
    """Where vLLM keeps the configuration files that it ships."""
    return Path(inspect.getfile(fp8_utils)).resolve().parent / "configs"

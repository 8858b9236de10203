# SPDX-License-Identifier: Apache-2.0
"""Compiles the launches of an op for a GPU that is not there, by running the op's own launch code.

The op's public function is called with CPU tensors; each launch that it makes is specialised as
on a GPU (divisibility, equality to 1, constexprs, options) and compiled, and not run. So what is
measured here is what a real launch would compile, by construction.

Needs a process without TRITON_INTERPRET: Triton reads it when a kernel is decorated.
"""

import importlib
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from vllm_sm12x.ops import sparse_mla as sparse_mla_op
from vllm_sm12x.ops.sparse_mla.config import LaunchPolicy
from vllm_sm12x.ops.sparse_mla.spec import SparseMlaShape, sparse_mla_inputs

# By import_module: the package's attribute of that name is the function.
sparse_mla_module = importlib.import_module("vllm_sm12x.ops.sparse_mla")

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Case:
    """One call of sparse_mla whose launches are compiled.

    Attributes:
        arch: 120 or 121.
        head_block: key of CONFIGS.
        split: whether the candidates are split, so that the merge kernel runs too.
        page_bytes_off: added to the page stride; anything that is not a multiple of 16 is a page
            that vLLM would not allocate.
    """

    arch: int
    head_block: int
    split: bool
    extra_block: int = 0
    table: bool = False
    sink: bool = True
    lse: bool = False
    page_bytes_off: int = 0

    def __str__(self) -> str:
        extra = f"extra{self.extra_block}" if self.extra_block else "swa"
        flags = [name for name in ("table", "sink", "lse", "split") if getattr(self, name)]
        return "-".join([f"sm_{self.arch}", f"{16 * self.head_block}heads", extra, *flags])


@dataclass(frozen=True)
class Compiled:
    """What the assembler made of one launch. Sizes in bytes.

    Attributes:
        stack, local: both 0 when no register is spilled.
        loads: bits of one thread's global load -> how many such instructions, from the PTX.
        mma: tensor-core instructions by name, from the PTX.
    """

    kernel: str
    shared: int
    registers: int
    stack: int
    local: int
    loads: dict[int, int]
    mma: dict[str, int]


class _AbsentGpu:
    """The part of a Triton driver that compiling asks: which GPU, and which stream."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        return self._arch  # JITFunction keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_case(case: Case) -> list[Compiled]:
    """Compile every launch of `case`, in launch order."""
    inputs = sparse_mla_inputs(
        SparseMlaShape(
            tokens=2,
            extra=512 if case.extra_block else 0,
            extra_block=case.extra_block or 64,
            table=case.table,
            sink=case.sink,
            rows=128,
        ),
        device="cpu",
    )
    if case.page_bytes_off:
        for name in ("swa_cache", "extra_cache"):
            if name in inputs:
                inputs[name] = _with_page_stride(inputs[name], case.page_bytes_off)
    # One 16-candidate tile at a time leaves nothing to split.
    policy = LaunchPolicy(head_block=case.head_block, topk_chunk=512 if case.split else 16)
    launches = _launches(case.arch, inputs, policy, case.lse)
    return [_inspect(name, kernel) for name, kernel in launches]


def _launches(arch: int, inputs: dict, policy: LaunchPolicy, lse: bool) -> list:
    launches = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        launches.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    driver.set_active(_AbsentGpu(arch))
    JITFunction.run = compile_only
    sparse_mla_module._multiprocessors = lambda device: 188  # an RTX PRO 6000's
    try:
        sparse_mla_op(**inputs, policy=policy, return_lse=lse)
    finally:
        JITFunction.run = run
    return launches


def _with_page_stride(cache: torch.Tensor, off: int) -> torch.Tensor:
    blocks, block_size, width = cache.shape
    stride = cache.stride(0) + off
    storage = torch.zeros(blocks * stride, dtype=torch.uint8)
    return storage.as_strided((blocks, block_size, width), (stride, width, 1))


def _inspect(name: str, kernel) -> Compiled:
    usage = _resource_usage(kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    loads: dict[int, int] = {}
    for vector, bits in re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.[busf](\d+)\b", ptx):
        width = int(vector or 1) * int(bits)
        loads[width] = loads.get(width, 0) + 1
    mma: dict[str, int] = {}
    for instruction in re.findall(r"\b(?:mma|wgmma|tcgen05)[\w.:]*", ptx):
        mma[instruction] = mma.get(instruction, 0) + 1
    return Compiled(
        name, kernel.metadata.shared, usage["REG"], usage["STACK"], usage["LOCAL"], loads, mma
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        dump = subprocess.run(
            [CUOBJDUMP, "-res-usage", file], capture_output=True, text=True, check=True
        )
    usage = re.search(r"REG:\d+.*", dump.stdout + dump.stderr)
    assert usage, f"cuobjdump said nothing of registers:\n{dump.stdout}{dump.stderr}"
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage[0])}

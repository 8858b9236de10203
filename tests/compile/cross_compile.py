# SPDX-License-Identifier: Apache-2.0
"""Compiles the launches of an op for a GPU that is not there, by running the op's own launch code.

The op's public function is called with CPU tensors; each launch that it makes is specialised as
on a GPU (divisibility, equality to 1, constexprs, options) and compiled, and not run. So what is
measured here is what a real launch would compile, by construction.

Needs a process without TRITON_INTERPRET: Triton reads it when a kernel is decorated.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

SMS = 188  # an RTX PRO 6000's
_MMA = r"\b(?:mma\.sync|wgmma|tcgen05)[\w.:]*"
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Case:
    """One call of an op whose launches are compiled; a subclass adds the axes of its op.

    Attributes:
        arch: 120 or 121, or 90 for what is of Hopper's only; others for what runs there too.
    """

    arch: int

    @property
    def tile(self) -> str | None:
        """What the summary groups the launches by; None leaves them out."""
        raise NotImplementedError

    def call(self) -> None:
        """Call the op with CPU tensors, as on a GPU with `SMS` multiprocessors."""
        raise NotImplementedError


@dataclass(frozen=True)
class Compiled:
    """What the assembler made of one launch. Sizes in bytes.

    Attributes:
        stack, local: both 0 when no register is spilled.
        loads: bits of one thread's global load -> how many such instructions, from the PTX.
        copies: the same of asynchronous copies to shared memory.
        tma: how many loads of blocks by TMA, from the PTX.
        mma: tensor-core instructions by name, from the PTX.
        barriers: in each loop that has tensor-core instructions, from the PTX.
        serialised: what the assembler says of wgmma that it cannot leave in flight.
    """

    kernel: str
    shared: int
    registers: int
    stack: int
    local: int
    loads: dict[int, int]
    copies: dict[int, int]
    tma: int
    mma: dict[str, int]
    barriers: tuple[int, ...]
    serialised: tuple[str, ...]


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
    launches = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        launches.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    driver.set_active(_AbsentGpu(case.arch))
    JITFunction.run = compile_only
    try:
        case.call()
    finally:
        JITFunction.run = run
    return [_inspect(name, kernel) for name, kernel in launches]


def _inspect(name: str, kernel) -> Compiled:
    usage = _resource_usage(kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    loads: dict[int, int] = {}
    for vector, bits in re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.[busf](\d+)\b", ptx):
        width = int(vector or 1) * int(bits)
        loads[width] = loads.get(width, 0) + 1
    copies: dict[int, int] = {}
    for size in re.findall(
        r"cp\.async\.c[ag]\.shared\.global[\w.:]* \[[^]]*\], \[[^]]*\], 0x(\w+)", ptx
    ):
        copies[8 * int(size, 16)] = copies.get(8 * int(size, 16), 0) + 1
    mma: dict[str, int] = {}
    for instruction in re.findall(_MMA, ptx):
        mma[instruction] = mma.get(instruction, 0) + 1
    return Compiled(
        name,
        kernel.metadata.shared,
        usage["REG"],
        usage["STACK"],
        usage["LOCAL"],
        loads,
        copies,
        len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.shared", ptx)),
        mma,
        tuple(len(re.findall(r"\bbar(?:rier)?\.sync\b", loop)) for loop in _mma_loops(ptx)),
        _serialised(ptx) if "wgmma" in ptx else (),
    )


def _mma_loops(ptx: str) -> list[str]:
    labels = {label[1]: label.start() for label in re.finditer(r"^(\$\w+):", ptx, re.M)}
    branches = re.finditer(r"\bbra(?:\.uni)?\s+(\$\w+);", ptx)
    loops = [ptx[labels[branch[1]] : branch.start()] for branch in branches]
    return [loop for loop in loops if re.search(_MMA, loop)]


def _serialised(ptx: str) -> tuple[str, ...]:
    # Assembled again: Triton drops what the assembler says where it succeeds.
    run = subprocess.run(
        [TOOLS / "ptxas", "-v", "--gpu-name=sm_90a", "-", "-o", "/dev/null"],
        input=ptx, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return tuple(re.findall(r"\(C75\d\d\).*", run.stdout + run.stderr))


def _resource_usage(cubin: bytes) -> dict[str, int]:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        dump = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file], capture_output=True, text=True, check=True
        )
    usage = re.search(r"REG:\d+.*", dump.stdout + dump.stderr)
    assert usage, f"cuobjdump said nothing of registers:\n{dump.stdout}{dump.stderr}"
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage[0])}

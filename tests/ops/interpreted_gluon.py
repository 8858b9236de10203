# SPDX-License-Identifier: Apache-2.0
"""Gluon's language over Triton's interpreter, as far as our kernels of it go.

Layouts, barriers and fences mean nothing here: they are the compiler's. What is asynchronous is
checked: a copy leaves NaN until it is waited for, and a dot must have the same operands when it is
waited for as when it was issued. Values of bf16 are fp32, as in our interpreted Triton kernels.
"""

import importlib.util
import re
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import triton
import triton.language as tl
from triton.runtime.interpreter import TensorHandle


def load(name: str, parts: tuple[str, ...] = ()) -> ModuleType:
    """The module `name` of Gluon kernels, once more, with kernels that run here.

    `parts` are modules of such functions that it imports, in the order in which they do.
    """
    nvidia = f"{gluon.__name__}.language.nvidia"
    stand_ins = {
        gluon.__name__: gluon,
        f"{gluon.__name__}.language": language,
        f"{nvidia}.ampere": _module("ampere", async_copy=AsyncCopy, mma_v2=_multiply),
        f"{nvidia}.hopper": _module(
            "hopper",
            fence_async_shared=lambda: None,
            warpgroup_mma=Dot,
            warpgroup_mma_wait=_wait_for_dot,
        ),
    }
    import triton.experimental

    with (
        mock.patch.dict(sys.modules, stand_ins),
        mock.patch.object(triton.experimental, "gluon", gluon, create=True),
    ):
        for part in parts:
            sys.modules[part] = _execute(part)
        return _execute(name)


def _execute(name: str) -> ModuleType:
    spec = importlib.util.find_spec(name)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def jit(function: Callable | None = None, **options: Any) -> Any:
    """`gluon.jit`."""
    if function is None:
        return lambda function: jit(function, **options)
    # Whose members the interpreter replaces where a kernel sees them.
    function.__globals__["tl"] = tl
    kernel = triton.jit(function, **options)
    # As the interpreter rewrites them they are strings, of which it knows those that begin with tl.
    kernel.rewrite().__annotations__ = function.__annotations__
    return kernel


class Layout:
    """Any layout."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass


# What nothing has been written to, as int32: NaN in bf16, and 480 and -2 in our e4m3.
POISON = 0x7FC07FC0


class SharedMemory:
    """fp32 values, of which `in_words` takes two as one int32 word of bf16; or integers."""

    def __init__(self, values: np.ndarray, in_words: bool = False) -> None:
        self.values = values
        self._in_words = in_words

    def index(self, place: Any) -> "SharedMemory":
        return SharedMemory(self.values[int(place)], self._in_words)

    def slice(self, start: Any, length: Any, dim: int) -> "SharedMemory":
        width = 2 if self._in_words and dim == self.values.ndim - 1 else 1
        first, last = (int(end) * width for end in (start, start + length))
        place = [slice(None)] * self.values.ndim
        place[dim] = slice(first, last)
        return SharedMemory(self.values[tuple(place)], self._in_words)

    def permute(self, order: tuple[int, ...]) -> "SharedMemory":
        return SharedMemory(self.values.transpose(order), self._in_words)

    def _reinterpret(self, dtype: Any, shape: Any, *_: Any) -> "SharedMemory":
        *sizes, width = _numbers(shape)
        if dtype == tl.uint8:
            return SharedMemory(self.values.view(np.uint8).reshape(*sizes, width))
        in_words = dtype == tl.int32
        return SharedMemory(self.values.reshape(*sizes, width << in_words), in_words)

    def store(self, value: Any) -> None:
        stored = value.handle.data
        if self._in_words:
            words = stored.astype(np.uint32)
            pairs = np.stack([words << np.uint32(16), words & np.uint32(0xFFFF0000)], -1)
            stored = pairs.view(np.float32).reshape(*words.shape[:-1], -1)
        assert stored.shape == self.values.shape
        self.values[...] = stored

    def load(self, *_: Any) -> Any:
        if self.values.dtype == np.float32:
            return _tensor(self.values.copy())
        dtype = {np.dtype(np.int32): tl.int32, np.dtype(np.uint8): tl.uint8}[self.values.dtype]
        return tl.tensor(
            TensorHandle(self.values.copy(), dtype), tl.block_type(dtype, list(self.values.shape))
        )


class AsyncCopy:
    """cp.async."""

    # Groups on their way, each of memory and what will be there; the last one is not committed.
    _groups: list[list[tuple[SharedMemory, np.ndarray]]] = [[]]

    @classmethod
    def async_copy_global_to_shared(
        cls, memory: SharedMemory, pointers: Any, mask: Any = None
    ) -> None:
        value = tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0)
        in_floats = memory.values.dtype == np.float32
        value = value.to(tl.float32 if in_floats else tl.int32).handle.data.copy()
        assert value.shape == memory.values.shape
        cls._groups[-1].append((memory, value))
        memory.values[...] = np.nan if in_floats else POISON

    @classmethod
    def commit_group(cls) -> None:
        cls._groups.append([])

    @classmethod
    def wait_group(cls, pending: Any) -> None:
        pending = int(getattr(pending, "value", pending))
        while len(cls._groups) - 1 > pending:
            for memory, values in cls._groups.pop(0):
                memory.values[...] = values


def _multiply(a: Any, b: Any, acc: Any) -> Any:
    """`mma_v2`."""
    with np.errstate(all="ignore"):
        return _tensor(a.handle.data.astype(np.float32) @ b.handle.data + acc.handle.data)


class Dot:
    """wgmma that has been issued: `warpgroup_mma`."""

    def __init__(
        self, a: Any, b: SharedMemory, acc: Any, *, use_acc: bool = True, is_async: bool
    ) -> None:
        self._a = a.values if isinstance(a, SharedMemory) else a.handle.data
        self._b = b.values
        self._acc = acc.handle.data if use_acc else np.float32(0)
        self._issued = self.product()

    def product(self) -> np.ndarray:
        with np.errstate(all="ignore"):
            return self._a.astype(np.float32) @ self._b + self._acc

    def wait(self) -> Any:
        product = self.product()
        same = np.array_equal(product, self._issued, equal_nan=True)
        assert same, "an operand was overwritten before the dot was waited for"
        return _tensor(product)


def _wait_for_dot(pending: int, dots: list[Dot]) -> Any:
    assert pending == 0
    (dot,) = dots
    return dot.wait()


def inline_asm_elementwise(
    asm: Any, constraints: str, arguments: list[Any], *, dtype: Any, is_pure: bool, pack: int
) -> Any:
    """PTX, one element after the other; with two results, or the program's place in the grid."""
    ptx = getattr(asm, "value", asm)
    if "%ctaid.x" in ptx:
        return tl.program_id(0)
    operands = [argument.handle.data.astype(np.uint32) for argument in arguments]
    results = run_ptx(ptx, *operands)
    shape = list(operands[0].shape)
    return tuple(
        tl.tensor(TensorHandle(words.view(np.int32), tl.int32), tl.block_type(tl.int32, shape))
        for words in results
    )


def run_ptx(ptx: str, *operands: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The results $0 and $1 of uint32 operands $2 and so on, of one shape."""
    registers = {f"${place}": values for place, values in enumerate(operands, 2)}

    def value(name: str) -> np.ndarray:
        if name in registers:
            return registers[name]
        return np.full_like(operands[0], int(name, 0))

    for line in ptx.strip().strip("{}").split(";"):
        instruction, *rest = line.split(maxsplit=1)[:2] or [""]
        if instruction in ("", ".reg"):
            continue
        target, *names = re.split(r",\s*", rest[0].strip())
        registers[target] = _INSTRUCTIONS[instruction](*map(value, names))
    return registers["$0"], registers["$1"]


def _permute_bytes(a: np.ndarray, b: np.ndarray, selection: np.ndarray) -> np.ndarray:
    both = (b.astype(np.uint64) << np.uint64(32)) | a
    result = np.zeros_like(both)
    for byte in range(4):
        wanted = (selection.astype(np.uint64) >> np.uint64(4 * byte)) & np.uint64(0xF)
        assert (wanted < 8).all(), "the mode that replicates signs"
        picked = (both >> (wanted * np.uint64(8))) & np.uint64(0xFF)
        result |= picked << np.uint64(8 * byte)
    return result.astype(np.uint32)


def _look_up(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    result = np.zeros_like(a)
    for row in range(8):
        chosen = [x if row >> (2 - place) & 1 else ~x for place, x in enumerate((a, b, c))]
        if int(table.flat[0]) >> row & 1:
            result |= chosen[0] & chosen[1] & chosen[2]
    return result


def _multiply_bf16x2(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    def half(shift: int) -> np.ndarray:
        x, y = (
            ((word >> np.uint32(shift)) << np.uint32(16)).astype(np.uint32).view(np.float32)
            for word in (a, b)
        )
        with np.errstate(all="ignore"):
            bits = (x * y).view(np.uint32)  # exact, but for what is subnormal or too large
        even = (bits >> np.uint32(16)) & np.uint32(1)
        return (bits + np.uint32(0x7FFF) + even) >> np.uint32(16)

    return half(0) | half(16) << np.uint32(16)


_INSTRUCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "mov.b32": lambda a: a,
    "mul.lo.u32": lambda a, b: a * b,
    "and.b32": lambda a, b: a & b,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": _permute_bytes,
    "lop3.b32": _look_up,
    # The third operand is -0.
    "fma.rn.bf16x2": lambda a, b, c: _multiply_bf16x2(a, b),
}


def _tensor(values: np.ndarray) -> Any:
    values = np.ascontiguousarray(values, dtype=np.float32)
    return tl.tensor(
        TensorHandle(values, tl.float32), tl.block_type(tl.float32, list(values.shape))
    )


def _module(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(members)
    return module


def _of_triton(name: str) -> Callable:
    # Looked up when it is called: the interpreter has replaced it then.
    return lambda *arguments, **options: getattr(tl, name)(*arguments, **options)


def _without_layout(name: str) -> Callable:
    function = _of_triton(name)
    return lambda *arguments, layout=None, **options: function(*arguments, **options)


def _numbers(shape: Iterable[Any]) -> list[int]:
    return [int(getattr(size, "value", size)) for size in shape]


language = _module(
    "triton.experimental.gluon.language",
    **{
        name: getattr(tl, name) for name in (
            "constexpr", "pointer_type", "int32", "int64", "uint8", "float8e4nv",
        )
    },
    **dict.fromkeys(("float32", "bfloat16"), tl.float32),
    **{
        name: _of_triton(name)
        for name in (
            "load", "store", "where", "maximum", "minimum", "exp2", "log2", "abs", "ceil",
            "max", "sum", "reshape", "broadcast", "join", "split", "cdiv", "program_id",
            "permute",
        )
    },
    **dict.fromkeys(
        (
            "BlockedLayout", "SliceLayout", "NVMMADistributedLayout", "DistributedLinearLayout",
            "NVMMASharedLayout", "SwizzledSharedLayout", "DotOperandLayout",
            "SharedLinearLayout",
        ),
        Layout,
    ),
    arange=_without_layout("arange"),
    full=lambda shape, value, dtype, layout: tl.full(_numbers(shape), value, dtype),
    convert_layout=lambda tensor, layout: tensor,
    thread_barrier=lambda: None,
    multiple_of=lambda tensor, values: tensor,
    max_contiguous=lambda tensor, values: tensor,
    static_range=lambda *ends: range(*_numbers(ends)),
    allocate_shared_memory=lambda dtype, shape, layout: SharedMemory(
        np.full(_numbers(shape), POISON, np.int32)
        if dtype == tl.int32
        else np.full(_numbers(shape), np.nan, np.float32)
    ),
    inline_asm_elementwise=inline_asm_elementwise,
)  # fmt: skip
gluon = _module("triton.experimental.gluon", jit=jit, language=language)

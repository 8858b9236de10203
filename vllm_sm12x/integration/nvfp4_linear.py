# SPDX-License-Identifier: Apache-2.0
"""NVFP4 linear layers on cuDNN, where FlashInfer's CUTLASS kernel is compiled without its waits.

Each launch of that kernel may overlap the one before it, and waits for it with `griddepcontrol`.
CUTLASS compiles the wait to nothing unless a macro is defined: then tiles are read before they are
written. `CUTLASS_ENABLE_GDC_FOR_SM100` is the one for SM12x too, in CUTLASS headers that know
SM12x at all.
"""

import ast
import importlib.util
import re
from collections.abc import Iterator
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from packaging.version import Version

CUDNN_KERNEL = "FlashInferCudnnNvFp4LinearKernel"
_GENERATOR = "gen_gemm_sm120_module_cutlass_fp4"
_MODULE = "fp4_gemm_cutlass_sm120"
_BUILDER = "gen_jit_spec"  # adds the flags that every module has
_HEADER = Path("data/cutlass/include/cutlass/arch/grid_dependency_control.h")
_MACRO = re.compile(r"CUTLASS_ENABLE_GDC_FOR_SM\d+")
FRONTEND = "nvidia-cudnn-frontend"
_FRONTEND_OF_FP4 = Version("1.13")  # FlashInfer's _check_cudnn_fp4_availability


class Finding(NamedTuple):
    """Yes, no, or None where nothing can be told; and why, in words."""

    yes: bool | None
    reason: str


def cutlass_is_sound(capability: tuple[int, int]) -> Finding:
    """Whether nothing of FlashInfer's SM12x FP4 GEMM in CUTLASS is compiled without its waits.

    Read from FlashInfer's source: the function that names the flags asks for a GPU and nvcc, and
    writes files. None where it is not where it was.
    """
    folder = _folder("flashinfer")
    if folder is None:
        return Finding(True, "FlashInfer is not installed, so vLLM takes none of its kernels")
    version = _version("flashinfer-python")
    try:
        flags = [
            *_strings_of(folder / "jit" / "gemm" / "core.py", _GENERATOR),
            *_strings_of(folder / "jit" / "core.py", _BUILDER),
        ]
        header = (folder / _HEADER).read_text(encoding="utf-8")
    except (OSError, LookupError, SyntaxError) as error:
        return Finding(None, f"the flags of FlashInfer {version} cannot be read: {error}")
    macro = _macro_for(header, capability)
    if macro is None:
        sm = "SM {}.{}".format(*capability)
        return Finding(False, f"the CUTLASS of FlashInfer {version} has no grid waits for {sm}")
    defined = any(flag.partition("=")[0] == f"-D{macro}" for flag in flags)
    how = "with" if defined else "without"
    return Finding(defined, f"FlashInfer {version} compiles {_MODULE} {how} -D{macro}")


def cudnn_serves_fp4() -> Finding:
    """Whether FlashInfer can reach cuDNN's FP4 GEMM, which takes cuDNN's Python frontend."""
    if importlib.util.find_spec("cudnn") is None:
        return Finding(False, f"the package {FRONTEND} is not installed")
    version = _version(FRONTEND)
    if version != "?" and Version(version) < _FRONTEND_OF_FP4:
        return Finding(False, f"{FRONTEND} is {version}, and FP4 needs {_FRONTEND_OF_FP4} or later")
    return Finding(True, f"{FRONTEND} {version}")


def prefer_cudnn(undo: ExitStack) -> None:
    """vLLM tries cuDNN's kernel right before FlashInfer's CUTLASS one, where no flag names one."""
    from vllm_sm12x.vllm_api import nvfp4_linear as stock

    kernels, cudnn = stock.kernels(), stock.FlashInferCudnnNvFp4LinearKernel
    before = kernels.index(cudnn)

    def move(to: int) -> None:
        kernels.remove(cudnn)
        kernels.insert(to, cudnn)

    move(kernels.index(stock.FlashInferCutlassNvFp4LinearKernel))
    undo.callback(move, before)


def _folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "?"


def _macro_for(header: str, capability: tuple[int, int]) -> str | None:
    """The macro that the header's condition on this architecture asks for."""
    architecture = f"__CUDA_ARCH__ == {100 * capability[0] + 10 * capability[1]}"
    before, found, _ = header.partition(architecture)
    macros = _MACRO.findall(before)
    return macros[-1] if found and macros else None


def _strings_of(module: Path, function: str) -> Iterator[str]:
    """String constants of a function and of what it names at the top of its module.

    Raises LookupError where the module has no such function, SyntaxError, and OSError.
    """
    top: dict[str, ast.AST] = {}
    for statement in ast.parse(module.read_text(encoding="utf-8"), module.name).body:
        if isinstance(statement, ast.FunctionDef):
            top[statement.name] = statement
        elif isinstance(statement, ast.Assign):
            names = [each.id for each in statement.targets if isinstance(each, ast.Name)]
            top.update(dict.fromkeys(names, statement))
    if function not in top:
        raise LookupError(f"{module} has no {function}")
    waiting, seen = [function], {function}
    while waiting:
        for node in ast.walk(top[waiting.pop()]):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.Name) and node.id in top and node.id not in seen:
                seen.add(node.id)
                waiting.append(node.id)

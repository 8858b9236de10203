# SPDX-License-Identifier: Apache-2.0
"""MXFP4 experts on Marlin: whether vLLM's build of it is for this GPU, and that it comes first."""

from collections.abc import Callable
from typing import Any, NamedTuple

from vllm_sm12x.integration.extension import FatBinary, NotReadable, fat_binaries
from vllm_sm12x.vllm_api import extensions

# Of Marlin's files, one that permutes columns comes as PTX on every GPU after SM80, and is right.
PTX_FILES_OF_A_GOOD_BUILD = 1
_REMEDY = (
    "install vllm>=0.23 from its wheel, or build vLLM with 12.0 (without +PTX) in "
    "TORCH_CUDA_ARCH_LIST"
)


class MarlinBuild(NamedTuple):
    """Whether Marlin's kernels for experts run natively, why or why not; a remedy if they harm."""

    native: bool
    reason: str
    remedy: str = ""


def marlin_build(capability: tuple[int, int]) -> MarlinBuild:
    """Look into vLLM's extension for code that runs on a GPU of that compute capability.

    It holds a fat binary for each source file; Marlin's are some 20 of them, and nothing in a
    header says which. All were native from 0.23 on but one. Before, 15 had only PTX of SM80, and
    what the driver made of it computed wrong outputs on SM12x (vLLM #40923).
    """
    file = extensions.moe_extension()
    if file is None:
        return MarlinBuild(False, "vLLM was built without the extension _moe_C, which has Marlin")
    try:
        binaries = fat_binaries(file)
    except (NotReadable, OSError) as error:
        return MarlinBuild(False, f"the GPU code of vLLM's extension cannot be read: {error}")
    gpu = f"SM {capability[0]}.{capability[1]}"
    native = [binary for binary in binaries if _names(binary, "cubin", capability)]
    by_ptx = [
        binary
        for binary in binaries
        if _names(binary, "ptx", capability) and not _names(binary, "cubin", capability)
    ]
    names = _all_names(native, "cubin", capability)
    if native and len(by_ptx) <= PTX_FILES_OF_A_GOOD_BUILD:
        return MarlinBuild(True, f"{file.name} has {names} code for {gpu}")
    if by_ptx:
        ptx = _all_names(by_ptx, "ptx", capability)
        reason = f"{len(by_ptx)} files of {file.name} have no code for {gpu} but {ptx} PTX"
        return MarlinBuild(False, reason, _REMEDY)
    return MarlinBuild(False, f"{file.name} has no code that runs on {gpu}")


def marlin_first(original: Callable[..., list[Any]], *args: Any, **kwargs: Any) -> list[Any]:
    """Around vLLM's order of backends: Marlin's come first, the others keep their order."""
    from vllm_sm12x.vllm_api.mxfp4_experts import MARLIN

    backends = original(*args, **kwargs)
    return sorted(backends, key=lambda backend: backend not in MARLIN)


def _names(binary: FatBinary, kind: str, capability: tuple[int, int]) -> set[str]:
    return {image.name for image in binary if image.kind == kind and image.runs_on(capability)}


def _all_names(binaries: list[FatBinary], kind: str, capability: tuple[int, int]) -> str:
    names = {name for binary in binaries for name in _names(binary, kind, capability)}
    return " and ".join(sorted(names))

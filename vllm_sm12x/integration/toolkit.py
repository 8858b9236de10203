# SPDX-License-Identifier: Apache-2.0
"""The CUDA compiler, found as DeepGEMM and FlashInfer find it when they compile at run time."""

import functools
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from vllm_sm12x import knobs

# The first nvcc that knows the family target sm_120f, which DeepGEMM and FlashInfer compile for.
SM12X_NVCC = (12, 9)
_DEFAULT_HOME = Path("/usr/local/cuda")


class Compiler(NamedTuple):
    """Whether there is an nvcc that compiles for SM12x, and which, or why not."""

    yes: bool
    reason: str


def compiler_for_sm12x() -> Compiler:
    """The nvcc of CUDA_HOME, else CUDA_PATH, else PATH, else /usr/local/cuda; at least 12.9.

    That is the order of `_find_cuda_home` of DeepGEMM and `get_cuda_path` of FlashInfer: a folder
    that a variable names is taken even if it holds no nvcc.
    """
    named, on_path = knobs.cuda_home(), shutil.which("nvcc")
    nvcc = Path(named) / "bin" / "nvcc" if named else Path(on_path or _DEFAULT_HOME / "bin/nvcc")
    if not nvcc.is_file():
        where = f"{nvcc} does not exist" if named else f"it is neither on PATH nor {nvcc}"
        return Compiler(False, f"nvcc was not found ({where})")
    found = _version(nvcc)
    if isinstance(found, str):
        return Compiler(False, found)
    number, least = ("{}.{}".format(*version) for version in (found, SM12X_NVCC))
    if found < SM12X_NVCC:
        return Compiler(False, f"{nvcc} is {number}, and SM12x needs {least} or later")
    return Compiler(True, f"{nvcc} {number}")


@functools.cache
def _version(nvcc: Path) -> tuple[int, int] | str:
    """What `nvcc --version` says, or in words why it says nothing."""
    try:
        answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{nvcc} does not run ({error})"
    release = re.search(r"release (\d+)\.(\d+)", answer.stdout)
    if answer.returncode or release is None:
        return f"{nvcc} --version tells no release (exit status {answer.returncode})"
    return int(release[1]), int(release[2])

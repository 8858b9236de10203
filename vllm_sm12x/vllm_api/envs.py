# SPDX-License-Identifier: Apache-2.0
"""vLLM's table of environment variables, and which of them choose a kernel."""

from pathlib import Path
from typing import Any

from vllm.envs import environment_variables

# What chooses among NVFP4 linear kernels, besides the flags.
NVFP4_CHOICES = (
    "VLLM_BATCH_INVARIANT",
    # until: vllm>=0.24, which has the flags alone.
    "VLLM_NVFP4_GEMM_BACKEND",
    "VLLM_USE_FBGEMM",
    "VLLM_USE_NVFP4_CT_EMULATIONS",
)
DISABLED_KERNELS = "VLLM_DISABLED_KERNELS"
USE_DEEP_GEMM = "VLLM_USE_DEEP_GEMM"
# until: vllm>=0.24, which has --moe-backend alone.
MXFP4_USE_MARLIN = "VLLM_MXFP4_USE_MARLIN"


def value_of(name: str) -> Any:
    """What vLLM reads of a variable, None where this vLLM has none of that name."""
    return environment_variables.get(name, lambda: None)()


def batch_invariant() -> bool:
    """Whether the user asked for results that do not depend on the batch (VLLM_BATCH_INVARIANT)."""
    return bool(value_of("VLLM_BATCH_INVARIANT"))


def config_root() -> Path:
    """Where vLLM keeps a user's configuration (VLLM_CONFIG_ROOT)."""
    return Path(environment_variables["VLLM_CONFIG_ROOT"]())


def tuned_config_folder() -> Path | None:
    """The folder in which the user keeps tuned kernel configurations (VLLM_TUNED_CONFIG_FOLDER)."""
    folder = environment_variables["VLLM_TUNED_CONFIG_FOLDER"]()
    return Path(folder) if folder else None


__all__ = [
    "DISABLED_KERNELS",
    "MXFP4_USE_MARLIN",
    "NVFP4_CHOICES",
    "USE_DEEP_GEMM",
    "batch_invariant",
    "config_root",
    "environment_variables",
    "tuned_config_folder",
    "value_of",
]

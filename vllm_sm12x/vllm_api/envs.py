# SPDX-License-Identifier: Apache-2.0
"""vLLM's table of environment variables."""

from pathlib import Path

from vllm.envs import environment_variables


def config_root() -> Path:
    """Where vLLM keeps a user's configuration (VLLM_CONFIG_ROOT)."""
    return Path(environment_variables["VLLM_CONFIG_ROOT"]())


def tuned_config_folder() -> Path | None:
    """The folder in which the user keeps tuned kernel configurations (VLLM_TUNED_CONFIG_FOLDER)."""
    folder = environment_variables["VLLM_TUNED_CONFIG_FOLDER"]()
    return Path(folder) if folder else None


__all__ = ["config_root", "environment_variables", "tuned_config_folder"]

# SPDX-License-Identifier: Apache-2.0
"""The VllmConfig of what vLLM is doing. `vllm.config` cannot be imported with the platform."""

from typing import Any


def current_config() -> Any:
    """The VllmConfig that vLLM has made current, as it does to build a model; else None."""
    from vllm.config import get_current_vllm_config_or_none

    return get_current_vllm_config_or_none()

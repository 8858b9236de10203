# SPDX-License-Identifier: Apache-2.0
"""The VllmConfig of what vLLM is doing. `vllm.config` cannot be imported with the platform."""

from typing import Any


def current_config() -> Any:
    """The VllmConfig that vLLM has made current, as it does to build a model; else None."""
    from vllm.config import get_current_vllm_config_or_none

    return get_current_vllm_config_or_none()


def fp4_indexer_option(attention_config: Any) -> str | None:
    """The entry of `--attention-config` that asks for FP4 indexer keys, None if there is none."""
    # until: vllm>=0.30, which has indexer_kv_dtype alone.
    if getattr(attention_config, "use_fp4_indexer_cache", False):
        return '"use_fp4_indexer_cache"'
    if getattr(attention_config, "indexer_kv_dtype", None) == "mxfp4":
        return '"indexer_kv_dtype": "mxfp4"'
    return None


def new_kernel_config() -> Any:
    """A KernelConfig as it is where the user gives no flag."""
    from vllm.config.kernel import KernelConfig

    return KernelConfig()


def selects_keys(model_config: Any) -> bool:
    """Whether the model has a sparse indexer, by the field that vLLM asks for too."""
    return hasattr(model_config.hf_text_config, "index_topk")

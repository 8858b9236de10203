# SPDX-License-Identifier: Apache-2.0
"""Which attention DeepSeek V4 gets, and why: one decision for the platform and for the model."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_sm12x import knobs
from vllm_sm12x.log import get_logger, once
from vllm_sm12x.vllm_api import registry

NAME = "TRITON_MLA_SPARSE"
BACKEND_PATH = "vllm_sm12x.integration.sparse_mla.TritonMlaSparseBackend"
# All build the same decoder layers; the one with vision is in vLLM from 0.30 on.
SERVED_ARCHITECTURES = (
    "DeepseekV4ForCausalLM",
    "DeepseekV4ForConditionalGeneration",
    "DeepSeekV4MTPModel",
    "DSparkDraftModel",
)

logger = get_logger(__name__)


class NameRefused(ValueError):
    """TRITON_MLA_SPARSE was named where it cannot be used; the message says why."""


@dataclass(frozen=True)
class Choice:
    """Whether TRITON_MLA_SPARSE is used, whether the user said so, and the reason in words."""

    ours: bool
    explicit: bool
    why: str


def choose(vllm_config: Any) -> Choice:
    """Decide by `--attention-backend` first, then VLLM_TRITON_MLA_SPARSE, then the GPU.

    To be asked only where the plugin is active. Raises NameRefused.
    """
    backend = vllm_config.attention_config.backend
    if backend is not None:
        if registry.path_of(backend) != BACKEND_PATH:
            return Choice(False, True, f"--attention-backend {backend.name}")
        _refuse_if_switched_off()
        return Choice(True, True, f"--attention-backend {NAME}")
    switch = knobs.get("VLLM_TRITON_MLA_SPARSE")
    if switch is not None:
        return Choice(switch, True, f"VLLM_TRITON_MLA_SPARSE={switch:d}")
    if knobs.get("VLLM_SM12X_ASSUME"):
        return Choice(True, True, "VLLM_SM12X_ASSUME")
    return Choice(True, False, "the GPU is SM12x")


def serves(vllm_config: Any) -> bool:
    """Whether the model is one that TRITON_MLA_SPARSE serves."""
    model_config = vllm_config.model_config
    return model_config is not None and any(
        name in SERVED_ARCHITECTURES for name in model_config.architectures
    )


def look_up(original: Callable[..., Any], enum: type, name: str) -> Any:
    """Around the registry's lookup: TRITON_MLA_SPARSE is the CUSTOM member. Raises NameRefused."""
    if name != NAME or enum is not type(registry.CUSTOM):
        return original(enum, name)
    _refuse_if_switched_off()
    holder = registry.path_of(registry.CUSTOM)
    if holder != BACKEND_PATH:
        raise NameRefused(
            f"{NAME} cannot be chosen by name: vLLM's one CUSTOM backend is {holder}. "
            "Set VLLM_TRITON_MLA_SPARSE=1 instead."
        )
    return registry.CUSTOM


def select_attention_class(
    original: Callable[..., type], vllm_config: Any, *args: Any, **kwargs: Any
) -> type:
    """Around vLLM's choice of the DeepSeek V4 attention class."""
    choice = choose(vllm_config)
    if choice.ours:
        from vllm_sm12x.integration.sparse_mla import TritonMlaSparseAttention

        chosen: type = TritonMlaSparseAttention
    else:
        chosen = original(vllm_config, *args, **kwargs)
    label = f"{chosen.__name__} ({NAME})" if choice.ours else chosen.__name__
    once(logger, logging.INFO, f"DeepSeek V4 attention: {label}, because {choice.why}.")
    return chosen


def _refuse_if_switched_off() -> None:
    if knobs.get("VLLM_TRITON_MLA_SPARSE") is False:
        raise NameRefused(f"{NAME} was chosen by name, and VLLM_TRITON_MLA_SPARSE=0 forbids it.")

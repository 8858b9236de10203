# SPDX-License-Identifier: Apache-2.0
"""Who calls DeepSeek V4's hyper-connections in vLLM. Light to import: vLLM is, in the functions."""

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from vllm_sm12x.vllm_api import version

_FOLDER = "vllm.models.deepseek_v4.nvidia"
_WARM_UP_HELPER = "vllm.model_executor.warmup.jit_warmup_tilelang_helper"
REGISTER_WARMUP = "register_warmup"
_HEAD, _POST, _PRE = "hc_head_fused_kernel_tilelang", "mhc_post_tilelang", "mhc_pre_tilelang"
_FUSED, _BROADCAST = "mhc_fused_post_pre_tilelang", "mhc_pre_broadcast_tilelang"
# The methods that call the functions below, in modules that take them by name.
_CALLERS = {
    "model": ("DeepseekV4DecoderLayer.forward", "DeepseekV4Model.forward"),
    "mtp": (
        "DeepSeekV4MultiTokenPredictorLayer.forward",
        "DeepSeekV4MultiTokenPredictor.compute_logits",
    ),
    "dspark": ("DSparkDeepseekV4Model.forward",),
}


def symbols() -> tuple[str, ...]:
    """Dotted names of the functions, where the installed vLLM's model code must have them."""
    names: dict[str, tuple[str, ...]] = {
        "model": (_HEAD, _FUSED, _POST, _PRE),
        "mtp": (_HEAD, _POST),
    }
    # until: vllm>=0.25, which has DSpark's drafter.
    if version.within(version.installed(), ">=0.25"):
        names["dspark"] = (_HEAD, _POST)
    # until: vllm>=0.26, whose first layer expands the embedding.
    if version.within(version.installed(), ">=0.26"):
        names["model"] += (_BROADCAST,)
    found = [f"{_FOLDER}.{module}.{name}" for module in names for name in names[module]]
    # until: vllm>=0.30, whose layers register the kernels that they call.
    if version.within(version.installed(), ">=0.30"):
        found.append(f"{_WARM_UP_HELPER}.VllmTileLangJitKernel.{REGISTER_WARMUP}")
    return tuple(found)


def modules() -> tuple[ModuleType, ...]:
    """The modules that take the functions by name. Heavy: they are the model."""
    paths = [f"{_FOLDER}.{module}" for module in _CALLERS]
    return tuple(importlib.import_module(path) for path in paths if importlib.util.find_spec(path))


def stock_functions() -> dict[str, Callable[..., Any]]:
    """vLLM's TileLang functions by name."""
    tilelang = importlib.import_module("vllm.model_executor.kernels.mhc.tilelang")
    return {
        name: value
        for name, value in vars(tilelang).items()
        if inspect.isfunction(value)
        and value.__module__ == tilelang.__name__
        and not name.startswith("_")
    }


def warm_up_owner() -> Any:
    """The class of the TileLang kernels that layers register to be compiled at start, or None."""
    if importlib.util.find_spec(_WARM_UP_HELPER) is None:
        return None
    return importlib.import_module(_WARM_UP_HELPER).VllmTileLangJitKernel


def calls() -> dict[str, Callable[..., Any]]:
    """What the model's methods get when they name one of the functions, by `method: name`."""
    stock = stock_functions()
    found: dict[str, Callable[..., Any]] = {}
    for module in modules():
        for path in _CALLERS[module.__name__.rpartition(".")[2]]:
            owner, method = path.split(".")
            function = inspect.unwrap(getattr(getattr(module, owner), method))
            for name in function.__code__.co_names:
                if name in stock:
                    found[f"{path}: {name}"] = function.__globals__[name]
    return found

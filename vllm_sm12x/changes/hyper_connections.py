# SPDX-License-Identifier: Apache-2.0
"""The change that brings DeepSeek V4's hyper-connections (mHC) to Triton."""

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from vllm_sm12x.changes.change import Change, Context, Kind, Phase, Verdict, wrap, wrapped_by
from vllm_sm12x.changes.host import on_sm12x_path
from vllm_sm12x.vllm_api import hyper_connections as stock

NAME = "hyper_connections"


def _replace_by_name(context: Context, undo: ExitStack) -> None:
    from vllm_sm12x.integration.hyper_connections import REPLACEMENTS, register_warmup

    functions = stock.stock_functions()
    for module in stock.modules():
        for name in functions.keys() & vars(module).keys():
            if name not in REPLACEMENTS:
                raise RuntimeError(f"{module.__name__} has {name}, which has no counterpart here")
            theirs, ours = _parameters(functions[name]), _parameters(REPLACEMENTS[name])
            if theirs != ours:
                raise RuntimeError(f"vLLM's {name} takes {theirs}, and its counterpart {ours}")
            wrap(undo, module, name, NAME, _instead(REPLACEMENTS[name]))
    warm_up = stock.warm_up_owner()
    if warm_up is not None:
        wrap(undo, warm_up, stock.REGISTER_WARMUP, NAME, register_warmup)


def _instead(replacement: Callable[..., Any]) -> Callable[..., Any]:
    return lambda original, *args, **kwargs: replacement(*args, **kwargs)


def _parameters(function: Callable[..., Any]) -> list[str]:
    """Names and defaults: what a call by position or by keyword depends on."""
    parameters = inspect.signature(function).parameters.values()
    return [str(parameter.replace(annotation=parameter.empty)) for parameter in parameters]


def _model_calls_ours(context: Context) -> Verdict:
    calls = stock.calls()
    others = [call for call, function in calls.items() if wrapped_by(function) != NAME]
    if others or not calls:
        return Verdict(False, f"still vLLM's own: {', '.join(others) or 'no call was found'}")
    warm_up = stock.warm_up_owner()
    if warm_up is not None and wrapped_by(getattr(warm_up, stock.REGISTER_WARMUP)) != NAME:
        return Verdict(False, "vLLM still compiles their TileLang kernels at start")
    return Verdict(True, f"{len(calls)} calls of the model, its MTP layer and drafters are ours")


ROWS = (
    Change(
        name=NAME,
        kind=Kind.REPLACE,
        phase=Phase.WORKER,
        what="DeepSeek V4's hyper-connections (mHC) run in Triton, on SM12x.",
        why="Their TileLang kernels need an nvcc that fits the installed CUDA headers: `CUDA "
        "compiler and CUDA toolkit headers are incompatible`. With one, requests wait while new "
        "batch sizes compile. Newer releases compile them all at start.",
        upstream="https://github.com/vllm-project/vllm/issues/48809",
        touches=stock.symbols(),
        requires=("worker",),
        wanted=on_sm12x_path,
        apply=_replace_by_name,
        check=_model_calls_ours,
        retire="vLLM serves DeepSeek V4's hyper-connections on SM12x without a CUDA toolkit",
    ),
)

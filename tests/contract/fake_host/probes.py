# SPDX-License-Identifier: Apache-2.0
"""What the contract tests ask of vLLM from inside a process of the fake host.

Nothing here imports the plugin: vLLM finds it by its entry points, or not at all.
"""

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import FunctionType
from typing import Any

ANSWER_FILE = "FAKE_HOST_ANSWER"


def answer(value: Any) -> None:
    """Hand `value` to the test. A file, because vLLM logs to stdout."""
    Path(os.environ[ANSWER_FILE]).write_text(json.dumps(value))


def qualified_name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def in_spawned_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `function` in a child that `spawn` starts: arguments and result are pickled."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def platform_facts() -> dict[str, Any]:
    """Which platform vLLM resolved, as its own code sees it."""
    from vllm import envs
    from vllm.platforms import current_platform

    return {
        "class": qualified_name(type(current_platform)),
        "bases": [qualified_name(base) for base in type(current_platform).__mro__],
        "is_cuda": current_platform.is_cuda(),
        "capability": list(current_platform.get_device_capability() or ()),
        "environment_variables": sorted(envs.environment_variables),
    }


def engine_config(model: str, **arguments: Any) -> Any:
    """The VllmConfig of `vllm serve MODEL` with DeepSeek V4's usual cache and `arguments`."""
    from vllm.engine.arg_utils import EngineArgs

    usual = {"kv_cache_dtype": "fp8", "block_size": 256, "max_model_len": 8192, "max_num_seqs": 8}
    return EngineArgs(model=model, **{**usual, **arguments}).create_engine_config()


def served_config(model: str, *flags: str) -> Any:
    """The VllmConfig that `vllm serve MODEL FLAGS` builds, from vLLM's own argument parser."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import make_arg_parser, validate_parsed_serve_args
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    arguments = parser.parse_args([model, *flags])
    if getattr(arguments, "model_tag", None) is not None:
        arguments.model = arguments.model_tag
    validate_parsed_serve_args(arguments)
    return AsyncEngineArgs.from_cli_args(arguments).create_engine_config(
        UsageContext.OPENAI_API_SERVER
    )


def config_facts(config: Any) -> dict[str, Any]:
    """The fields of a VllmConfig that the plugin may have an opinion on."""
    backend = config.attention_config.backend
    return {
        "worker_cls": config.parallel_config.worker_cls,
        "enforce_eager": config.model_config.enforce_eager,
        "cudagraph_mode": config.compilation_config.cudagraph_mode.name,
        "compilation_mode": int(config.compilation_config.mode),
        "capture_sizes": config.compilation_config.cudagraph_capture_sizes,
        "attention_backend": backend and backend.name,
        "cache_dtype": config.cache_config.cache_dtype,
        "block_size": config.cache_config.block_size,
    }


def attention_class(config: Any) -> str:
    """The class that DeepSeek V4's decoder layer would build, by vLLM's own function."""
    from vllm.models.deepseek_v4.nvidia import model

    return qualified_name(model._select_dsv4_attn_cls(config))


def worker_facts(config: Any) -> dict[str, str]:
    """Start a worker as an executor does, and look where it would build the model.

    Everything is vLLM's own code but the model runner, which would open the GPU.
    """
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    wrapper = WorkerWrapperBase(rpc_rank=0)
    wrapper.init_worker(
        [
            {
                "vllm_config": config,
                "local_rank": 0,
                "rank": 0,
                "distributed_init_method": "tcp://127.0.0.1:1",
                "is_driver_worker": True,
            }
        ]
    )
    runner = _ModelRunner(config)
    wrapper.worker.model_runner = runner
    wrapper.worker.load_model()
    return {"class": qualified_name(type(wrapper.worker)), "attention": runner.attention}


class _ModelRunner:
    def __init__(self, config: Any) -> None:
        self._config = config
        self.attention = "load_model was not called"

    def load_model(self, **arguments: Any) -> None:
        self.attention = attention_class(self._config)


def failure_of(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> str | None:
    """The message with which `function` fails, None if it does not."""
    try:
        function(*arguments, **keywords)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def worker_process(configs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """For a spawned child: what it makes of each config; the configs travel back too."""
    facts = {
        name: {
            "platform": platform_facts()["class"],
            "config": config_facts(config),
            "worker": worker_facts(config),
        }
        for name, config in configs.items()
    }
    return configs, facts


def vllm_symbols() -> dict[str, Any]:
    """Every function, class and method of the loaded vLLM modules, by its dotted name."""
    symbols: dict[str, Any] = {}
    for module_name, module in sorted(sys.modules.items()):
        if module is None or module_name.partition(".")[0] != "vllm":
            continue
        for name, value in list(vars(module).items()):
            if not callable(value):
                continue
            symbols[f"{module_name}.{name}"] = value
            if isinstance(value, type) and value.__module__ == module_name:
                for member_name, member in vars(value).items():
                    if isinstance(member, FunctionType | classmethod | staticmethod | property):
                        symbols[f"{module_name}.{name}.{member_name}"] = member
    return symbols


def replaced(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names that were there before and mean another object now, or nothing."""
    return sorted(name for name, value in before.items() if after.get(name) is not value)

# SPDX-License-Identifier: Apache-2.0
"""What serving a checkpoint here would be like, from its config and headers, without its weights.

`examine` asks vLLM wherever vLLM imports: its config says what it refuses, a model on the meta
device which kernels and caches it has. Elsewhere sizes come from the checkpoint's own headers.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_sm12x.preflight import kv_cache, memory, weights
from vllm_sm12x.preflight.checkpoint import Checkpoint, CheckpointError, read
from vllm_sm12x.preflight.recipes import RECIPES, serve_line

_LENGTH_STEP = 256


@dataclass(frozen=True)
class Request:
    """What `doctor --model` was asked; None is left to vLLM, or to what fits."""

    model: str
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None


class Refused(ValueError):
    """The model cannot be served as asked; the message is one sentence."""


def examine(
    request: Request, gpu_memory: int | None, unified: bool, vllm_imports: bool
) -> tuple[dict[str, Any], list[str]]:
    """The facts, and the reasons, if any, for which the model would not be served.

    `gpu_memory` is one GPU's bytes, None without a GPU; `unified` says that it is the host's.
    Raises CheckpointError, and Refused for a request that does not fit the model.
    """
    checkpoint = read(request.model)
    _check(request, checkpoint)
    facts: dict[str, Any] = {
        "model": request.model,
        "architecture": checkpoint.architecture,
        "checkpoint_bytes": checkpoint.nbytes,
        "draft_bytes": weights.draft_bytes(checkpoint),
        "kv_cache_bytes_per_token": kv_cache.bytes_per_token(checkpoint.config),
        "parts": [],
        "rules": list(weights.RULES),
    }
    by_stage = weights.by_stage(
        checkpoint, request.tensor_parallel_size, request.pipeline_parallel_size
    )
    facts["weights_bytes_by_stage"] = by_stage
    if not vllm_imports:
        found, config, stages = _without_vllm(request, unified), None, None
    else:
        found, config, stages = _with_vllm(request, checkpoint, unified, facts)
    if gpu_memory is None:
        return facts, []
    return facts, _fit(request, checkpoint, facts, gpu_memory, unified, found, config, stages)


def _check(request: Request, checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    heads, groups = config["num_attention_heads"], config["o_groups"]
    ranks = request.tensor_parallel_size
    if heads % ranks or groups % ranks:
        allowed = [str(n) for n in range(1, groups + 1) if not heads % n and not groups % n]
        raise Refused(
            f"--tensor-parallel-size {ranks} does not divide the model's {heads} attention heads "
            f"in {groups} output groups; allowed are {', '.join(allowed)}."
        )
    layers = config["num_hidden_layers"]
    if request.pipeline_parallel_size > layers:
        raise Refused(
            f"--pipeline-parallel-size {request.pipeline_parallel_size} is more than the model's "
            f"{layers} layers."
        )
    longest = config["max_position_embeddings"]
    if request.max_model_len is not None and request.max_model_len > longest:
        raise Refused(
            f"--max-model-len {request.max_model_len} is beyond the model's {longest}; allowed is "
            f"1 to {longest}."
        )


@dataclass(frozen=True)
class _Settings:
    """What the estimate takes from vLLM's config, or assumes without one."""

    utilization: float
    eager: bool
    machines: int


def _without_vllm(request: Request, unified: bool) -> _Settings:
    default = memory.UNIFIED_UTILIZATION if unified else memory.DEFAULT_UTILIZATION
    return _Settings(request.gpu_memory_utilization or default, eager=False, machines=1)


def _with_vllm(
    request: Request, checkpoint: Checkpoint, unified: bool, facts: dict[str, Any]
) -> tuple[_Settings, Any, Any]:
    """Let vLLM make its config and its model. Raises Refused with what vLLM says."""
    from vllm_sm12x.vllm_api import dry_build

    tensor_ranks, stage_count = request.tensor_parallel_size, request.pipeline_parallel_size
    here = max(dry_build.gpus_here(), 1)
    ranks = tensor_ranks * stage_count
    machines = -(-ranks // here)
    if ranks > here and ranks % machines:
        raise Refused(
            f"{ranks} GPUs do not fall evenly on machines with {here} each; allowed are multiples "
            f"of {here}."
        )
    arguments: dict[str, Any] = {
        "tensor_parallel_size": tensor_ranks,
        "pipeline_parallel_size": stage_count,
        "kv_cache_dtype": "fp8",
        "block_size": kv_cache.BLOCK_SIZE,
    }
    utilization = request.gpu_memory_utilization
    if utilization is None and unified:
        utilization = memory.UNIFIED_UTILIZATION
    if utilization is not None:
        arguments["gpu_memory_utilization"] = utilization
    if request.max_model_len is not None:
        arguments["max_model_len"] = request.max_model_len
    if machines > 1:
        arguments["nnodes"] = machines
    try:
        config = dry_build.engine_config(str(checkpoint.folder), **arguments)
    except ValueError as refusal:
        raise Refused(f"vLLM refuses: {refusal}") from None
    facts["machines"] = machines
    facts["parts"] = _chosen(config, checkpoint)
    settings = _Settings(
        utilization=config.cache_config.gpu_memory_utilization,
        eager=bool(config.model_config.enforce_eager),
        machines=machines,
    )
    try:
        stages = dry_build.build(config, tensor_ranks, stage_count)
    except Exception as error:
        facts["dry_build"] = f"{type(error).__name__}: {error}"
        return settings, config, None
    facts["dry_build"] = None
    facts["parts"].append(
        {
            "part": "caches",
            "choice": ", ".join(stages[-1].attention),
            "why": "the layers of vLLM's model that have one",
        }
    )
    kernels: Counter[tuple[str, str]] = Counter()
    for stage in stages:
        kernels.update(stage.kernels)
    for (part, kernel), count in kernels.items():
        why = f"vLLM's choice in {count} layers, with the changes above in force"
        facts["parts"].append({"part": part, "choice": kernel, "why": why})
    facts["built_bytes_by_stage"] = [stage.parameters + stage.buffers for stage in stages]
    facts["page_bytes"] = [stage.page_bytes for stage in stages]
    return settings, config, stages


def _chosen(config: Any, checkpoint: Checkpoint) -> list[dict[str, str]]:
    """The decisions that vLLM's config carries after the plugin's platform has seen it."""
    parts = []
    choice = _attention(config)
    if choice is not None:
        parts.append(choice)
    parts.append(_loader(config.load_config, checkpoint))
    parts.append(
        {
            "part": "KV cache",
            "choice": f"{config.cache_config.cache_dtype}, blocks of "
            f"{config.cache_config.block_size}",
            "why": "vLLM's cache_config",
        }
    )
    parts.append(
        {
            "part": "CUDA graphs",
            "choice": config.compilation_config.cudagraph_mode.name,
            "why": "vLLM's compilation_config",
        }
    )
    return parts


def _loader(load_config: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """How the weights would be read: the plugin's decision where its row for that is in force."""
    from vllm_sm12x import changes
    from vllm_sm12x.changes.change import State
    from vllm_sm12x.changes.loading import PREFETCH_ROW

    states = {outcome.change.name: outcome.state for outcome in changes.report()}
    strategy = getattr(load_config, "safetensors_load_strategy", None)
    choice, why = strategy or "as vLLM decides at load time", "vLLM's load_config"
    if states.get(PREFETCH_ROW) is State.ACTIVE:
        from vllm_sm12x.integration import loading

        decided = loading.for_checkpoint(checkpoint.folder, strategy)
        choice, why = decided.strategy, decided.why
    return {
        "part": "loader",
        "choice": f"{load_config.load_format}, safetensors {choice}",
        "why": why,
    }


def _attention(config: Any) -> dict[str, str] | None:
    from vllm_sm12x.changes.change import Context
    from vllm_sm12x.integration import selection

    if not Context.detect().active or not selection.serves(config):
        return None
    choice = selection.choose(config)
    return {
        "part": "attention backend",
        "choice": selection.NAME if choice.ours else "vLLM's own",
        "why": choice.why,
    }


def _fit(
    request: Request,
    checkpoint: Checkpoint,
    facts: dict[str, Any],
    gpu_memory: int,
    unified: bool,
    settings: _Settings,
    config: Any,
    stages: Any,
) -> list[str]:
    """Fill in what fits, and say what does not."""
    held = facts.get("built_bytes_by_stage") or facts["weights_bytes_by_stage"]
    budgets = [
        memory.Budget(
            gpu_memory, unified, settings.utilization, size, memory.overhead(settings.eager)
        )
        for size in held
    ]
    tight = min(budgets, key=lambda budget: budget.for_caches)
    facts["memory"] = {
        "gpu_bytes": gpu_memory,
        "unified": unified,
        "gpu_memory_utilization": settings.utilization,
        "weights_bytes": tight.weights,
        "overhead_bytes": tight.overhead,
        "kv_cache_bytes": max(tight.for_caches, 0),
    }
    findings = []
    if not tight.leaves_the_system_enough:
        findings.append(
            f"--gpu-memory-utilization {settings.utilization:g} of the machine's "
            f"{_gib(gpu_memory)} leaves the system less than {_gib(memory.SYSTEM)}; allowed here "
            f"is up to {(gpu_memory - memory.SYSTEM) / gpu_memory:.2f}."
        )
    if tight.for_caches <= 0:
        where = "" if len(budgets) == 1 else " on the fullest pipeline stage"
        findings.append(
            f"The model does not fit: a GPU has {_gib(gpu_memory)}, of which vLLM takes "
            f"{settings.utilization:.0%}, and weights need {_gib(tight.weights)} and the rest "
            f"some {_gib(tight.overhead)}{where}; more GPUs are needed."
        )
        return findings
    limit = request.max_model_len or checkpoint.config["max_position_embeddings"]
    if stages is not None:
        longest, concurrency = _by_vllm(config, stages, budgets, facts)
    else:
        longest, concurrency = _by_format(checkpoint, tight)
    fits = longest(checkpoint.config["max_position_embeddings"])
    facts["memory"]["longest_context"] = fits
    if fits < (request.max_model_len or 1):
        findings.append(
            f"--max-model-len {request.max_model_len or 1} does not fit: {_gib(tight.for_caches)} "
            f"for KV caches hold one request of {fits} tokens."
        )
        return findings
    length = min(limit, fits)
    if request.max_model_len is None and length > _LENGTH_STEP:
        length -= length % _LENGTH_STEP
    facts["memory"]["max_model_len"] = length
    facts["memory"]["concurrency"] = round(concurrency(length), 2)
    facts["memory"]["kv_cache_tokens"] = int(concurrency(length) * length)
    facts["serve"] = serve_line(
        request.model,
        tensor_parallel_size=request.tensor_parallel_size,
        pipeline_parallel_size=request.pipeline_parallel_size,
        max_model_len=length,
        gpu_memory_utilization=settings.utilization,
        machines=settings.machines,
    )
    return findings


_Fitting = tuple[Callable[[int], int], Callable[[int], float]]


def _by_vllm(config: Any, stages: Any, budgets: list[memory.Budget], facts: Any) -> _Fitting:
    """vLLM's own planning of the caches' blocks."""
    from vllm_sm12x.vllm_api.kv_cache import Pool

    pool = Pool(
        config,
        [stage.specs for stage in stages],
        [stage.layouts for stage in stages],
        [budget.for_caches for budget in budgets],
    )
    facts["memory"]["blocks"] = pool.blocks
    return pool.longest, pool.concurrency


def _by_format(checkpoint: Checkpoint, budget: memory.Budget) -> _Fitting:
    """The caches alone; vLLM's pool rounds up, so this is the most that can be."""
    per_token = kv_cache.bytes_per_token(checkpoint.config)

    def longest(limit: int) -> int:
        return min(limit, int(budget.for_caches / per_token))

    return longest, lambda tokens: budget.for_caches / (per_token * tokens)


def _gib(size: float) -> str:
    return f"{size / memory.GIB:.1f} GiB"


__all__ = ["RECIPES", "CheckpointError", "Refused", "Request", "examine"]

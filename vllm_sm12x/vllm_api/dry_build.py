# SPDX-License-Identifier: Apache-2.0
"""vLLM's config and model as serving would make them, without weights, memory or a GPU context.

The model is built on torch's meta device: shapes, kernel choices and cache specs are vLLM's own.
"""

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backends import utils as attention_backends


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one rank of a pipeline stage holds. Sizes in bytes."""

    parameters: int
    buffers: int
    kernels: dict[tuple[str, str], int]  # ("experts" or "linear layers", kernel): layers with it
    attention: tuple[str, ...]  # the classes of the attention layers with a cache
    specs: dict[str, Any]  # vLLM's KVCacheSpec of each layer that has a cache
    layouts: list[str]  # of caches, that its backends support; empty where vLLM has one only

    @property
    def page_bytes(self) -> dict[str, int]:
        """Bytes of one page of each cache, by layer name."""
        return {name: spec.page_size_bytes for name, spec in self.specs.items()}


def engine_config(model: str, **arguments: Any) -> Any:
    """The VllmConfig of `vllm serve MODEL`. Raises ValueError with vLLM's refusal in one line."""
    try:
        # The server's defaults: with others a step has fewer tokens, and a request smaller caches.
        server = UsageContext.OPENAI_API_SERVER
        return EngineArgs(model=model, **arguments).create_engine_config(server)
    except Exception as error:
        raise ValueError(_in_one_line(error)) from error


def gpus_here() -> int:
    """How many GPUs vLLM sees on this machine; CUDA stays untouched."""
    return current_platform.device_count()


def build(vllm_config: Any, tensor_parallel_size: int, pipeline_parallel_size: int) -> list[Stage]:
    """Build rank 0 of each pipeline stage, one after the other, and say what it holds."""
    layers = vllm_config.compilation_config.static_forward_context
    stages = []
    with ExitStack() as undo:
        undo.enter_context(_no_device(vllm_config))
        undo.enter_context(_one_process(vllm_config))
        for rank in range(pipeline_parallel_size):
            _pretend(tensor_parallel_size, pipeline_parallel_size, rank)
            with (
                set_default_torch_dtype(vllm_config.model_config.dtype),
                torch.device("meta"),
            ):
                model = initialize_model(vllm_config=vllm_config)
            stages.append(_describe(model, layers, vllm_config))
            layers.clear()
            vllm_config.compilation_config.static_all_moe_layers.clear()
    return stages


def _describe(model: Any, layers: dict[str, Any], vllm_config: Any) -> Stage:
    caches = [(name, one) for name, one in layers.items() if isinstance(one, AttentionLayerBase)]
    specs = {name: layer.get_kv_cache_spec(vllm_config) for name, layer in caches}
    kernels = Counter(
        kernel
        for module in model.modules()
        if (kernel := _kernel_of(getattr(module, "quant_method", None))) is not None
    )
    return Stage(
        parameters=_bytes(model.parameters()),
        buffers=_bytes(model.buffers()),
        kernels=dict(kernels),
        attention=tuple(sorted({type(layer).__name__ for _, layer in caches})),
        specs={name: spec for name, spec in specs.items() if spec is not None},
        layouts=_layouts([layer for _, layer in caches]),
    )


def _layouts(layers: list[Any]) -> list[str]:
    """The names of the cache layouts that all layers' backends support, as a worker says them."""
    # until: vllm>=0.29, whose backends always declare layouts.
    if not hasattr(attention_backends, "get_supported_kv_cache_layouts"):
        return []
    backends = dict.fromkeys(layer.get_attn_backend() for layer in layers)
    return [one.name for one in attention_backends.get_supported_kv_cache_layouts(backends)]


def _kernel_of(method: Any) -> tuple[str, str] | None:
    """The kernel that a layer's quantisation method chose when the layer was built."""
    experts = getattr(method, "experts_cls", None)
    if experts is not None:
        return "experts", experts.__name__
    kernel = getattr(method, "fp8_linear", None) or getattr(method, "kernel", None)
    return None if kernel is None else ("linear layers", type(kernel).__name__)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum({id(one): one.numel() * one.element_size() for one in tensors}.values())


class _Nothing:
    """Stands for a stream or an event, which a model makes and a dry build never uses."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        pass


@contextmanager
def _no_device(vllm_config: Any) -> Iterator[None]:
    """vLLM makes its tensors on the meta device, and neither streams nor events."""
    with ExitStack() as undo:
        _put(undo, type(current_platform), "device_type", "meta")
        for name in ("Stream", "Event"):
            _put(undo, torch.cuda, name, _Nothing)
        # until: vllm>=0.27, whose layers always register kernels to compile before serving.
        if hasattr(vllm_config.kernel_config, "enable_jit_warmup"):
            _put(undo, vllm_config.kernel_config, "enable_jit_warmup", False)
        undo.enter_context(set_current_vllm_config(vllm_config))
        yield


@contextmanager
def _one_process(vllm_config: Any) -> Iterator[None]:
    """vLLM's process groups with this process alone in them."""
    with ExitStack() as undo:
        # With several nodes vLLM would wait here for the others.
        for name, value in (("nnodes", 1), ("node_rank", 0)):
            _put(undo, vllm_config.parallel_config, name, value)
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory()))
        undo.callback(parallel_state.destroy_distributed_environment)
        parallel_state.init_distributed_environment(
            1, 0, f"file://{folder / 'rendezvous'}", 0, backend="gloo"
        )
        undo.callback(parallel_state.destroy_model_parallel)
        parallel_state.initialize_model_parallel(1, 1)
        yield


def _pretend(tensor_ranks: int, stages: int, stage: int) -> None:
    """Layers that ask the groups hear the sizes asked for, and that this is rank 0 of `stage`."""
    tensor = parallel_state.get_tp_group()
    tensor.world_size, tensor.rank_in_group = tensor_ranks, 0
    pipeline = parallel_state.get_pp_group()
    pipeline.world_size, pipeline.rank_in_group = stages, stage
    pipeline.ranks, pipeline.rank = list(range(stages)), stage


def _put(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    inherited = isinstance(owner, type) and name not in vars(owner)
    original = getattr(owner, name)
    setattr(owner, name, value)
    if inherited:
        undo.callback(delattr, owner, name)
    else:
        undo.callback(setattr, owner, name, original)


def _in_one_line(error: Exception) -> str:
    """What an exception says; of pydantic's, the first finding alone."""
    errors = getattr(error, "errors", None)
    text = errors()[0]["msg"].removeprefix("Value error, ") if callable(errors) else str(error)
    return " ".join(text.split()) or type(error).__name__

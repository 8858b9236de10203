# SPDX-License-Identifier: Apache-2.0
"""Changes to how weights are read, how long Ray waits, and where Triton's scratch comes from."""

import functools
from contextlib import ExitStack

from vllm_sm12x import knobs
from vllm_sm12x.changes.change import Change, Context, Kind, Phase, Verdict, wrap, wrapped_by
from vllm_sm12x.changes.host import on_sm12x_path
from vllm_sm12x.device import Device
from vllm_sm12x.vllm_api import ray

PREFETCH_ROW = "loading.prefetch"
RAY_TIMEOUT_SECONDS = "900"


def _read_ahead(context: Context, undo: ExitStack) -> None:
    from vllm_sm12x.integration import loading as ours
    from vllm_sm12x.vllm_api import loading as stock

    shared = isinstance(context.device, Device) and context.device.total_memory is None
    around = functools.partial(ours.weights, memory_is_shared=shared)
    wrap(undo, stock.loader_module, stock.WEIGHTS_ITERATOR, PREFETCH_ROW, around)


def _loader_asks_us(context: Context) -> Verdict:
    from vllm_sm12x.vllm_api import loading as stock

    loader = stock.loader_module.DefaultModelLoader
    asked = loader._get_weights_iterator.__globals__[stock.WEIGHTS_ITERATOR]
    by = wrapped_by(asked)
    return Verdict(by == PREFETCH_ROW, f"DefaultModelLoader calls {asked.__name__} of {by}")


def _user_left_the_timeout(context: Context) -> Verdict:
    theirs = knobs.set_by_others(ray.GET_TIMEOUT, RAY_TIMEOUT_SECONDS)
    return Verdict(theirs is None, f"{ray.GET_TIMEOUT}={theirs} is set")


def _ray_compiles_graphs(context: Context) -> Verdict:
    on_path = on_sm12x_path(context)
    if not on_path.yes:
        return on_path
    return Verdict(ray.waits_for_compiled_graph(), "vLLM's Ray executor compiles no graph")


def _raise_the_timeout(context: Context, undo: ExitStack) -> None:
    knobs.set_default(ray.GET_TIMEOUT, RAY_TIMEOUT_SECONDS, undo)


def _ray_waits(context: Context) -> Verdict:
    found = knobs.variable(ray.GET_TIMEOUT)
    return Verdict(
        found == RAY_TIMEOUT_SECONDS, f"vLLM's default does not replace {ray.GET_TIMEOUT}={found}"
    )


def _threads_have_no_allocator(context: Context) -> Verdict:
    from vllm_sm12x.integration import triton_allocator

    on_path = on_sm12x_path(context)
    if not on_path.yes:
        return on_path
    found = triton_allocator.default_allocator()
    return Verdict(
        isinstance(found, triton_allocator.NullAllocator),
        f"a new thread has Triton's {type(found).__name__}",
    )


def _allocate_by_default(context: Context, undo: ExitStack) -> None:
    from vllm_sm12x.integration import triton_allocator

    triton_allocator.install(undo)


def _threads_have_an_allocator(context: Context) -> Verdict:
    from vllm_sm12x.integration import triton_allocator

    found = triton_allocator.default_allocator()
    return Verdict(
        isinstance(found, triton_allocator.TorchAllocator),
        f"a new thread has {type(found).__name__}",
    )


ROWS = (
    Change(
        name=PREFETCH_ROW,
        kind=Kind.WRAP,
        phase=Phase.WORKER,
        what="A checkpoint of more than 90% of the available RAM on a local file system is read "
        "ahead of the loader, in its order and in a bounded window, unless you give "
        "`--safetensors-load-strategy`.",
        why="vLLM only says that it does not prefetch, and pages tensors in one by one: workers "
        "stall for an hour. Its own prefetch evicts what it has read before the loader comes.",
        upstream="https://github.com/vllm-project/vllm/pull/52462",
        touches=(
            "vllm.model_executor.model_loader.default_loader.safetensors_weights_iterator",
            "vllm.model_executor.model_loader.default_loader.DefaultModelLoader."
            "_get_weights_iterator",
        ),
        requires=("worker",),
        optional=True,
        wanted=on_sm12x_path,
        apply=_read_ahead,
        check=_loader_asks_us,
        retire="vLLM reads a checkpoint larger than RAM ahead of its loader by itself",
    ),
    Change(
        name="ray.timeout",
        kind=Kind.REGISTER,
        phase=Phase.REGISTER,
        what=f"`{ray.GET_TIMEOUT}` is {RAY_TIMEOUT_SECONDS} seconds where you do not set it and "
        "vLLM's Ray executor compiles graphs.",
        why="Under load a slow node answers after vLLM's 300 seconds, and the engine ends: "
        "`increase RAY_CGRAPH_get_timeout`.",
        upstream="https://github.com/vllm-project/vllm/pull/40899 (reported there)",
        touches=("vllm.envs.VLLM_RAY_PER_WORKER_GPUS",),
        wanted=_user_left_the_timeout,
        needed=_ray_compiles_graphs,
        apply=_raise_the_timeout,
        check=_ray_waits,
        retire="no supported vLLM has the Ray executor with a compiled graph",
    ),
    Change(
        name="triton.allocator",
        kind=Kind.SUBCLASS,
        phase=Phase.WORKER,
        what="Triton kernels get scratch memory from torch's caching allocator in every thread "
        "that has set no allocator.",
        why="`Kernel requires a runtime memory allocation, but no allocator was set`: Triton's "
        "setting holds for the thread that makes it.",
        upstream="https://github.com/triton-lang/triton/pull/10002 (closed)",
        touches=("vllm.triton_utils.allocation.set_triton_allocator",),
        requires=("worker",),
        optional=True,
        needed=_threads_have_no_allocator,
        apply=_allocate_by_default,
        check=_threads_have_an_allocator,
        retire="Triton allocates scratch memory where nobody has set an allocator",
    ),
)

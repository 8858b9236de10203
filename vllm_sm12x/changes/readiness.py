# SPDX-License-Identifier: Apache-2.0
"""Changes after which a worker that reports ready is ready."""

from contextlib import ExitStack

from vllm_sm12x import knobs
from vllm_sm12x.changes.change import Change, Context, Kind, Phase, Verdict, wrap, wrapped_by
from vllm_sm12x.changes.host import on_sm12x_path

GRAPHS_ROW = "cuda_graphs"
WARM_UP_ROW = "warm_up"
CAPTURE_ROW = "graph_warm_up"
WATCH_ROW = "compile_watch"
REQUEST_ROW = "first_request"


def _is_our_platform() -> bool:
    """Whether vLLM asks our platform to check its config."""
    from vllm_sm12x.integration.platform import Sm12xPlatform
    from vllm_sm12x.vllm_api.platform import current_platform_class

    asked = current_platform_class().check_and_update_config
    return bool(asked == Sm12xPlatform.check_and_update_config)


def _graphs_allowed(context: Context) -> Verdict:
    from vllm_sm12x.integration import cuda_graphs

    if not knobs.get(cuda_graphs.ALLOW):
        return Verdict(False, f"{cuda_graphs.ALLOW}=0")
    return on_sm12x_path(context)


def _settle_graphs(context: Context, undo: ExitStack) -> None:
    from vllm_sm12x.integration import cuda_graphs, startup

    startup.config_complete.append(cuda_graphs.settle)
    undo.callback(startup.config_complete.remove, cuda_graphs.settle)


def _platform_settles_graphs(context: Context) -> Verdict:
    from vllm_sm12x.integration import cuda_graphs, startup

    mode = cuda_graphs.rule_of_mode(context.capability)
    said = f"FULL_DECODE_ONLY, {mode}" if mode else "vLLM's mode"
    return Verdict(
        _is_our_platform() and cuda_graphs.settle in startup.config_complete,
        f"with k draft tokens: {said}; 1 + k tokens times each number of requests up to "
        f"{cuda_graphs.ALL_COUNTS}, fewer of them if --max-num-seqs is larger",
    )


def _warm_up_wanted(context: Context) -> Verdict:
    if knobs.get("VLLM_SM12X_WARMUP") is False:
        return Verdict(False, "VLLM_SM12X_WARMUP=0")
    return on_sm12x_path(context)


def _warm_up_before_capture(context: Context, undo: ExitStack) -> None:
    from vllm_sm12x.integration import startup, warm_up

    startup.before_capture.append(warm_up.warm_up)
    undo.callback(startup.before_capture.remove, warm_up.warm_up)


def _the_worker_warms_up(context: Context) -> Verdict:
    from vllm_sm12x.integration import startup, warm_up
    from vllm_sm12x.integration.worker import Sm12xWorker
    from vllm_sm12x.vllm_api.worker import Worker

    return Verdict(
        warm_up.warm_up in startup.before_capture
        and Sm12xWorker.compile_or_warm_up_model is not Worker.compile_or_warm_up_model
        and issubclass(Sm12xWorker, Worker),
        "before Worker.compile_or_warm_up_model captures graphs and starts vLLM's JIT monitor",
    )


def _warms_up_in_another_way(context: Context) -> Verdict:
    from vllm_sm12x.vllm_api import graph_capture as stock

    on_path = on_sm12x_path(context)
    if on_path.yes and stock.warms_up_as_it_captures():
        return Verdict(False, "this vLLM warms FULL graphs up with a capture's metadata")
    return on_path


def _wrap_warm_up_and_capture(context: Context, undo: ExitStack) -> None:
    from vllm_sm12x.integration import graph_capture as ours
    from vllm_sm12x.vllm_api import graph_capture as stock

    wrap(
        undo,
        stock.GPUModelRunner,
        stock.WARMUP_AND_CAPTURE,
        CAPTURE_ROW,
        ours.warm_up_as_captured,
    )


def _warm_up_is_as_captured(context: Context) -> Verdict:
    from vllm_sm12x.vllm_api import graph_capture as stock

    by = wrapped_by(getattr(stock.GPUModelRunner, stock.WARMUP_AND_CAPTURE))
    return Verdict(
        stock.warms_up_as_it_captures() and by == CAPTURE_ROW,
        "GPUModelRunner's warm-up of a FULL graph asks for a capture's metadata",
    )


def _arm_when_ready(context: Context, undo: ExitStack) -> None:
    from vllm_sm12x.integration import startup
    from vllm_sm12x.integration.compile_watch import watch

    startup.ready.append(watch.arm)
    undo.callback(watch.disarm)
    undo.callback(startup.ready.remove, watch.arm)


def _the_worker_arms_it(context: Context) -> Verdict:
    from vllm_sm12x.integration import compile_watch, startup
    from vllm_sm12x.integration.worker import Sm12xWorker
    from vllm_sm12x.vllm_api.worker import Worker

    last_step = Sm12xWorker.compile_or_warm_up_model
    armed = compile_watch.watch.arm in startup.ready
    evidence = "armed as Worker.compile_or_warm_up_model returns"
    recorded = compile_watch.recorded()
    return Verdict(
        armed and last_step is not Worker.compile_or_warm_up_model,
        f"{evidence}; {recorded}" if recorded else evidence,
    )


def _load_logits_processors(context: Context, undo: ExitStack) -> None:
    from vllm_sm12x.integration import startup
    from vllm_sm12x.vllm_api import logits_processors

    startup.config_complete.append(logits_processors.load)
    undo.callback(startup.config_complete.remove, logits_processors.load)


def _the_platform_loads_them(context: Context) -> Verdict:
    from vllm_sm12x.integration import startup
    from vllm_sm12x.vllm_api import logits_processors

    return Verdict(
        _is_our_platform() and logits_processors.load in startup.config_complete,
        "logits processors are loaded as the config is checked",
    )


ROWS = (
    Change(
        name=GRAPHS_ROW,
        kind=Kind.SUBCLASS,
        phase=Phase.REGISTER,
        what="Under speculative decoding each number of requests up to 64 has a CUDA graph of "
        "its size, and on SM 12.1 the mode is FULL_DECODE_ONLY, where `--compilation-config` "
        "leaves them open.",
        why="4 requests with 2 draft tokens run as 6, batches beyond 512 tokens without a graph, "
        "and a GB10 hangs after some 10 requests.",
        upstream="https://github.com/vllm-project/vllm/issues/40969",
        touches=("vllm.config.compilation.CompilationConfig.max_cudagraph_capture_size",),
        requires=("platform",),
        wanted=_graphs_allowed,
        apply=_settle_graphs,
        check=_platform_settles_graphs,
        retire="vLLM captures decode batches by their number of requests, and #40969 is closed",
    ),
    Change(
        name=WARM_UP_ROW,
        kind=Kind.SUBCLASS,
        phase=Phase.WORKER,
        what="Before it captures CUDA graphs, a worker runs made-up requests of all sizes and "
        "kinds at which another kernel variant is launched (`VLLM_SM12X_WARMUP`).",
        why="The first request after ready waits 2 to 6 s while kernels compile (55 s in stock "
        "0.23.0), and so do later ones of other sizes.",
        upstream="ours: newer releases warm more of their own kernels up, and not ours",
        touches=(
            "vllm.v1.worker.gpu_worker.Worker.execute_model",
            "vllm.v1.worker.gpu_worker.Worker.sample_tokens",
        ),
        requires=("worker",),
        wanted=_warm_up_wanted,
        apply=_warm_up_before_capture,
        check=_the_worker_warms_up,
        retire="vLLM runs batches of all sizes before it reports ready",
    ),
    Change(
        name=CAPTURE_ROW,
        kind=Kind.WRAP,
        phase=Phase.WORKER,
        what="The V1 model runner warms a FULL graph up with the attention metadata of its "
        "capture.",
        why="With MTP on GDN models: `Triton Error [CUDA]: operation not permitted when stream is "
        "capturing`.",
        upstream="https://github.com/vllm-project/vllm/pull/39483",
        touches=("vllm.v1.worker.gpu_model_runner.GPUModelRunner._warmup_and_capture",),
        requires=("worker",),
        needed=_warms_up_in_another_way,
        apply=_wrap_warm_up_and_capture,
        check=_warm_up_is_as_captured,
        retire="vLLM's FULL-graph warm-up passes is_graph_capturing, as #39483 does",
    ),
    Change(
        name=WATCH_ROW,
        kind=Kind.SUBCLASS,
        phase=Phase.WORKER,
        what="What a worker compiles or autotunes after it is ready is counted, logged with its "
        "specialisation once per kernel, and written to `VLLM_SM12X_COMPILE_LOG`.",
        why="A request waits for seconds, and the log names the kernel at best, not what was new.",
        upstream="ours: vLLM's own monitor (`--jit-monitor-mode`) warns once a kernel, and counts "
        "nothing",
        touches=("vllm.v1.worker.gpu_worker.Worker.compile_or_warm_up_model",),
        requires=("worker",),
        wanted=on_sm12x_path,
        apply=_arm_when_ready,
        check=_the_worker_arms_it,
        retire="vLLM exports a count of compiles by kernel and specialisation",
    ),
    Change(
        name=REQUEST_ROW,
        kind=Kind.SUBCLASS,
        phase=Phase.REGISTER,
        what="A front end looks for logits processors before it is ready.",
        why="The first request waits for entry points: 38 ms with 300 installed distributions.",
        upstream="ours: vLLM's V2 model runner does so from 0.32 on",
        touches=("vllm.v1.sample.logits_processor.cached_load_custom_logitsprocs",),
        requires=("platform",),
        wanted=on_sm12x_path,
        apply=_load_logits_processors,
        check=_the_platform_loads_them,
        retire="vLLM's InputProcessor loads logits processors as it is made, with either runner",
    ),
)

# SPDX-License-Identifier: Apache-2.0
"""Changes after which a worker that reports ready is ready."""

from contextlib import ExitStack

from vllm_sm12x.changes.change import Change, Context, Kind, Phase, Verdict
from vllm_sm12x.changes.host import on_sm12x_path

WATCH_ROW = "compile_watch"


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


ROWS = (
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
)

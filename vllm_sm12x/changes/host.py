# SPDX-License-Identifier: Apache-2.0
"""Changes to the process: vLLM's platform, its worker, its settings and their defaults."""

import importlib.util
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

from vllm_sm12x import knobs
from vllm_sm12x.changes.change import Change, Context, Kind, Phase, Verdict

PLATFORM_PATH = "vllm_sm12x.integration.platform.Sm12xPlatform"
LOGITS_CAP = "VLLM_SPARSE_INDEXER_MAX_LOGITS_MB"
LOGITS_CAP_MB = "256"
SAMPLER = "VLLM_USE_FLASHINFER_SAMPLER"


def _entry_point_did_it(context: Context, undo: ExitStack) -> None:
    """vLLM asked `plugin.platform()` before any plugin could register."""


def _platform_in_force(context: Context) -> Verdict:
    from vllm_sm12x.integration.platform import Sm12xPlatform
    from vllm_sm12x.vllm_api.platform import current_platform_class

    found = current_platform_class()
    if issubclass(found, Sm12xPlatform):
        return Verdict(True, f"current_platform is {found.__name__}")
    if found.__module__.startswith("vllm."):
        remedy = "let vLLM load the plugin sm12x (VLLM_PLUGINS), or install vllm-sm12x again"
    else:
        remedy = "only one platform plugin can be in force: uninstall that one or vllm-sm12x"
    return Verdict(False, f"vLLM runs on {found.__module__}.{found.__qualname__}; {remedy}")


def _call_before_model(context: Context, undo: ExitStack) -> None:
    from vllm_sm12x.changes.attention import settle_before_model
    from vllm_sm12x.integration import startup

    startup.before_model.append(settle_before_model)
    undo.callback(startup.before_model.remove, settle_before_model)


def _worker_is_chosen(context: Context) -> Verdict:
    from vllm_sm12x.integration.platform import WORKER_PATH, Sm12xPlatform
    from vllm_sm12x.vllm_api.platform import current_platform_class

    chooser = current_platform_class().check_and_update_config
    if chooser == Sm12xPlatform.check_and_update_config:
        return Verdict(True, f"worker_cls=auto becomes {WORKER_PATH}")
    return Verdict(False, f"{chooser.__module__}.{chooser.__qualname__} chooses worker_cls")


def _merge_settings(context: Context, undo: ExitStack) -> None:
    from vllm_sm12x.vllm_api.envs import environment_variables

    for name in knobs.merge_into(environment_variables):
        undo.callback(environment_variables.pop, name)
    knobs.forward_to_deep_gemm(undo)


def _settings_are_known(context: Context) -> Verdict:
    from vllm_sm12x.vllm_api.envs import environment_variables

    missing = [knob.name for knob in knobs.KNOBS if knob.name not in environment_variables]
    if missing:
        return Verdict(False, f"vllm.envs does not know {', '.join(missing)}")
    return Verdict(True, f"vllm.envs knows all {len(knobs.KNOBS)}")


def _unless_set(name: str, ours: str) -> Callable[[Context], Verdict]:
    def wanted(context: Context) -> Verdict:
        theirs = knobs.set_by_others(name, ours)
        return Verdict(theirs is None, f"{name}={theirs} is set")

    return wanted


def _default(name: str, ours: str) -> Callable[[Context, ExitStack], None]:
    return lambda context, undo: knobs.set_default(name, ours, undo)


def _vllm_reads(name: str, ours: str) -> Callable[[Context], Verdict]:
    def check(context: Context) -> Verdict:
        from vllm_sm12x.vllm_api.envs import environment_variables

        found = int(environment_variables[name]())
        return Verdict(found == int(ours), f"vllm.envs.{name} is {found}")

    return check


def on_sm12x_path(context: Context) -> Verdict:
    """Whether policy is SM12x's: not on a GPU that VLLM_TRITON_MLA_SPARSE=1 alone brought in."""
    device = context.for_device.reason
    if context.capability is not None and context.capability[0] == 12:
        return Verdict(True, device)
    return Verdict(False, f"only on SM 12.x: {device}")


def _flashinfer_cannot_compile(context: Context) -> Verdict:
    from vllm_sm12x.integration import toolkit

    on_path = on_sm12x_path(context)
    if not on_path.yes:
        return on_path
    if importlib.util.find_spec("flashinfer_jit_cache") is not None:
        return Verdict(False, "flashinfer-jit-cache has FlashInfer's sampler compiled")
    compiler = toolkit.compiler_for_sm12x()
    return Verdict(not compiler.yes, f"{compiler.reason} compiles FlashInfer's sampler")


def _sampler_is_off(context: Context) -> Verdict:
    from vllm_sm12x.integration import toolkit

    evidence = _vllm_reads(SAMPLER, "0")(context)
    return Verdict(
        evidence.yes, f"{evidence.reason}, because {toolkit.compiler_for_sm12x().reason}"
    )


class ServedOp(NamedTuple):
    """Who serves an op on the SM12x path; `provider` is None where nobody can."""

    op: str
    provider: str | None
    why: str


def served_ops() -> tuple[ServedOp, ...]:
    """The provider of each op by the settings of this process. Raises KnobError."""
    from vllm_sm12x.integration import providers

    served = []
    for op in providers.OPS:
        try:
            provider = providers.chosen(op)
        except providers.NoProvider as refusal:
            served.append(ServedOp(op, None, str(refusal)))
            continue
        why = provider.why
        if op == "paged_mqa_logits":
            by_deep_gemm = provider.name == "deep_gemm"
            heard = by_deep_gemm and providers.deep_gemm_reads(knobs.DEEP_GEMM_TILED)
            why += f"; {knobs.TILED} has {'an' if heard else 'no'} effect"
        served.append(ServedOp(op, provider.name, why))
    return tuple(served)


ROWS = (
    Change(
        name="platform",
        kind=Kind.SUBCLASS,
        phase=Phase.REGISTER,
        what="`Sm12xPlatform(CudaPlatform)` is vLLM's platform.",
        why="vLLM's own policy for SM12x picks kernels that need DeepGEMM or FlashMLA.",
        upstream="https://docs.vllm.ai/en/latest/design/plugin_system.html (documented hook)",
        touches=(
            "vllm.platforms.cuda.CudaPlatform.apply_config_platform_defaults",
            "vllm.platforms.current_platform",
        ),
        apply=_entry_point_did_it,
        check=_platform_in_force,
        retire="no other row needs a platform of ours",
    ),
    Change(
        name="worker",
        kind=Kind.SUBCLASS,
        phase=Phase.REGISTER,
        what="`Sm12xWorker(Worker)` is vLLM's GPU worker, unless you give your own `--worker-cls`.",
        why="What must happen in a worker before the model is built has no hook.",
        upstream="https://docs.vllm.ai/en/latest/design/plugin_system.html (documented hook)",
        touches=("vllm.platforms.cuda.CudaPlatform.check_and_update_config",),
        requires=("platform",),
        apply=_call_before_model,
        check=_worker_is_chosen,
        retire="vLLM calls plugins in a worker before it builds the model",
    ),
    Change(
        name="settings",
        kind=Kind.REGISTER,
        phase=Phase.REGISTER,
        what="The plugin's variables are members of `vllm.envs.environment_variables`.",
        why="vLLM warns about unknown `VLLM_*` variables, and leaves them out of the compile-cache "
        "key.",
        upstream="ours: vLLM has no way for a plugin to declare a variable",
        touches=("vllm.envs.environment_variables",),
        apply=_merge_settings,
        check=_settings_are_known,
        retire="vLLM lets a plugin declare its variables",
    ),
    Change(
        name="indexer.logits_cap",
        kind=Kind.REGISTER,
        phase=Phase.REGISTER,
        what=f"`{LOGITS_CAP}` is {LOGITS_CAP_MB} where you do not set it.",
        why="Long contexts take up to 512 MiB for index scores, on GPUs with little memory or none "
        "of their own.",
        upstream="https://github.com/vllm-project/vllm/issues/55569",
        touches=(f"vllm.envs.{LOGITS_CAP}",),
        wanted=_unless_set(LOGITS_CAP, LOGITS_CAP_MB),
        needed=on_sm12x_path,
        apply=_default(LOGITS_CAP, LOGITS_CAP_MB),
        check=_vllm_reads(LOGITS_CAP, LOGITS_CAP_MB),
        retire="vLLM's own default fits GPUs of 24 GiB and unified memory",
    ),
    Change(
        name="sampler",
        kind=Kind.REGISTER,
        phase=Phase.REGISTER,
        what=f"`{SAMPLER}` is 0 where you do not set it and FlashInfer cannot compile its sampler: "
        "no nvcc from 12.9 on, and no flashinfer-jit-cache.",
        why="The first request with top-p or top-k ends the engine: `Could not find nvcc`, or `No "
        "supported CUDA architectures found for major versions [12]`.",
        upstream="https://github.com/vllm-project/vllm/issues/50705",
        touches=(f"vllm.envs.{SAMPLER}",),
        wanted=_unless_set(SAMPLER, "0"),
        needed=_flashinfer_cannot_compile,
        apply=_default(SAMPLER, "0"),
        check=_sampler_is_off,
        retire="vLLM asks whether FlashInfer can compile before it chooses its sampler",
    ),
)

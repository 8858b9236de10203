# SPDX-License-Identifier: Apache-2.0
"""Changes to the process: vLLM's platform, its worker, its table of settings."""

from contextlib import ExitStack

from vllm_sm12x import knobs
from vllm_sm12x.changes.change import Change, Context, Kind, Phase, Verdict

PLATFORM_PATH = "vllm_sm12x.integration.platform.Sm12xPlatform"


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
)

# SPDX-License-Identifier: Apache-2.0
"""The two entry points that vLLM calls. Both are cheap, re-entrant, and never initialise CUDA."""

import contextlib
import logging
import multiprocessing
from importlib import metadata

from vllm_sm12x import __version__, knobs
from vllm_sm12x.changes import apply_all
from vllm_sm12x.changes.change import Context, Outcome, Phase
from vllm_sm12x.changes.host import PLATFORM_PATH
from vllm_sm12x.device import MINIMUM_CAPABILITY, Device
from vllm_sm12x.log import get_logger, once

logger = get_logger(__name__)


def platform() -> str | None:
    """Entry point `vllm.platform_plugins`: the platform's class path, or None to leave vLLM alone.

    vLLM is half imported when it calls this, and drops whatever it raises; so it raises nothing,
    and what is wrong is said by `register`.
    """
    try:
        if not Context.detect().active or "platform" in knobs.get("VLLM_SM12X_OFF"):
            return None
    except knobs.KnobError:
        return None
    except Exception:
        logger.exception("vllm-sm12x stays off: it cannot tell which GPU this is")
        return None
    conflict = conflicting_platforms()
    if conflict is not None:
        once(logger, logging.ERROR, conflict)
    return PLATFORM_PATH


def conflicting_platforms() -> str | None:
    """Which other platform plugins want this machine too, and what to do; None if there is none."""
    allowed = knobs.vllm_plugins()
    wanting = []
    for point in metadata.entry_points(group="vllm.platform_plugins"):
        if point.name != "sm12x" and (allowed is None or point.name in allowed):
            # What another plugin raises, vLLM reports.
            with contextlib.suppress(Exception):
                if point.load()() is not None:
                    wanting.append(point.name)
    if not wanting:
        return None
    names = ", ".join(wanting)
    return (
        "Nothing is on, because vLLM takes one platform plugin and does not start with sm12x and "
        f"{names}: uninstall {names}, or list in VLLM_PLUGINS the plugins to load, with only one "
        "of them."
    )


def register() -> None:
    """Entry point `vllm.general_plugins`: change vLLM in this process, or leave it alone.

    Raises KnobError for a bad setting, and RuntimeError when the user asked for what this GPU or
    this vLLM cannot do.
    """
    from vllm_sm12x.vllm_api.envs import environment_variables

    knobs.check_environment(known=environment_variables)
    context = Context.detect()
    _refuse_the_impossible(context)
    outcomes = apply_all(Phase.REGISTER, context)
    if context.for_device.yes and not context.for_vllm.yes:
        off = f"vllm-sm12x is off and vLLM as it is: {context.for_vllm.reason}."
        once(logger, logging.WARNING, off)
    elif context.active:
        in_front_end = multiprocessing.parent_process() is None
        once(logger, logging.INFO if in_front_end else logging.DEBUG, _summary(context, outcomes))
        if in_front_end and context.untested:
            once(logger, logging.WARNING, context.untested)


def _refuse_the_impossible(context: Context) -> None:
    if not context.demanded:
        return
    by = "VLLM_TRITON_MLA_SPARSE=1" if context.switch else "VLLM_SM12X_ASSUME"
    if isinstance(context.device, Device) and context.device.capability < MINIMUM_CAPABILITY:
        raise RuntimeError(f"{by} asks for the impossible: {context.for_device.reason}.")
    if not context.for_vllm.yes:
        raise RuntimeError(f"{by} asks for the impossible: {context.for_vllm.reason}.")
    if not context.for_device.yes:
        once(logger, logging.WARNING, f"{by} has no effect: {context.for_device.reason}.")


def _summary(context: Context, outcomes: tuple[Outcome, ...]) -> str:
    counts: dict[str, int] = {}
    for outcome in outcomes:
        counts[outcome.state.value] = counts.get(outcome.state.value, 0) + 1
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    return (
        f"vllm-sm12x {__version__} on vLLM {context.vllm}, {context.for_device.reason}: "
        f"changes {states} (`vllm-sm12x doctor` lists them)."
    )

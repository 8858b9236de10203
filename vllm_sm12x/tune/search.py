# SPDX-License-Identifier: Apache-2.0
"""The best configuration for one M: all roughly, then the best of them against the default."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from vllm_sm12x.integration.fp8_config_files import Config
from vllm_sm12x.tune.records import Measured

FINALISTS = 4
# A candidate that is not this much faster than the default is not worth leaving it.
LEAST_GAIN = 0.02


class Judgement(NamedTuple):
    """How far a result is from fp32 (||difference|| / ||fp32||), and whether that is right."""

    error: float
    right: bool


class Trial(Protocol):
    """One M of one shape on a GPU: `measure.GpuTrial`. Times are microseconds of one call."""

    def fits(self, config: Config) -> bool: ...

    def judge(self, config: Config) -> Judgement: ...

    def rough_time(self, config: Config) -> float: ...

    def final_times(self, configs: Sequence[Config]) -> list[float]: ...


def best_for(
    trial: Trial,
    default: Config,
    candidates: Sequence[Config],
    regrouped: Callable[[Config], Sequence[Config]],
    did_not_fit: int = 0,
    *,
    time_is_up: Callable[[], bool] = lambda: False,
    advance: Callable[[], None] = lambda: None,
) -> Measured | None:
    """What is fastest of what is right; the default where nothing is.

    Args:
        trial: the GPU.
        default: what a launch takes without a file. It is judged like any other.
        candidates: what to try.
        regrouped: other orders of the tiles of a finalist.
        did_not_fit: how many candidates were left out already.
        time_is_up: asked before each candidate; the best so far is then all there is.
        advance: called after each candidate.

    Returns:
        None if time was up before anything was tried.
    """
    rough: list[tuple[float, int, Config]] = []
    tried = wrong = 0
    complete = True

    def attempt(config: Config) -> None:
        nonlocal tried, wrong, did_not_fit
        tried += 1
        if not trial.fits(config):
            did_not_fit += 1
        elif not trial.judge(config).right:
            wrong += 1
        else:
            rough.append((trial.rough_time(config), len(rough), config))

    for config in candidates:
        if time_is_up():
            complete = False
            break
        attempt(config)
        advance()
    if not tried:
        return None
    for _, _, config in sorted(rough)[:FINALISTS] if complete else ():
        for other in regrouped(config):
            attempt(other)
    error, default_is_right = trial.judge(default)
    finalists = [config for _, _, config in sorted(rough)[:FINALISTS]]
    default_us, *times = trial.final_times([default, *finalists])
    config, tuned_us = default, default_us
    if times:
        fastest = min(times)
        if not default_is_right or fastest < default_us * (1 - LEAST_GAIN):
            config, tuned_us = finalists[times.index(fastest)], fastest
    return Measured(
        config=config,
        tuned_us=tuned_us,
        default_us=default_us,
        default_error=error if math.isfinite(error) else None,
        default_is_right=default_is_right,
        tried=tried,
        did_not_fit=did_not_fit,
        wrong=wrong,
        complete=complete,
    )

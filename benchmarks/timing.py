# SPDX-License-Identifier: Apache-2.0
"""Interleaved CUDA-graph timing: every variant in one process, medians with spread."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Median microseconds of one call, and the distance between the quartiles."""

    median_us: float
    iqr_us: float


def interleaved(
    variants: dict[str, list[Callable[[], object]]], *, calls: int = 20, rounds: int = 30
) -> dict[str, Timing]:
    """Time variants against each other by CUDA-graph replay.

    Args:
        variants: name -> the same call over several input sets, used in rotation, so that no input
            is served from L2 because the call before left it there.
        calls: calls captured in one graph.
        rounds: replays of each graph; the variants take turns.
    """
    graphs = {}
    for name, functions in variants.items():
        for function in functions:
            function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(calls):
                functions[i % len(functions)]()
        graph.replay()
        graphs[name] = graph
    torch.cuda.synchronize()

    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples[name].append(start.elapsed_time(end) * 1e3 / calls)
    result = {}
    for name, times in samples.items():
        low, median, high = statistics.quantiles(times, n=4)
        result[name] = Timing(median, high - low)
    return result

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


def measured_rates() -> dict[str, float]:
    """What this GPU reaches: `copy` in bytes a second, `bf16` and `fp8` in FLOP a second."""
    return {"copy": copy_bandwidth(), "bf16": _matmul_rate(), "fp8": _fp8_matmul_rate()}


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of an elementwise kernel over 1 GiB.

    Not of `copy_`: in a graph that is a memcpy node, which on an H200 ran at 2.8 TB/s only.
    """
    source = torch.ones(1 << 28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    timing = interleaved({"copy": [lambda: torch.neg(source, out=target)]}, calls=4, rounds=10)
    return 2 * source.nbytes / timing["copy"].median_us * 1e6


def _matmul_rate(size: int = 8192) -> float:
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    timing = interleaved({"matmul": [lambda: torch.mm(a, b, out=out)]}, calls=4, rounds=10)
    return 2 * size**3 / timing["matmul"].median_us * 1e6


def _fp8_matmul_rate(size: int = 8192) -> float:
    """With one scale for each matrix, which no op of ours has: an upper bound."""
    a, b = (torch.randn(size, size, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")

    def multiply() -> torch.Tensor:
        return torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16)

    timing = interleaved({"matmul": [multiply]}, calls=4, rounds=10)
    return 2 * size**3 / timing["matmul"].median_us * 1e6

# SPDX-License-Identifier: Apache-2.0
"""Launches vLLM's block-scaled FP8 GEMM with given configurations: right or wrong, and how fast."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vllm_sm12x import device
from vllm_sm12x.integration.fp8_config_files import Config
from vllm_sm12x.log import get_logger
from vllm_sm12x.tune.search import Judgement
from vllm_sm12x.vllm_api import fp8_configs as stock

logger = get_logger(__name__)

# ||out - oracle|| / ||oracle||. Rounding fp32 to bf16 alone gives 1.7e-3.
TOLERANCE = 4e-3
# The largest |out - oracle| over the root mean square of the oracle: one tile of a large result
# that is wrong hardly shows in the norm. Rounding gives 1.6e-2 for values up to 8 times that.
WORST_TOLERANCE = 5e-2

# Weights that one round of calls goes through, as a multiple of L2, so that none is found there.
BEYOND_L2 = 2.5
MOST_COPIES = 64
CALLS = 16  # of one graph, at least
ROUGH_ROUNDS = 5
FINAL_ROUNDS = 25


def shared_memory() -> int:
    """Bytes of shared memory that one program may have; SM12x's where that is assumed."""
    properties: Any = torch.cuda.get_device_properties(0)
    own = properties.shared_memory_per_block_optin
    capability = device.effective_capability(device.first_visible_device())
    if capability is not None and capability[0] == 12:
        return min(own, device.SM12X_SHARED_MEMORY_BYTES)
    return own


class Linear:
    """Random weights e4m3 [n, k] with a scale for each block, in copies that exceed L2 together."""

    def __init__(self, n: int, k: int, block: tuple[int, int], seed: int = 0) -> None:
        self.n, self.k, self.block = n, k, block
        self._random = torch.Generator("cuda").manual_seed(seed)
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        copies = min(MOST_COPIES, max(2, 1 + int(BEYOND_L2 * l2 / (n * k))))
        weight = self._fp8(n, k)
        # Scales that differ by block: one that is taken for another shows.
        self.scales = self._scale(-(-n // block[0]), -(-k // block[1]))
        self.weights = [weight] + [weight.clone() for _ in range(copies - 1)]
        self.fp32 = _scaled(weight, self.scales, block)

    def _fp8(self, rows: int, columns: int) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=self._random, device="cuda") * 64
        return values.clamp(-448, 448).to(torch.float8_e4m3fn)

    def _scale(self, rows: int, columns: int) -> torch.Tensor:
        draws = torch.rand(rows, columns, generator=self._random, device="cuda")
        return (draws + 0.5) / 64

    def rows(self, m: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random x e4m3 [m, k], and its scales fp32 [m, k / block_k]."""
        return self._fp8(m, self.k), self._scale(m, -(-self.k // self.block[1]))


class GpuTrial:
    """Rows x e4m3 [m, k] for one Linear, and their product in fp32 from the formula."""

    def __init__(self, linear: Linear, m: int, limit: int) -> None:
        """`limit` is the shared memory in bytes that a program may have."""
        self._linear, self._m, self._limit = linear, m, limit
        self._x, self._scales = linear.rows(m)
        x = _scaled(self._x, self._scales, (1, linear.block[1]))
        self._oracle = x @ linear.fp32.T

    def run(self, config: Config, copy: int = 0) -> torch.Tensor:
        """bf16 [m, n] by vLLM's own function and kernel."""
        return self._call(stock.kernel_of_vllm(), config, copy)

    def fits(self, config: Config) -> bool:
        """Whether it compiles, and its shared memory is there."""
        compiler = _Compiler(stock.kernel_of_vllm())
        try:
            self._call(compiler, config, 0)
        except Exception as error:  # of Triton's, LLVM's or ptxas' own kinds
            logger.debug("%s does not compile: %s", config, error)
            return False
        return compiler.compiled.metadata.shared <= self._limit

    def judge(self, config: Config) -> Judgement:
        """Against fp32. What the result's memory held before is NaN: what is not written shows."""
        poison = torch.full_like(self._oracle, float("nan"), dtype=torch.bfloat16)
        del poison
        return judgement(self.run(config), self._oracle)

    def rough_time(self, config: Config) -> float:
        return self._times([config], ROUGH_ROUNDS)[0]

    def final_times(self, configs: Sequence[Config]) -> list[float]:
        return self._times(configs, FINAL_ROUNDS)

    def _times(self, configs: Sequence[Config], rounds: int) -> list[float]:
        """Medians, by replay of one graph for each configuration, in turns."""
        graphs = [self._graph(config) for config in configs]
        samples: list[list[float]] = [[] for _ in configs]
        for _ in range(rounds):
            for (graph, calls), taken in zip(graphs, samples, strict=True):
                taken.append(_milliseconds(graph.replay) * 1e3 / calls)
        return [statistics.median(taken) for taken in samples]

    def _graph(self, config: Config) -> tuple[torch.cuda.CUDAGraph, int]:
        copies = len(self._linear.weights)
        calls = copies * -(-CALLS // copies)
        self.run(config)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in range(calls):
                self.run(config, call % copies)
        graph.replay()
        torch.cuda.synchronize()
        return graph, calls

    def _call(self, kernel: Any, config: Config, copy: int) -> torch.Tensor:
        linear = self._linear
        return stock.gemm(kernel, lambda *shape: {self._m: config})(
            self._x,
            linear.weights[copy],
            self._scales,
            linear.scales,
            list(linear.block),
            torch.bfloat16,
        )


def judgement(out: torch.Tensor, oracle: torch.Tensor) -> Judgement:
    """Of a result [m, n] by its fp32 value. A NaN is never right."""
    difference = out.float() - oracle
    norm = oracle.norm()
    error = (difference.norm() / norm).item()
    worst = (difference.abs().max() / norm * oracle.numel() ** 0.5).item()
    return Judgement(error, error <= TOLERANCE and worst <= WORST_TOLERANCE)


class _Compiler:
    """Stands for a Triton kernel, and compiles it instead of launching it."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def compile_only(*arguments: Any, **config: int) -> None:
            self.compiled = self._kernel.warmup(*arguments, grid=grid, **config)

        return compile_only


def _milliseconds(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _scaled(values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """fp32 values [rows, columns] times the scale of each block."""
    rows, columns = values.shape
    by_row = scales.repeat_interleave(block[0], 0)[:rows]
    return values.float() * by_row.repeat_interleave(block[1], 1)[:, :columns]

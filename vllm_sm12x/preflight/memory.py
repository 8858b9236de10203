# SPDX-License-Identifier: Apache-2.0
"""What of a GPU's memory is left for KV caches. All sizes in bytes; the overhead is an estimate."""

import os
from dataclasses import dataclass

GIB = 2**30
# benchmarks/results/README.md, 1,048,576 tokens: the profile run's peak beyond weights and caches.
PROFILE = 2_604 * 2**20
# An assumption: CUDA context, cuBLAS and NCCL on each rank.
CONTEXT = 1 * GIB
# "Estimated CUDA graph memory: 3.84 GiB total", 2x RTX PRO 6000, vllm-project/vllm#40899.
CUDA_GRAPHS = round(3.84 * GIB)
# What unified memory leaves to the system, which vLLM's share must not take.
SYSTEM = 8 * GIB
# Of vLLM 0.23 and later, where no vLLM can be asked; and the field's figure for two DGX Sparks.
DEFAULT_UTILIZATION = 0.92
UNIFIED_UTILIZATION = 0.80


@dataclass(frozen=True)
class Budget:
    """One rank's memory: all of it, vLLM's share, and what of the share the caches get."""

    total: int
    unified: bool
    utilization: float
    weights: int
    overhead: int

    @property
    def share(self) -> int:
        return int(self.total * self.utilization)

    @property
    def for_caches(self) -> int:
        """Negative where not even the weights fit."""
        return self.share - self.weights - self.overhead

    @property
    def leaves_the_system_enough(self) -> bool:
        return not self.unified or self.total - self.share >= SYSTEM


def overhead(eager: bool) -> int:
    """Beyond weights and caches on each rank: profile run, CUDA context, and CUDA graphs."""
    return PROFILE + CONTEXT + (0 if eager else CUDA_GRAPHS)


def host_memory() -> int:
    """This machine's physical memory, which a GPU without memory of its own shares."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

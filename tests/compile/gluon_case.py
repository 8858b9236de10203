# SPDX-License-Identifier: Apache-2.0
"""Calls of sparse_mla that take one of its Gluon kernels."""

import importlib
from dataclasses import dataclass, replace

from cross_compile import SMS, Case

from vllm_sm12x.ops import sparse_mla
from vllm_sm12x.ops.sparse_mla.config import HOPPER, MMA, LaunchPolicy
from vllm_sm12x.ops.sparse_mla.spec import SparseMlaShape, quantised_output, sparse_mla_inputs

# By import_module: the package's attribute of that name is the function.
sparse_mla_module = importlib.import_module("vllm_sm12x.ops.sparse_mla")

H100_SMS = 132


@dataclass(frozen=True)
class GluonCase(Case):
    """One call of sparse_mla.

    Attributes:
        wgmma: whether the GPU has it.
        split: whether the candidates are split, so that the merge kernel runs too.
        unpack: whether the extra rows are unpacked first; needs a table, and excludes a split.
        quantise: whether the result is, which that of wgmma is not.
    """

    wgmma: bool = False
    split: bool = False
    extra_block: int = 0
    table: bool = False
    sink: bool = True
    lse: bool = False
    unpack: bool = False
    lens: str | None = "full"
    quantise: bool = False

    def __str__(self) -> str:
        extra = f"extra{self.extra_block}" if self.extra_block else "swa"
        names = ("table", "sink", "lse", "lens", "split", "unpack", "quantise")
        flags = [name for name in names if getattr(self, name)]
        return "-".join([f"sm_{self.arch}", extra, *flags])

    @property
    def tile(self) -> str:
        return f"64 {'unpacked' if self.unpack else 'wgmma' if self.wgmma else 'mma'}"

    @property
    def kernels(self) -> list[str]:
        """What the call launches, in order."""
        name = "hopper" if self.wgmma else "mma"
        before = ["unpack_rows_kernel"] * self.unpack
        after = ["sparse_mla_merge_kernel"] * self.split
        return [*before, f"sparse_mla_{name}_kernel", *after]

    def call(self) -> None:
        shape = SparseMlaShape(
            tokens=2,
            swa=128 if self.extra_block else 192,
            extra=512 if self.extra_block else 0,
            extra_block=self.extra_block or 64,
            table=self.table,
            sink=self.sink,
            lens=self.lens,
            rows=128,
            unpack=self.unpack,
        )
        # Which always takes the widest tile; one tile of candidates at a time leaves no split.
        tile = (HOPPER if self.wgmma else MMA).block_n
        policy = LaunchPolicy(batch_invariant=True, topk_chunk=512 if self.split else tile)
        sparse_mla_module.multiprocessors = lambda name, device: H100_SMS if self.wgmma else SMS
        sparse_mla_module.has_mma = lambda device: True
        sparse_mla_module.has_wgmma = lambda device: self.wgmma
        inputs = sparse_mla_inputs(shape, device="cpu")
        if self.quantise:
            inputs |= quantised_output(*inputs["q"].shape[:2], device="cpu")
        sparse_mla(**inputs, policy=policy, return_lse=self.lse)


def layers(swa: GluonCase) -> tuple[GluonCase, ...]:
    """A window only, and with it both kinds of extra candidates, by slots and by positions."""
    c4a, c128a = (replace(swa, extra_block=block) for block in (64, 2))
    return (swa, c4a, replace(c4a, table=True), c128a, replace(c128a, table=True))

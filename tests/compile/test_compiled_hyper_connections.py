# SPDX-License-Identifier: Apache-2.0
"""What hc_pre, hc_post and hc_head compile to on sm_120 and sm_121, in every configuration."""

import importlib
from dataclasses import dataclass
from unittest import mock

import pytest
from cross_compile import SMS, Case, Compiled

from vllm_sm12x.device import SM12X_SHARED_MEMORY_BYTES
from vllm_sm12x.ops import launch
from vllm_sm12x.ops.hc_head.spec import HC_HEAD, HcHeadShape
from vllm_sm12x.ops.hc_post.config import CONFIGS as POST_CONFIGS
from vllm_sm12x.ops.hc_post.spec import HC_POST, HcPostShape
from vllm_sm12x.ops.hc_pre.config import CONFIGS as PRE_CONFIGS
from vllm_sm12x.ops.hc_pre.spec import HC_PRE, HcPreShape
from vllm_sm12x.ops.op_spec import OpSpec

SPECS = {spec.name: spec for spec in (HC_PRE, HC_POST, HC_HEAD)}
# An SM has 65,536: 64 a thread leave room for 1,024 threads, which have a row of each of 4 tokens,
# or 2 of the wider, in flight; 80 for 768.
REGISTERS = {"hc_pre": 64, "hc_head": 64, "hc_post": 80}


@dataclass(frozen=True)
class HyperConnectionCase(Case):
    """One call of an op; `config` is an index into its CONFIGS.

    Attributes:
        norm, same: of hc_pre only.
        row_padding: elements between the rows of every bf16 input.
    """

    op: str
    config: int
    width: int
    norm: bool = True
    same: bool = False
    row_padding: int = 0

    def __str__(self) -> str:
        flags = [name for name in ("norm", "same") if getattr(self, name)]
        flags = flags if self.op == "hc_pre" else []
        return "-".join([f"sm_{self.arch}", self.op, str(self.config), f"d{self.width}", *flags])

    @property
    def tile(self) -> str | None:
        return None if self.row_padding else f"d{self.width}"

    def call(self) -> None:
        module = importlib.import_module(f"vllm_sm12x.ops.{self.op}")
        spec: OpSpec = SPECS[self.op]
        if self.op == "hc_pre":
            shape = HcPreShape(3, width=self.width, splits=5, norm=self.norm, same=self.same)
            config = PRE_CONFIGS[self.config]
        elif self.op == "hc_post":
            shape, config = HcPostShape(3, width=self.width), POST_CONFIGS[self.config]
        else:
            shape, config = HcHeadShape(3, width=self.width), PRE_CONFIGS[self.config]
        inputs = spec.inputs(shape, device="cpu")
        if self.row_padding:
            for name, value in inputs.items():
                if name in ("residual", "x", "hs"):
                    wide = value.new_empty((*value.shape[:-1], self.width + self.row_padding))
                    inputs[name] = wide[..., : self.width]
        with (
            mock.patch.object(launch, "multiprocessors", return_value=SMS),
            mock.patch.object(module, "choose", return_value=config),
        ):
            spec.function(**inputs)


WIDTHS = (4096, 7168)
CASES = [
    HyperConnectionCase(arch, op, config, width, norm, same)
    for arch in (120, 121)
    for width in WIDTHS
    for op, configs, norms in (
        ("hc_pre", PRE_CONFIGS, ((True, False), (True, True), (False, False))),
        ("hc_post", POST_CONFIGS, ((True, False),)),
        ("hc_head", PRE_CONFIGS, ((True, False),)),
    )
    for config in range(len(configs))
    for norm, same in norms
]


def last(launches: list[Compiled], op: str) -> Compiled:
    """The op's own kernel: hc_head launches those of hc_prenorm_gemm before it."""
    assert launches[-1].kernel == f"{op}_kernel"
    assert op == "hc_head" or len(launches) == 1
    return launches[-1]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_hyper_connections_fit_sm12x(case, compiled):
    kernel = last(compiled(case), case.op)
    assert kernel.shared <= SM12X_SHARED_MEMORY_BYTES, f"{kernel.shared} B of shared memory"
    assert (kernel.stack, kernel.local) == (0, 0), "registers are spilled"
    assert kernel.registers <= REGISTERS[case.op]
    assert set(kernel.loads) == {32, 128}, f"rows by 16 bytes, mixes by 4: {kernel.loads}"


@pytest.mark.parametrize("op", SPECS)
def test_the_gate_sees_rows_that_break_wide_loads(op, compiled):
    """2 bytes more a row, and Triton can no longer prove 16-byte alignment."""
    kernel = last(compiled(HyperConnectionCase(120, op, 0, 4096, row_padding=1)), op)
    assert 16 in kernel.loads, f"loads by bits: {kernel.loads}"

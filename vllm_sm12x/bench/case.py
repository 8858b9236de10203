# SPDX-License-Identifier: Apache-2.0
"""One row of a race: the same call of ours and of its peers, over inputs that push out each other.

Rows come from the bench shapes of `ops/specs.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from vllm_sm12x.ops.op_spec import OpSpec
from vllm_sm12x.vllm_api.peers import Peers

Call = Callable[[], Any]
# Builds a peer's calls, one for each set of inputs; a NotHereError says why it cannot.
Build = Callable[[], list[Call]]


class NotHereError(RuntimeError):
    """A peer cannot be run on this machine, in words."""


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        op, shape: names for a table.
        series, at: the line of a plot that the row belongs to, and its place on the x axis.
        ours: the same call over several input sets.
        peers: by name.
        error: of our result for the first input set, against the oracle.
        difference: of a peer's result (first argument) from ours.
        bytes, flops: that one call must move and compute.
        matrix: "bf16" or "fp8", the matrix rate that bounds the FLOP.
        copy_share: the least share of the copy bandwidth, where that is a goal.
        slowest: of a peer, by name, how many times its time ours may take, where that is a goal.
        memory: also measure the memory that a call takes beyond its inputs.
        invariant: ours with a token's bits the same in any batch; None if they always are.
    """

    op: str
    shape: str
    series: str
    at: int
    ours: list[Call]
    peers: dict[str, Build]
    error: Callable[[Any], float]
    tolerance: float
    difference: Callable[[Any, Any], float]
    peer_tolerance: float
    bytes: int
    flops: int
    matrix: str = "bf16"
    copy_share: float | None = None
    slowest: dict[str, float] = field(default_factory=dict)
    note: str = ""
    memory: bool = False
    invariant: Build | None = None


def input_sets(bytes_of_one: int, device: torch.device) -> int:
    """How many sets of inputs push each other out of L2 before one is used again."""
    if device.type != "cuda":
        return 2
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return min(300, max(2, math.ceil(3 * l2 / bytes_of_one)))


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """||out - expected|| / ||expected||."""
    return ((out.float() - expected).norm() / expected.norm()).item()


def oracle_error(op: OpSpec, inputs: dict[str, Any], out: torch.Tensor) -> float:
    """Of an op with one result: its relative error."""
    return relative_error(out, op.oracle(**inputs).float())


def spread_rows(rows: int, most: int, device: torch.device) -> torch.Tensor:
    """At most `most` row numbers, from the first to the last."""
    return torch.linspace(0, rows - 1, min(rows, most), device=device).long()


def calls_of(call_of: Callable[..., Call], sets: list[dict[str, Any]]) -> list[Call]:
    """One call for each set of inputs."""
    return [call_of(inputs) for inputs in sets]


def deep_gemm_peer(
    peers: Peers, call_of: Callable[..., Call], sets: list[dict[str, Any]]
) -> dict[str, Build]:
    """DeepGEMM's calls as peers of a case; none without DeepGEMM."""
    if peers.deep_gemm is None:
        return {}
    return {"deep_gemm": partial(calls_of, partial(call_of, peers.deep_gemm), sets)}

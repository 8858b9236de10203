# SPDX-License-Identifier: Apache-2.0
"""The row that every op has in `ops/specs.py`."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class TokensShape:
    """Axes of one call for that many tokens; printed as T and the axes that are not the default."""

    tokens: int

    def __str__(self) -> str:
        changed = [
            f"{axis.name}{getattr(self, axis.name)}"
            for axis in fields(self)
            if axis.name != "tokens" and getattr(self, axis.name) != axis.default
        ]
        return "-".join([f"T{self.tokens}", *changed])


@dataclass(frozen=True)
class OpSpec:
    """What tests and benches need to know of one op.

    Attributes:
        function, oracle: same arguments; the oracle is plain torch in fp32.
        inputs: keyword arguments for a shape.
        tolerance: bound of ||out - oracle|| / ||oracle||, with its reason.
        small: shapes that the interpreter runs in seconds; edge cases live here.
        full: shapes of the model, for a GPU.
        bench: shapes that are timed.
    """

    name: str
    function: Callable[..., Any]
    oracle: Callable[..., Any]
    inputs: Callable[..., dict[str, Any]]
    tolerance: float
    tolerance_reason: str
    small: tuple[Any, ...]
    full: tuple[Any, ...]
    bench: tuple[Any, ...]

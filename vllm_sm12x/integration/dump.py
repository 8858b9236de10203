# SPDX-License-Identifier: Apache-2.0
"""VLLM_TRITON_MLA_SPARSE_DUMP: what one attention call was given, as JSON lines."""

import json
from pathlib import Path
from typing import Any

import torch


class DumpedAndAborted(RuntimeError):
    """The dump was written, and the call was ended on purpose."""


def dump_and_abort(path: str, layer: str, compress_ratio: int, calls: list[dict[str, Any]]) -> None:
    """Append a line for each tensor of each call, then raise `DumpedAndAborted`.

    A line has: layer, compress_ratio, call (0, or 1 for the prefills of a mixed batch), tensor,
    shape, dtype, strides, device and, for data that has an order, min and max; what has one byte
    an element, as the packed caches do, has none. Scalars are written as they are.
    """
    with Path(path).open("a", encoding="utf-8") as file:
        for number, call in enumerate(calls):
            for name, value in call.items():
                line = {"layer": layer, "compress_ratio": compress_ratio, "call": number}
                line |= {"tensor": name, **_describe(value)}
                file.write(json.dumps(line) + "\n")
    raise DumpedAndAborted(
        f"VLLM_TRITON_MLA_SPARSE_DUMP=1: the attention call of {layer} was written to {path} and "
        "aborted. vLLM cannot end one request without ending the engine; unset the variable to "
        "serve."
    )


def _describe(value: Any) -> dict[str, Any]:
    if not isinstance(value, torch.Tensor):
        return {"value": value}
    described: dict[str, Any] = {
        "shape": list(value.shape),
        "dtype": str(value.dtype).removeprefix("torch."),
        "strides": list(value.stride()),
        "device": str(value.device),
    }
    if value.numel() and value.itemsize > 1:
        low, high = value.aminmax()
        # JSON has no infinities: a padded head's sink is "-inf".
        described["min"], described["max"] = (_number(bound.item()) for bound in (low, high))
    return described


def _number(value: float) -> float | str:
    return value if value - value == 0 else str(value)

# SPDX-License-Identifier: Apache-2.0
"""FP8 linear layers with block scales. Heavy to import: workers only."""

from typing import Any

import torch
from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import (
    Fp8BlockScaledMMLinearKernel,
)
from vllm.model_executor.utils import replace_parameter

PROCESS_WEIGHTS = "process_weights_after_loading"
SCALE_NAMES = ("weight_scale_inv", "weight_scale")


def scale_of(layer: Any) -> tuple[str, torch.Tensor] | None:
    """The name and the value of a layer's weight scales."""
    found = ((name, getattr(layer, name, None)) for name in SCALE_NAMES)
    return next(((name, scale) for name, scale in found if scale is not None), None)


__all__ = ["PROCESS_WEIGHTS", "Fp8BlockScaledMMLinearKernel", "replace_parameter", "scale_of"]

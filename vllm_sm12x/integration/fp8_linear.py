# SPDX-License-Identifier: Apache-2.0
"""Weight scales of FP8 linear layers, in the form that kernels other than DeepGEMM's read."""

from collections.abc import Callable
from typing import Any

import torch

from vllm_sm12x.vllm_api.fp8_linear import (
    PROCESS_WEIGHTS,
    Fp8BlockScaledMMLinearKernel,
    replace_parameter,
    scale_of,
)


def process_weights(original: Callable[..., None], kernel: Any, layer: Any) -> None:
    """Around a block-scaled kernel's one look at its weights: UE8M0 scales become fp32.

    DeepSeek V4 stores them as UE8M0, a power of two in a byte. Kernels that prepare their weights
    themselves are left to it; the others hand them on to CUTLASS or Triton, which read fp32.
    """
    own = getattr(type(kernel), PROCESS_WEIGHTS)
    if own is getattr(Fp8BlockScaledMMLinearKernel, PROCESS_WEIGHTS):
        found = scale_of(layer)
        if found is not None and found[1].dtype == torch.float8_e8m0fnu:
            name, scale = found
            replace_parameter(layer, name, scale.data.float())
    original(kernel, layer)

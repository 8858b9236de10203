# SPDX-License-Identifier: Apache-2.0
"""The memory that vLLM's layers share for what lives no longer than a layer."""

import torch
from vllm.v1.worker.workspace import current_workspace_manager


def workspace(*shapes_and_dtypes: tuple[tuple[int, ...], torch.dtype]) -> list[torch.Tensor]:
    """Buffers in the memory that all layers share; the largest call so far sizes it."""
    return current_workspace_manager().get_simultaneous(*shapes_and_dtypes)

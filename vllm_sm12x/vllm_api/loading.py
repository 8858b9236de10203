# SPDX-License-Identifier: Apache-2.0
"""vLLM's default weight loader, and what it asks before it reads. Heavy to import: workers only."""

from pathlib import Path

from vllm.model_executor.model_loader import default_loader as loader_module
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight
from vllm.model_executor.model_loader.weight_utils import (
    _get_available_ram_bytes as available_ram_bytes,
)
from vllm.model_executor.model_loader.weight_utils import (
    _get_checkpoints_size_bytes as checkpoint_bytes,
)
from vllm.model_executor.model_loader.weight_utils import _get_fs_type as file_system_of
from vllm.model_executor.model_loader.weight_utils import _natural_sort_key as reading_order
from vllm.model_executor.model_loader.weight_utils import filter_duplicate_safetensors_files

WEIGHTS_ITERATOR = "safetensors_weights_iterator"
_INDEX_FILE = "model.safetensors.index.json"


def safetensors_files(folder: Path) -> list[str]:
    """The safetensors files of a checkpoint's folder that vLLM would load, in its order."""
    files = [str(file) for file in folder.glob("*.safetensors")]
    return sorted(
        filter_duplicate_safetensors_files(files, str(folder), _INDEX_FILE), key=reading_order
    )


__all__ = [
    "WEIGHTS_ITERATOR",
    "available_ram_bytes",
    "checkpoint_bytes",
    "file_system_of",
    "loader_module",
    "reading_order",
    "safetensors_files",
    "should_skip_weight",
]

# SPDX-License-Identifier: Apache-2.0
"""safetensors files, written one tensor at a time.

The format (github.com/huggingface/safetensors): 8 bytes little endian with the header's length, the
header as JSON (name -> dtype, shape, data_offsets from the end of the header), the data. The
library's writers need every tensor of a file in memory and know FP8 and E8M0 only through torch.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from vllm_sm12x.tiny_checkpoint.tensors import Tensor

_SHARD_BYTES = 320_000_000


def write_shards(
    directory: Path, tensors: Sequence[Tensor], seed: int, wrote: Callable[[Tensor], None]
) -> None:
    """Write the shards and model.safetensors.index.json; call `wrote` after each tensor."""
    shards = _plan(tensors)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(directory / name, shard, seed, wrote)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    text = json.dumps(index, indent=2) + "\n"
    (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _plan(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > _SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    # Wide elements first, so that every tensor is aligned to its element size.
    return [sorted(shard, key=lambda tensor: -tensor.item_bytes) for shard in shards]


def _write_shard(
    path: Path, tensors: Sequence[Tensor], seed: int, wrote: Callable[[Tensor], None]
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        entry = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (start, end)}
        header[tensor.name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors:
            file.write(tensor.draw(seed).data)
            wrote(tensor)

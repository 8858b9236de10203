# SPDX-License-Identifier: Apache-2.0
"""Tiny models in the released checkpoint formats, with random weights.

Stock vLLM loads a tiny DeepSeek V4 as it loads DeepSeek-V4-Flash, and a tiny Qwen3-Next as it loads
Qwen3-Next-80B-A3B: same tensor names, dtypes, layouts and config fields, real attention widths,
every kind of layer. Their answers mean nothing; what they are good for is running every code path
of the model, and comparing one implementation with another.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_sm12x.tiny_checkpoint import deepseek_v4, qwen3_next
from vllm_sm12x.tiny_checkpoint.model import TinyModel
from vllm_sm12x.tiny_checkpoint.shards import write_shards
from vllm_sm12x.tiny_checkpoint.tensors import Tensor
from vllm_sm12x.tiny_checkpoint.tokenizer import write_tokenizer

# Raise it whenever the same seed gives different files.
_FORMAT = 1
_MARKER = "vllm_sm12x_tiny_checkpoint.json"

MODELS = {model.name: model for model in (deepseek_v4.MODEL, qwen3_next.MODEL)}

Progress = Callable[[int, int, str], None]


def write_tiny_deepseek_v4(
    path: Path, *, seed: int = 0, successors: bool = False, progress: Progress | None = None
) -> Path:
    """`write_tiny_checkpoint` of the DeepSeek V4 (1.44 GB)."""
    return write_tiny_checkpoint(
        deepseek_v4.MODEL, path, seed=seed, successors=successors, progress=progress
    )


def write_tiny_checkpoint(
    model: TinyModel,
    path: Path,
    *,
    seed: int = 0,
    successors: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the checkpoint to the directory `path`; return its resolved path.

    The same seed gives the same bytes. The directory appears under its name only when it is
    complete. A directory that already holds this checkpoint is returned as it is; one that holds
    a tiny checkpoint of another model, seed or format, or differs in `successors`, is replaced.

    With `successors`, every ordinary token has a likely successor, which the MTP layer knows as
    well: most of its drafts are accepted, where random weights accept none.

    `progress(done, total, label)` is called with bytes and the name of the tensor just written.

    Raises ValueError for a negative seed and for `successors` of a model that has none,
    FileExistsError if `path` is a file or holds anything else, OSError if the disk is too full;
    nothing is written then.
    """
    if seed < 0:
        raise ValueError(f"the seed of a tiny checkpoint must be 0 or more, got {seed}")
    all_tensors = model.tensors_with_successors if successors else model.tensors
    if all_tensors is None:
        able = ", ".join(each.name for each in MODELS.values() if each.tensors_with_successors)
        raise ValueError(f"successors are only for {able}, got the tiny model {model.name}")
    path = Path(path).expanduser().resolve()
    tensors = all_tensors()
    total = sum(tensor.nbytes for tensor in tensors)
    if _is_complete(path, model.name, seed, successors):
        if progress:
            progress(total, total, "already written")
        return path
    _refuse_to_destroy(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _refuse_full_disk(path.parent, total)

    done = 0

    def wrote(tensor: Tensor) -> None:
        nonlocal done
        done += tensor.nbytes
        if progress:
            progress(done, total, tensor.name)

    config = model.config
    limits = {"vocab_size": config["vocab_size"], "max_length": config["max_position_embeddings"]}
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        _write_json(partial / "config.json", config)
        _write_json(partial / "generation_config.json", model.generation_config)
        write_tokenizer(partial, model.tokens, **limits)
        write_shards(partial, tensors, seed, wrote)
        files = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        marker = {"model": model.name, "format": _FORMAT, "seed": seed, "files": files}
        if successors:
            marker["successors"] = True
        _write_json(partial / _MARKER, marker)
        _move_into_place(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def _is_complete(path: Path, model: str, seed: int, successors: bool) -> bool:
    marker = _read_marker(path)
    if marker is None or (marker["format"], marker["seed"]) != (_FORMAT, seed):
        return False
    # Markers named no model while there was one.
    if marker.get("model", deepseek_v4.MODEL.name) != model:
        return False
    if marker.get("successors", False) != successors:
        return False
    return all(
        (path / name).is_file() and (path / name).stat().st_size == size
        for name, size in marker["files"].items()
    )


def _read_marker(path: Path) -> dict[str, Any] | None:
    """What an earlier run left in `path`, or None.

    {"model", "format", "seed", "files": {name: bytes}}, and "successors": true where it has them.
    """
    try:
        return json.loads((path / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _refuse_to_destroy(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; a tiny checkpoint needs a directory")
    marker = _read_marker(path)
    ours = {_MARKER, *marker["files"]} if marker else set()
    others = sorted({file.name for file in path.iterdir()} - ours) if path.is_dir() else []
    if others:
        raise FileExistsError(
            f"{path} holds {others[0]!r}, which is not part of a tiny checkpoint; "
            "give a new or empty directory"
        )


def _refuse_full_disk(parent: Path, total: int) -> None:
    free = shutil.disk_usage(parent).free
    if free < total + (64 << 20):
        raise OSError(
            f"a tiny checkpoint takes {total / 1e9:.2f} GB, but {parent} has "
            f"{free / 1e9:.2f} GB free"
        )


def _move_into_place(partial: Path, path: Path) -> None:
    if _read_marker(path) is not None:
        old = partial.with_name(f"{partial.name}-old")
        os.replace(path, old)
        os.replace(partial, path)
        shutil.rmtree(old)
    else:
        os.replace(partial, path)  # over nothing or an empty directory


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as its config.json and the headers of its safetensors files describe it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = ("DeepseekV4ForCausalLM", "DeepseekV4ForConditionalGeneration")
INDEX = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """What was given is no checkpoint that can be examined; the message says what would be."""


@dataclass(frozen=True)
class Stored:
    """One tensor in a file."""

    dtype: str  # as safetensors names it: BF16, F8_E4M3, ...
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """`folder` is where it lies, `name` what the user called it."""

    name: str
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Stored]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def architecture(self) -> str:
        return str(self.config["architectures"][0])


def read(model: str) -> Checkpoint:
    """Read a folder, or a Hugging Face id that is in the local cache. Raises CheckpointError."""
    folder = _folder(model)
    config = _json(folder / "config.json", f"{folder} has no config.json: give the folder that has")
    architectures = config.get("architectures") or ["none"]
    if architectures[0] not in ARCHITECTURES:
        raise CheckpointError(
            f"The architecture of {model} is {architectures[0]}; allowed are "
            f"{' and '.join(ARCHITECTURES)}."
        )
    tensors: dict[str, Stored] = {}
    for file in _files(folder):
        tensors.update(_header(file))
    return Checkpoint(model, folder, config, tensors)


def _folder(model: str) -> Path:
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{model} is a file; allowed is the folder of a checkpoint.")
    if len(folder.parts) == 2 and not folder.is_absolute() and not model.startswith("."):
        try:
            from huggingface_hub import snapshot_download

            return Path(snapshot_download(model, local_files_only=True))
        except Exception as error:
            raise CheckpointError(
                f"{model} is neither a folder nor complete in the local Hugging Face cache "
                f"({type(error).__name__}): download it first with `hf download {model}`."
            ) from None
    raise CheckpointError(
        f"{model} does not exist; allowed is the folder of a checkpoint or a Hugging Face id."
    )


def _json(file: Path, missing: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{missing}.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object.")
    return content


def _files(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise CheckpointError(
            f"{folder} has no *.safetensors: give a checkpoint in the released format, with its "
            "weights."
        )
    index = folder / INDEX
    if not index.exists():
        return found
    weight_map = _json(index, "").get("weight_map") or {}
    wanted = sorted(set(weight_map.values()))
    missing = [name for name in wanted if not (folder / name).exists()]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of the {len(wanted)} files that {INDEX} names are missing in "
            f"{folder}, {missing[0]} first: finish the download."
        )
    return [folder / name for name in wanted] or found


def _header(file: Path) -> Iterator[tuple[str, Stored]]:
    """The tensors of a file by its header (huggingface.co/docs/safetensors, "Format")."""
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        room = file.stat().st_size - 8
        if len(start) < 8 or length > room:
            raise CheckpointError(f"{file} is cut off in its header: download it again.")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise CheckpointError(f"{file} has no safetensors header: {error}.") from None
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end > room - length:
        raise CheckpointError(
            f"{file} has {room - length:,} bytes of the {end:,} that its header names: "
            "download it again."
        )
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        yield name, Stored(entry["dtype"], tuple(entry["shape"]), last - first)

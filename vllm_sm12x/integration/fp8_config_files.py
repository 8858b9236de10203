# SPDX-License-Identifier: Apache-2.0
"""Files of tuned configurations of vLLM's block-scaled FP8 GEMM: names, folders, content.

The format is vLLM's own: one JSON object for each (N, K), from M to the keyword arguments of a
launch. vLLM takes the entry whose M is nearest.
"""

import json
import re
from pathlib import Path
from typing import Any

from vllm_sm12x.vllm_api.envs import config_root, tuned_config_folder

Config = dict[str, int]
Table = dict[int, Config]

# In decode at most this many rows: https://github.com/vllm-project/vllm/pull/40925
SMALL_M = 8
SMALL_M_CHANGES = {"BLOCK_SIZE_M": 16, "num_stages": 3}

_TILES = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K")
_FIELDS = (*_TILES, "GROUP_SIZE_M", "num_warps", "num_stages")
# One GPU (GB202 with 188 multiprocessors) under three names; clocks and power limits differ.
_RTX_PRO_6000 = tuple(
    f"NVIDIA_RTX_PRO_6000_Blackwell_{edition}"
    for edition in ("Workstation_Edition", "Server_Edition", "Max-Q_Workstation_Edition")
)


def as_in_file_names(device: str) -> str:
    """A GPU's name as vLLM writes it into file names."""
    return re.sub(r"[\s/]+", "_", device)


def siblings(device: str) -> tuple[str, ...]:
    """Other names, as in file names, under which the same silicon is sold."""
    return tuple(name for name in _RTX_PRO_6000 if device in _RTX_PRO_6000 and name != device)


def file_name(device: str, n: int, k: int, block_n: int, block_k: int) -> str:
    """vLLM's name for the file of one weight shape [n, k] on one GPU."""
    return f"N={n},K={k},device_name={device},dtype=fp8_w8a8,block_shape=[{block_n},{block_k}].json"


def user_folders() -> tuple[Path, ...]:
    """Where a user's tuned files are looked for; `vllm-sm12x tune` writes to the first."""
    ours = config_root() / "vllm_sm12x" / "fp8_linear"
    named = tuned_config_folder()
    return (ours,) if named is None else (named, ours)


def default_config(stock: Config, m: int) -> Config:
    """What `m` rows take without a file, where vLLM's own default is `stock`."""
    return {**stock, **SMALL_M_CHANGES} if m <= SMALL_M else stock


def default_table(stock: Config) -> Table:
    """`default_config` of every M, in vLLM's way of taking the entry with the nearest M."""
    return {m: default_config(stock, m) for m in (SMALL_M, SMALL_M + 1)}


def read_table(path: Path, block_k: int) -> Table:
    """The content of a file. Raises ValueError, in words, where a launch would fail or be wrong.

    OSError where it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds no configurations by M")
    for m, config in content.items():
        if not m.isdecimal() or not isinstance(config, dict):
            raise ValueError(f"{path} has {m!r}, where a configuration by M is expected")
        wrong = _what_is_wrong(config, block_k)
        if wrong:
            raise ValueError(f"{path} has, for M {m}, {wrong}")
    return {int(m): config for m, config in content.items()}


def _what_is_wrong(config: dict[str, Any], block_k: int) -> str | None:
    for field in _FIELDS:
        value = config.get(field)
        if type(value) is not int or value < 1:
            return f"{field} {value!r}; allowed are integers from 1 on"
        if field in _TILES and value & (value - 1):
            return f"{field} {value}; allowed are powers of 2"
    if block_k % config["BLOCK_SIZE_K"]:
        # The kernel applies one scale to each step along K.
        return f"BLOCK_SIZE_K {config['BLOCK_SIZE_K']}; allowed are divisors of {block_k}"
    return None

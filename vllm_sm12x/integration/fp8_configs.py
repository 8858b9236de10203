# SPDX-License-Identifier: Apache-2.0
"""Which configurations vLLM's block-scaled FP8 GEMM in Triton is launched with, on SM12x.

The first that exists: the user's file for this GPU, vLLM's file for it, the user's and vLLM's for
another name of the same silicon, and a default that suits decode.
"""

import functools
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from vllm_sm12x.integration.fp8_config_files import (
    SMALL_M,
    Config,
    Table,
    as_in_file_names,
    default_table,
    file_name,
    read_table,
    siblings,
    user_folders,
)
from vllm_sm12x.log import get_logger
from vllm_sm12x.vllm_api import fp8_configs as stock

logger = get_logger(__name__)

_kinds_said: set[str] = set()


def look_up(original: Callable[..., Table | None], *shape: int) -> Table | None:
    """Around vLLM's `get_w8a8_block_fp8_configs(N, K, block_n, block_k)`: never None.

    What vLLM finds itself it also says itself.
    """
    return _look_up(original, *shape)


@functools.cache
def _look_up(
    original: Callable[..., Table | None], n: int, k: int, block_n: int, block_k: int
) -> Table | None:
    device = as_in_file_names(stock.device_name())
    shipped = stock.folder_of_vllm()
    mine = file_name(device, n, k, block_n, block_k)
    for folder in user_folders():
        table = _read(folder / mine, block_k)
        if table is not None:
            _say("file", f"FP8 linear N={n}, K={k}: configurations from {folder / mine}.")
            return table
    if (shipped / mine).exists():
        return original(n, k, block_n, block_k)
    for sibling in siblings(device):
        for folder in (*user_folders(), shipped):
            path = folder / file_name(sibling, n, k, block_n, block_k)
            table = _read(path, block_k)
            if table is not None:
                _say(
                    "sibling",
                    f"FP8 linear N={n}, K={k}: there is no file for {device}; configurations from "
                    f"{path}, tuned on the same silicon. `vllm-sm12x tune MODEL` writes one.",
                )
                return table
    default = stock.launched_config(1, n, k, (block_n, block_k), lambda *shape: None)
    _say(
        "default",
        f"FP8 linear N={n}, K={k}: no tuned file for {device}, so M <= {SMALL_M} takes tiles of 16 "
        "rows, and larger M vLLM's default. `vllm-sm12x tune MODEL` writes tuned files.",
    )
    return default_table(default)


def forget() -> None:
    """Read files anew on the next look-up, and say again where configurations come from."""
    _look_up.cache_clear()
    _kinds_said.clear()


def _read(path: Path, block_k: int) -> Table | None:
    if not path.exists():
        return None
    try:
        return read_table(path, block_k)
    except (OSError, ValueError) as error:
        logger.warning("A file of tuned FP8 configurations is left out: %s.", error)
        return None


def _say(kind: str, message: str) -> None:
    """Each kind of answer once for all to read; further shapes for those who debug."""
    level = logging.DEBUG if kind in _kinds_said else logging.INFO
    _kinds_said.add(kind)
    logger.log(level, "%s", message)


def default_launches(ms: Iterable[int]) -> dict[int, Config]:
    """What vLLM's GEMM makes, for each M, of the answer for a shape that no file is for."""
    block = (128, 128)
    untuned = stock.launched_config(1, *block, block, lambda *shape: None)
    answer = default_table(untuned)
    return {m: stock.launched_config(m, *block, block, lambda *shape: answer) for m in ms}

# SPDX-License-Identifier: Apache-2.0
"""Loggers under the `vllm` tree: vLLM gives handlers to that tree only."""

import logging
from functools import cache

_waiting: list[tuple[logging.Logger, int, str]] = []


def get_logger(module: str) -> logging.Logger:
    """The logger `vllm.sm12x.<module>` for a module name such as `vllm_sm12x.plugin`."""
    return logging.getLogger(f"vllm.sm12x.{module.removeprefix('vllm_sm12x.')}")


@cache
def once(logger: logging.Logger, level: int, message: str) -> None:
    """Log `message` the first time that this process says it.

    vLLM loads plugins before it configures logging from 0.32 on: what nobody would see waits for
    `say_what_waited`, but warnings, which Python prints without a handler too.
    """
    if level < logging.WARNING and not logger.hasHandlers():
        _waiting.append((logger, level, message))
    else:
        logger.log(level, "%s", message, stacklevel=2)


def say_what_waited() -> None:
    """Log what `once` has kept back. To be called when vLLM has configured logging."""
    while _waiting:
        logger, level, message = _waiting.pop(0)
        logger.log(level, "%s", message)

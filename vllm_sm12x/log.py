# SPDX-License-Identifier: Apache-2.0
"""Loggers under the `vllm` tree: vLLM gives handlers to that tree only."""

import logging
from functools import cache


def get_logger(module: str) -> logging.Logger:
    """The logger `vllm.sm12x.<module>` for a module name such as `vllm_sm12x.plugin`."""
    return logging.getLogger(f"vllm.sm12x.{module.removeprefix('vllm_sm12x.')}")


@cache
def once(logger: logging.Logger, level: int, message: str) -> None:
    """Log `message` the first time that this process says it."""
    logger.log(level, "%s", message, stacklevel=2)

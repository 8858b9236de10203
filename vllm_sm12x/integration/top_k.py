# SPDX-License-Identifier: Apache-2.0
"""The decode top-k of vLLM's own sparse indexer: a kernel that cannot end the engine on SM12x."""

import logging
from typing import Any, NamedTuple

from vllm_sm12x.integration.extension import NotReadable, has_constant
from vllm_sm12x.log import get_logger, once
from vllm_sm12x.vllm_api import extensions

CHOICE = "per_row"
_ABORT = b"persistent_topk would oversubscribe"

logger = get_logger(__name__)


class Finding(NamedTuple):
    """Yes or no, and why, in words."""

    yes: bool
    reason: str


def persistent_may_abort() -> Finding:
    """Whether vLLM's `persistent_topk` gives up where a GPU has less than 128 KiB shared memory.

    With vLLM #54110 it takes the kernel of `per_row` then, and its library lacks the message.
    """
    file = extensions.top_k_extension()
    if file is None:
        return Finding(False, "vLLM was built without the extension that has persistent_topk")
    try:
        aborts = has_constant(file, _ABORT)
    except (NotReadable, OSError) as error:
        return Finding(True, f"whether persistent_topk aborts cannot be read: {error}")
    if aborts:
        return Finding(True, f"{file.name} has the message `{_ABORT.decode()}`")
    return Finding(False, f"persistent_topk of {file.name} falls back to {CHOICE} by itself")


def prefer_per_row(vllm_config: Any) -> None:
    """Fill in the choice that the user left to vLLM."""
    kernel_config = vllm_config.kernel_config
    if kernel_config.sparse_indexer_topk_backend == "auto":
        kernel_config.sparse_indexer_topk_backend = CHOICE
        why = "persistent_topk may need more shared memory than SM12x has"
        once(logger, logging.INFO, f"sparse_indexer_topk_backend is {CHOICE}: {why}.")

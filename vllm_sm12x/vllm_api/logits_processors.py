# SPDX-License-Identifier: Apache-2.0
"""vLLM's logits processors, which a front end looks for as it checks its first request."""

from contextlib import suppress
from typing import Any


def load(vllm_config: Any) -> None:
    """Have vLLM look for them now; it keeps what it finds for the process.

    It reads the entry points of every installed distribution. One that cannot be loaded is left to
    vLLM, which says so.
    """
    if vllm_config.model_config is None:
        return
    from vllm.v1.sample.logits_processor import cached_load_custom_logitsprocs

    given = vllm_config.model_config.logits_processors
    with suppress(Exception):
        cached_load_custom_logitsprocs(tuple(given) if given is not None else None)

# SPDX-License-Identifier: Apache-2.0
"""vLLM's own planning of KV caches: how many blocks a memory holds, and what a request takes."""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from vllm.v1.attention.backends import utils as attention_backends
from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

# until: vllm>=0.33, which plans in a module of its own, from groups that it is given.
PLANS_APART = importlib.util.find_spec("vllm.v1.core.kv_cache_planning") is not None
# A length that fits wherever anything does: planning refuses what is too long, and asks later.
_SHORT = 256


class Pool:
    """The blocks that vLLM would make of a memory, and how many requests of a length they hold."""

    def __init__(
        self,
        vllm_config: Any,
        specs: Sequence[Mapping[str, Any]],
        layouts: Sequence[list[str]],
        memory: Sequence[int],
    ) -> None:
        """All by pipeline stage: `memory` is bytes for caches, `layouts` what backends support.

        Raises vLLM's ValueError.
        """
        self._vllm_config = vllm_config
        self._own_length = vllm_config.model_config.max_model_len
        stages = [dict(stage) for stage in specs]
        # until: vllm>=0.29, whose engine always resolves a layout before it plans.
        if hasattr(attention_backends, "resolve_kv_cache_layout"):
            every = [spec for stage in stages for spec in stage.values()]
            attention_backends.resolve_kv_cache_layout(vllm_config, list(layouts), every)
        self._plan = self._at(_SHORT, lambda: _plan(vllm_config, stages, list(memory))[0])
        self.blocks: int = self._plan.num_blocks

    def concurrency(self, tokens: int) -> float:
        """How many requests of `tokens` tokens the blocks hold, as vLLM logs it at start."""
        return self._at(
            tokens, lambda: get_max_concurrency_for_kv_cache_config(self._vllm_config, self._plan)
        )

    def longest(self, limit: int) -> int:
        """The largest context, in tokens up to `limit`, of which the blocks hold one; else 0."""
        fits, beyond = 0, limit + 1
        while beyond - fits > 1:
            middle = (fits + beyond) // 2
            if self.concurrency(middle) >= 1:
                fits = middle
            else:
                beyond = middle
        return fits

    def _at(self, tokens: int, ask: Any) -> Any:
        model_config = self._vllm_config.model_config
        model_config.max_model_len = tokens
        try:
            return ask()
        finally:
            model_config.max_model_len = self._own_length


def _plan(vllm_config: Any, specs: list[dict[str, Any]], memory: list[int]) -> list[Any]:
    if PLANS_APART:
        from vllm.v1.core.kv_cache_planning import (
            get_global_kv_cache_groups,
            get_kv_cache_configs,
        )

        groups = get_global_kv_cache_groups(vllm_config, specs)
        plans: list[Any] = get_kv_cache_configs(vllm_config, specs, memory, groups)
        return plans
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

    plans = get_kv_cache_configs(vllm_config, specs, memory)
    return plans

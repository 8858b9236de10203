# SPDX-License-Identifier: Apache-2.0
"""Which request each token of a step belongs to: once for all groups of KV caches.

vLLM's V1 model runner builds attention metadata group by group, each from a copy of one
CommonAttentionMetadata, and a copy keeps the mapping that its method makes for itself: six in a
step of DeepSeek V4, each a copy to the GPU, 15 % of a decode step's time on the host. Its drafter
changes one such object from draft to draft, and gets the first draft's mapping again.

All copies of a step have the same `query_start_loc_cpu`, of which the mapping is a function; the
next step has another one, and so has the next draft.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch


class TokenToRequest:
    """The mapping of the last step that has asked for one."""

    def __init__(self) -> None:
        self._starts: weakref.ref[torch.Tensor] | None = None
        self._mapping: torch.Tensor | None = None

    def __call__(
        self, original: Callable[..., torch.Tensor], common: Any, buffer: torch.Tensor
    ) -> torch.Tensor:
        """Around CommonAttentionMetadata's method: int32 [tokens].

        It lies in the buffer of the builder that asks first, in each step and each capture of a
        CUDA graph the same one: the order of groups is fixed.
        """
        starts = common.query_start_loc_cpu
        kept = self._mapping if self._starts is not None and self._starts() is starts else None
        if kept is not None and kept.shape[0] < common.num_actual_tokens:
            kept = None
        common._token_to_req_indices_cache = kept
        mapping = original(common, buffer)
        self._starts, self._mapping = weakref.ref(starts), common._token_to_req_indices_cache
        return mapping


token_to_request = TokenToRequest()

# SPDX-License-Identifier: Apache-2.0
"""What runs inside vLLM's worker: a logits processor, and a question to the model."""

from collections.abc import Callable
from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from vllm_sm12x.ops.sparse_mla.reference import sparse_mla_reference

FORCED_TOKENS = "forced_tokens"
# Query tokens whose gathered fp32 rows the oracle holds at one time.
ORACLE_CHUNK = 256
PER_TOKEN = ("q", "swa_indices", "swa_lens", "extra_indices", "extra_lens", "request_ids", "out")


class ForcedTokens(AdapterLogitsProcessor):
    """Make a request generate the token ids in `SamplingParams.extra_args["forced_tokens"]`.

    With logprobs_mode "raw_logprobs" vLLM takes the log-probabilities before any processor, so
    those of the forced tokens are the model's own: teacher forcing through the decode path.
    """

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        forced = (params.extra_args or {}).get(FORCED_TOKENS)
        if forced is None:
            return None

        def force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            logits.fill_(-torch.inf)
            logits[forced[len(output_ids)]] = 0.0
            return logits

        return force


def attention_classes(model: torch.nn.Module) -> list[str]:
    """Full names of the classes of the model's DeepSeek V4 attention layers."""
    classes = {type(module) for module in model.modules() if hasattr(module, "forward_mqa")}
    return sorted(f"{cls.__module__}.{cls.__qualname__}" for cls in classes)


def attend_by_oracle(*, policy: Any = None, **arguments: Any) -> None:
    """`sparse_mla` as our attention layer calls it, computed by the fp32 oracle. Eager only."""
    for start in range(0, arguments["q"].shape[0], ORACLE_CHUNK):
        rows = slice(start, start + ORACLE_CHUNK)
        chunk = {
            name: value[rows] if name in PER_TOKEN else value for name, value in arguments.items()
        }
        sparse_mla_reference(**chunk)


def use_oracle() -> None:
    """Put the oracle into our attention layer, in this process."""
    from vllm_sm12x.integration import sparse_mla as layer

    layer.sparse_mla = attend_by_oracle

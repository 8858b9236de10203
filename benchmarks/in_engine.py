# SPDX-License-Identifier: Apache-2.0
"""What runs inside vLLM's worker: a logits processor, and a question to the model."""

from collections.abc import Callable

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

FORCED_TOKENS = "forced_tokens"


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

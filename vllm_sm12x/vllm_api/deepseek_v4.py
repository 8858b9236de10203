# SPDX-License-Identifier: Apache-2.0
"""DeepSeek V4's model module. Heavy to import: in a worker, before the model is built."""

from collections.abc import Callable
from typing import Any

from vllm.models.deepseek_v4.nvidia import model as model_module

# The one function that picks the attention class of a decoder layer, by its name in that module.
SELECT_ATTENTION_CLASS = "_select_dsv4_attn_cls"


def function_that_the_decoder_layer_calls() -> Callable[..., Any]:
    """What the name above means inside DeepseekV4DecoderLayer's constructor."""
    constructor: Any = model_module.DeepseekV4DecoderLayer.__init__
    return constructor.__globals__[SELECT_ATTENTION_CLASS]


__all__ = ["SELECT_ATTENTION_CLASS", "function_that_the_decoder_layer_calls", "model_module"]

# SPDX-License-Identifier: Apache-2.0
"""What vLLM's metadata builders are given of one step. Heavy to import: workers only."""

from vllm.v1.attention.backend import CommonAttentionMetadata

TOKEN_TO_REQUEST = "token_to_req_indices"

__all__ = ["TOKEN_TO_REQUEST", "CommonAttentionMetadata"]

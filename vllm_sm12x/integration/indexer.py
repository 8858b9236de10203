# SPDX-License-Identifier: Apache-2.0
"""DeepSeek V4's sparse indexer on SM12x: which compressed keys each token attends to.

vLLM's own gathers a prefill's keys out of the cache, writes all their scores, and selects; it sizes
that workspace by `max_model_len`. Here a prefill is scored and selected in one pass over the pages
(`ops.paged_mqa_topk`), and a decode's scores go to one buffer that all layers share.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from vllm_sm12x.integration import providers
from vllm_sm12x.ops import paged_mqa_topk
from vllm_sm12x.vllm_api.indexer import (
    DeepseekV4IndexerBackend,
    DeepseekV4IndexerCache,
    DeepseekV32IndexerMetadata,
    DeepseekV32IndexerMetadataBuilder,
    gather_keys,
    max_logits_bytes,
    top_k_of_decode,
    top_k_of_prefill,
    workspace,
)
from vllm_sm12x.vllm_api.sparse_mla import current_metadata

SCORE_BYTES = 4

_deep_gemm_is_there: ContextVar[bool | None] = ContextVar("deep_gemm_is_there", default=None)


@contextmanager
def as_if_deep_gemm(there: bool) -> Iterator[None]:
    """Meanwhile vLLM's indexer hears this answer to the question whether there is a DeepGEMM."""
    token = _deep_gemm_is_there.set(there)
    try:
        yield
    finally:
        _deep_gemm_is_there.reset(token)


def has_deep_gemm(original: Callable[[], bool]) -> bool:
    """Around vLLM's question, where its indexer asks it."""
    there = _deep_gemm_is_there.get()
    return original() if there is None else there


@dataclasses.dataclass
class PrefillRows:
    """The prefilling tokens of a batch, T in R requests.

    Attributes:
        tokens: where they stand in the batch.
        query_start_loc: int32 [R + 1], each request's first token, counted from `tokens.start`.
        lens: int32 [T], compressed keys that each token sees.
        block_table: int32 [R, blocks].
    """

    tokens: slice
    query_start_loc: torch.Tensor
    lens: torch.Tensor
    block_table: torch.Tensor


@dataclasses.dataclass
class IndexerMetadata(DeepseekV32IndexerMetadata):
    """vLLM's metadata, and the prefill by rows instead of by gathered chunks."""

    prefill_rows: PrefillRows | None = None


class IndexerMetadataBuilder(DeepseekV32IndexerMetadataBuilder):
    """Builds `IndexerMetadata`: no DeepGEMM schedule, and MTP rows stay with their request."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # vLLM makes one request of each speculative row where DeepGEMM takes no more than two.
        self.use_flattening = False

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> IndexerMetadata:
        with as_if_deep_gemm(False):
            stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata = IndexerMetadata(**vars(stock))
        if metadata.decode is not None:
            # A request that pads a CUDA graph's batch has length 0, less than its rows.
            metadata.decode.seq_lens.clamp_(min=0)
        if metadata.num_prefills:
            metadata.prefill_rows = self._prefill_rows(common_attn_metadata, metadata)
        return metadata

    def _prefill_rows(self, common: Any, metadata: IndexerMetadata) -> PrefillRows:
        decodes, first = metadata.num_decodes, metadata.num_decode_tokens
        starts = common.query_start_loc[decodes:]
        token = torch.arange(
            first, first + metadata.num_prefill_tokens, dtype=torch.int32, device=starts.device
        )
        request = torch.searchsorted(starts, token, right=True) - 1
        context = common.seq_lens[decodes:][request] - starts[request + 1] + token + 1
        return PrefillRows(
            tokens=slice(first, first + metadata.num_prefill_tokens),
            query_start_loc=starts - first,
            lens=context // self.compress_ratio,
            block_table=common.block_table_tensor[decodes:],
        )


class IndexerBackend(DeepseekV4IndexerBackend):
    """vLLM's indexer cache with our metadata builder."""

    @staticmethod
    def get_builder_cls() -> type[IndexerMetadataBuilder]:
        return IndexerMetadataBuilder


class IndexerCache(DeepseekV4IndexerCache):
    """The indexer cache of one layer."""

    def get_attn_backend(self) -> type[IndexerBackend]:
        return IndexerBackend


class SparseIndexer(torch.nn.Module):
    """In place of vLLM's SparseAttnIndexer: scores and selects, and never gathers."""

    def __init__(self, vllm_config: Any, stock: Any, cache: IndexerCache) -> None:
        """`stock` is the SparseAttnIndexer that DeepSeek V4's indexer has built."""
        super().__init__()
        self.k_cache = cache
        self.top_k = stock.topk_tokens
        self.top_k_indices = stock.topk_indices_buffer
        self.columns = stock.max_model_len
        self.gathered_keys = stock.max_total_seq_len
        speculative = vllm_config.speculative_config
        next_n = 1 + (speculative.num_speculative_tokens if speculative else 0)
        self.decode_rows = vllm_config.scheduler_config.max_num_seqs * next_n
        self.paged_mqa_logits = providers.implementation("paged_mqa_logits")
        # DeepGEMM takes no buffer, and its prefill path needs all keys and scores in memory.
        self.takes_buffer = providers.chosen("paged_mqa_logits").name == "triton"
        one_pass = providers.chosen("mqa_logits").name == "triton"
        self.mqa_logits = None if one_pass else providers.implementation("mqa_logits")

    def forward(
        self,
        hidden_states: torch.Tensor,
        q_quant: torch.Tensor,
        k: torch.Tensor | None,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """Select for every token of the batch.

        Args:
            hidden_states: [tokens, hidden]; only its length is used.
            q_quant: e4m3 [tokens, heads, 128].
            k: None, the compressor has written the keys.
            weights: fp32 [tokens, heads], with the scale of q_quant in them.

        Returns:
            int32 [max tokens, top-k]: positions among the request's compressed keys, -1 past the
            last; rows of this batch's tokens are written.
        """
        metadata = current_metadata()
        if metadata is None:
            self._reserve()
            return self.top_k_indices
        mine = metadata[self.k_cache.prefix]
        self.top_k_indices[: hidden_states.shape[0]] = -1
        cache = self.k_cache.kv_cache
        if mine.num_prefills:
            if self.mqa_logits is None:
                self._prefill(cache.unsqueeze(2), q_quant, weights, mine.prefill_rows)
            else:
                self._prefill_gathered(cache, q_quant, weights, mine.prefill.chunks)
        if mine.num_decodes:
            self._decode(cache.unsqueeze(2), q_quant, weights, mine)
        return self.top_k_indices

    def _rows_at_once(self) -> int:
        """Rows of decode scores that the cap allows, at least one."""
        return max(1, max_logits_bytes() // (SCORE_BYTES * self.columns))

    def _scores(self, rows: int) -> torch.Tensor:
        return workspace(((rows, self.columns), torch.float32))[0]

    def _reserve(self) -> None:
        """In the profile run: take what the largest batch will take."""
        self._scores(min(self.decode_rows, self._rows_at_once()))
        if self.mqa_logits is not None:
            self._gathered()
        # The scratch of a prefill, or DeepGEMM's scores, which are freed after each chunk.
        torch.empty(max_logits_bytes(), dtype=torch.uint8, device=self.top_k_indices.device)

    def _gathered(self) -> list[torch.Tensor]:
        keys = (self.gathered_keys, self.k_cache.head_dim - SCORE_BYTES)
        scales = (self.gathered_keys, SCORE_BYTES)
        return workspace((keys, torch.float8_e4m3fn), (scales, torch.uint8))

    def _prefill(
        self, cache: torch.Tensor, q: torch.Tensor, weights: torch.Tensor, rows: PrefillRows
    ) -> None:
        paged_mqa_topk(
            q[rows.tokens],
            cache,
            weights[rows.tokens],
            rows.query_start_loc,
            rows.lens,
            rows.block_table,
            self.top_k,
            out=self.top_k_indices[rows.tokens, : self.top_k],
            max_scratch_bytes=max_logits_bytes(),
        )

    def _prefill_gathered(
        self, cache: torch.Tensor, q: torch.Tensor, weights: torch.Tensor, chunks: Any
    ) -> None:
        assert self.mqa_logits is not None
        all_keys, all_scales = self._gathered()
        for chunk in chunks:
            tokens = slice(chunk.token_start, chunk.token_end)
            keys, scales = all_keys[: chunk.total_seq_lens], all_scales[: chunk.total_seq_lens]
            if not chunk.skip_kv_gather:
                gather_keys(cache, chunk, keys, scales)
            logits = self.mqa_logits(
                q[tokens],
                keys,
                scales.view(torch.float32).squeeze(-1),
                weights[tokens],
                chunk.cu_seqlen_ks,
                chunk.cu_seqlen_ke,
            )
            top_k = self.top_k_indices[tokens, : self.top_k]
            top_k_of_prefill(logits, chunk.cu_seqlen_ks, chunk.cu_seqlen_ke, top_k)

    def _decode(
        self, cache: torch.Tensor, q: torch.Tensor, weights: torch.Tensor, mine: Any
    ) -> None:
        decode = mine.decode
        # All requests have as many rows, but for those that only pad a batch: they come last and
        # have none.
        next_n = decode.seq_lens.shape[1]
        requests = mine.num_decode_tokens // next_n
        rows = q[: requests * next_n].unflatten(0, (requests, next_n))
        step = max(1, self._rows_at_once() // next_n)
        for first in range(0, requests, step):
            some = slice(first, min(first + step, requests))
            tokens = slice(some.start * next_n, some.stop * next_n)
            scores = self.paged_mqa_logits(
                rows[some],
                cache,
                weights[tokens],
                decode.seq_lens[some],
                decode.block_table[some],
                max_model_len=self.columns,
                clean_logits=False,
                out=self._scores(tokens.stop - tokens.start) if self.takes_buffer else None,
            )
            top_k = self.top_k_indices[tokens, : self.top_k]
            top_k_of_decode(scores, next_n, decode.seq_lens[some], top_k)

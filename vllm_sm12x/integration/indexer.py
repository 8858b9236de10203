# SPDX-License-Identifier: Apache-2.0
"""DeepSeek V4's sparse indexer on SM12x: which compressed keys each token attends to.

As vLLM's own it gathers a prefill's keys out of the cache, writes their scores, and selects, chunk
by chunk. Keys and scores have one buffer that all layers share: keys of one request of
`max_model_len` tokens (vLLM's own: of 40), scores up to VLLM_SPARSE_INDEXER_MAX_LOGITS_MB, in
decode too. With VLLM_SM12X_ONE_PASS_TOP_K=1 a prefill is scored and selected in one pass over the
pages, and neither is there.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from vllm_sm12x import knobs
from vllm_sm12x.integration import providers
from vllm_sm12x.ops import paged_mqa_topk
from vllm_sm12x.vllm_api.envs import batch_invariant
from vllm_sm12x.vllm_api.indexer import (
    AttentionCGSupport,
    DeepseekV4IndexerBackend,
    DeepseekV4IndexerCache,
    DeepseekV32IndexerMetadata,
    DeepseekV32IndexerMetadataBuilder,
    gather_keys,
    max_logits_bytes,
    top_k_of_decode,
    top_k_of_prefill,
)
from vllm_sm12x.vllm_api.sparse_mla import current_metadata
from vllm_sm12x.vllm_api.workspace import workspace

HEAD_DIM = 128
SCALE_BYTES = SCORE_BYTES = 4
# vLLM plans chunks by an upper bound of lengths, which may be some speculative tokens too long.
SLACK = 64
# Keys that a chunk of short prompts may have together, whatever one prompt may have.
KEYS_OF_SHORT_PROMPTS = 65_536

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


def columns(vllm_config: Any, ratio: int) -> int:
    """Compressed keys of a request of `max_model_len` tokens."""
    return vllm_config.model_config.max_model_len // ratio


def keys_at_once(vllm_config: Any, ratio: int) -> int:
    """Compressed keys that one chunk of a prefill has at most."""
    return max(columns(vllm_config, ratio), KEYS_OF_SHORT_PROMPTS)


def in_one_pass() -> bool:
    """Whether prefills are scored and selected in one pass."""
    return bool(knobs.get("VLLM_SM12X_ONE_PASS_TOP_K"))


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
    """vLLM's metadata, and for selection in one pass the prefill by rows."""

    prefill_rows: PrefillRows | None = None


class IndexerMetadataBuilder(DeepseekV32IndexerMetadataBuilder):
    """Builds `IndexerMetadata`: no DeepGEMM schedule, and MTP rows stay with their request.

    vLLM makes one request of each speculative row where DeepGEMM takes no more than two.
    """

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Decodes of equal length: their rows are one block of queries for each request."""
        return AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.use_flattening = False
        # Only flattening reads it, and it has max_num_batched_tokens rows of max_model_len.
        del self.expanded_block_table_buffer
        self.max_prefill_buffer_size = keys_at_once(self.vllm_config, self.compress_ratio)
        self.one_pass = in_one_pass()

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> IndexerMetadata:
        with as_if_deep_gemm(False):
            stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata = IndexerMetadata(**vars(stock))
        if metadata.decode is not None:
            # A request that pads a CUDA graph's batch has length 0, less than its rows.
            metadata.decode.seq_lens.clamp_(min=0)
        if metadata.num_prefills and self.one_pass:
            metadata.prefill_rows = self._prefill_rows(common_attn_metadata, metadata)
        return metadata

    def _prepare_decode_tensors(self, **arguments: Any) -> Any:  # type: ignore[override]
        return super()._prepare_decode_tensors(**{**arguments, "use_native": True})

    def update_draft_decode_metadata(self, metadata: IndexerMetadata) -> None:
        """For the next draft token, in place: vLLM's V2 model runner has moved the lengths on."""
        stock: Any = super()
        with as_if_deep_gemm(False):
            stock.update_draft_decode_metadata(metadata)

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
    """In place of vLLM's SparseAttnIndexer: scores and selects, in bounded memory."""

    def __init__(self, vllm_config: Any, stock: Any, cache: IndexerCache) -> None:
        """`stock` is the SparseAttnIndexer that DeepSeek V4's indexer has built."""
        super().__init__()
        self.k_cache = cache
        self.top_k = stock.topk_tokens
        self.top_k_indices = stock.topk_indices_buffer
        self.columns = columns(vllm_config, cache.compress_ratio)
        speculative = vllm_config.speculative_config
        self.most_keys = keys_at_once(vllm_config, cache.compress_ratio) + SLACK
        self.next_n = 1 + (speculative.num_speculative_tokens if speculative else 0)
        scheduler = vllm_config.scheduler_config
        self.most_rows = max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs * self.next_n)
        self.one_pass = in_one_pass()
        self.in_order = batch_invariant()
        self.mqa_logits = providers.implementation("mqa_logits")
        self.paged_mqa_logits = providers.implementation("paged_mqa_logits")
        # DeepGEMM allocates its scores itself.
        scoring = ("mqa_logits", "paged_mqa_logits")
        self.allocating = {op for op in scoring if providers.chosen(op).name != "triton"}

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
            last; rows of this batch's tokens are written. Their order is any; with
            VLLM_BATCH_INVARIANT the last position comes first.
        """
        metadata = current_metadata()
        selected = self.top_k_indices[: hidden_states.shape[0], : self.top_k]
        if metadata is None:
            self._reserve()
            self._put_in_order(selected)
            return self.top_k_indices
        mine = metadata[self.k_cache.prefix]
        self.top_k_indices[: hidden_states.shape[0]] = -1
        cache = self.k_cache.kv_cache
        if mine.num_prefills:
            if self.one_pass:
                self._prefill_in_one_pass(cache.unsqueeze(2), q_quant, weights, mine.prefill_rows)
            else:
                self._prefill(cache, q_quant, weights, mine.prefill.chunks)
        if mine.num_decode_tokens:
            self._decode(cache.unsqueeze(2), q_quant, weights, mine)
        self._put_in_order(selected)
        return self.top_k_indices

    def _put_in_order(self, selected: torch.Tensor) -> None:
        """Selection leaves positions in the order in which its threads met; attention sums so."""
        if self.in_order:
            selected.copy_(selected.sort(1, descending=True).values)

    def _rows_at_once(self) -> int:
        """Rows of decode scores that the cap allows, at least one."""
        return max(1, max_logits_bytes() // (SCORE_BYTES * self.columns))

    def _take(
        self, op: str, keys: int, scores: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys e4m3 [keys, 128], their scales uint8 [keys, 4], fp32 `scores` for the op's out."""
        keys_and_scales = (
            ((keys, HEAD_DIM), torch.float8_e4m3fn),
            ((keys, SCALE_BYTES), torch.uint8),
        )
        if op in self.allocating:
            buffers = workspace(*keys_and_scales)
            return buffers[0], buffers[1], None
        buffers = workspace(*keys_and_scales, (scores, torch.float32))
        return buffers[0], buffers[1], buffers[2]

    def _reserve(self) -> None:
        """In the profile run: take what the largest batch will take."""
        # Rows times keys stay below the cap, but for what is least: one row, or one request's.
        least = max(self.most_keys, self.next_n * self.columns)
        capped = max(max_logits_bytes() // SCORE_BYTES, least)
        scores = min(self.most_rows * self.most_keys, capped)
        ops = ("paged_mqa_logits",) if self.one_pass else ("mqa_logits", "paged_mqa_logits")
        for op in ops:
            self._take(op, 0 if self.one_pass else self.most_keys, (1, scores))
        if self.one_pass or self.allocating:
            # Taken and given back by each call.
            device = self.top_k_indices.device
            torch.empty(max_logits_bytes(), dtype=torch.uint8, device=device)

    def _prefill(
        self, cache: torch.Tensor, q: torch.Tensor, weights: torch.Tensor, chunks: Any
    ) -> None:
        for chunk in chunks:
            tokens = slice(chunk.token_start, chunk.token_end)
            count = chunk.total_seq_lens
            # Keys and scales come first in the buffer: with as many of them in all of a request's
            # chunks they stay where its first chunk, which alone gathers, has put them.
            keys, scales, scores = self._take(
                "mqa_logits", count, (tokens.stop - tokens.start, count)
            )
            if not chunk.skip_kv_gather:
                gather_keys(cache, chunk, keys, scales)
            logits = self.mqa_logits(
                q[tokens],
                keys,
                scales.view(torch.float32).squeeze(-1),
                weights[tokens],
                chunk.cu_seqlen_ks,
                chunk.cu_seqlen_ke,
                out=scores,
            )
            top_k = self.top_k_indices[tokens, : self.top_k]
            top_k_of_prefill(logits, chunk.cu_seqlen_ks, chunk.cu_seqlen_ke, top_k)

    def _prefill_in_one_pass(
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
                out=self._take("paged_mqa_logits", 0, (len(weights[tokens]), self.columns))[2],
            )
            top_k = self.top_k_indices[tokens, : self.top_k]
            top_k_of_decode(scores, next_n, decode.seq_lens[some], top_k)

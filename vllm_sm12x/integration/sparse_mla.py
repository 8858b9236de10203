# SPDX-License-Identifier: Apache-2.0
"""TRITON_MLA_SPARSE: DeepSeek V4's attention layer on `vllm_sm12x.ops.sparse_mla`.

Cache writes, metadata and most projections stay vLLM's. On SM12x the indexer's selection and the
grouped output projection, which vLLM gives to DeepGEMM, are ours too.

Decode, speculative decode (several tokens of one request) and prefill all read the packed paged
caches through the same kernel; a batch of both makes two calls, decodes first, as vLLM orders it.
Where a prefill's tokens share their compressed rows, the call unpacks these first.

Where our fp8_einsum multiplies the attention's output by wo_a, the attention leaves what that
multiplies: e4m3 values and scales, without RoPE, in the memory that vLLM made for rows of bf16. An
op of vLLM makes these of the bf16 rows else, which it reads and writes once more.
"""

import dataclasses
from typing import Any

import torch

from vllm_sm12x import knobs
from vllm_sm12x.integration import providers, selection, unpacked_rows
from vllm_sm12x.integration.candidate_limits import COMPRESS_RATIOS, candidate_limits
from vllm_sm12x.integration.dump import dump_and_abort
from vllm_sm12x.integration.indexer import IndexerCache, SparseIndexer, as_if_deep_gemm
from vllm_sm12x.integration.launch_variants import launch_policy
from vllm_sm12x.ops import sparse_mla
from vllm_sm12x.ops.fp8_ds_mla import HEAD_DIM
from vllm_sm12x.ops.fp8_einsum.config import SCALE_BLOCK
from vllm_sm12x.vllm_api.fp8_linear import scale_of
from vllm_sm12x.vllm_api.sparse_mla import (
    BUILDER_GIVES_PREFILL_SLOTS,
    BreakableAttention,
    DeepseekSparseSWABackend,
    DeepseekSparseSWAMetadata,
    DeepseekSparseSWAMetadataBuilder,
    DeepseekV4FlashMLABackend,
    DeepseekV4SWACache,
    current_metadata,
    inverse_rope_and_quantize,
    window_slots,
)

# The instantiations of fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert in vLLM 0.23 to 0.33.
INSERT_OP_HEADS = (8, 16, 32, 64, 128)


class TritonMlaSparseBackend(DeepseekV4FlashMLABackend):
    """Metadata, cache layout and capabilities; the layer below is what runs."""

    @staticmethod
    def get_name() -> str:
        return selection.NAME

    @staticmethod
    def get_impl_cls() -> type[Any]:
        raise NotImplementedError(
            f"{selection.NAME} serves {' and '.join(selection.SERVED_ARCHITECTURES)} only, through "
            "a layer of their own; choose another --attention-backend for this model."
        )

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return capability.major >= 8


@dataclasses.dataclass
class WindowMetadata(DeepseekSparseSWAMetadata):
    """vLLM's sliding-window metadata, and what the kernel needs besides.

    Attributes:
        prefill_swa_indices: int32 [prefill tokens, 1, window], global slots.
        prefill_swa_lens: int32 [prefill tokens].
        candidate_limits: compress ratio -> int32 [tokens], the compressed rows that a token sees;
            0 for a padded token, which finds another step's positions in the shared top-k buffer.
        prefill_rows: compress ratio -> the compressed rows of the prefills' requests.
        prefill_request_ids: int32 [prefill tokens], place of the request among the prefills.
    """

    prefill_swa_indices: torch.Tensor | None = None
    prefill_swa_lens: torch.Tensor | None = None
    candidate_limits: dict[int, torch.Tensor] | None = None
    prefill_rows: dict[int, unpacked_rows.PrefillRows] = dataclasses.field(default_factory=dict)
    prefill_request_ids: torch.Tensor | None = None


class WindowMetadataBuilder(DeepseekSparseSWAMetadataBuilder):
    """Builds `WindowMetadata` in buffers whose addresses a CUDA graph may keep."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        tokens = self.vllm_config.scheduler_config.max_num_batched_tokens
        self.candidate_limits = {
            ratio: torch.zeros(tokens, dtype=torch.int32, device=self.device)
            for ratio in COMPRESS_RATIOS
        }
        if not BUILDER_GIVES_PREFILL_SLOTS:
            self.window_indices = torch.zeros(
                tokens, 1, self.window_size, dtype=torch.int32, device=self.device
            )
            self.window_lens = torch.zeros(tokens, dtype=torch.int32, device=self.device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any
    ) -> WindowMetadata:
        stock = super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)
        metadata = WindowMetadata(**vars(stock))
        metadata.candidate_limits = candidate_limits(metadata, self.candidate_limits)
        if metadata.num_prefills:
            self._add_prefills(metadata, common_attn_metadata)
        return metadata

    def _add_prefills(self, metadata: WindowMetadata, common: Any) -> None:
        decodes = metadata.num_decode_tokens
        prefill = slice(decodes, decodes + metadata.num_prefill_tokens)
        if not BUILDER_GIVES_PREFILL_SLOTS:
            window_slots(metadata, self.window_size, self.window_indices, self.window_lens)
            metadata.prefill_swa_indices = self.window_indices[prefill]
            metadata.prefill_swa_lens = self.window_lens[prefill]
        longest, lens = common.max_seq_len, common.seq_lens_cpu_upper_bound
        if lens is not None:
            first = metadata.num_decodes
            longest = int(lens[first : first + metadata.num_prefills].max())
        metadata.prefill_rows = unpacked_rows.prefill_rows(metadata, longest)
        requests: Any = metadata.token_to_req_indices
        metadata.prefill_request_ids = requests[prefill] - metadata.num_decodes

    def update_draft_decode_metadata(self, metadata: WindowMetadata) -> None:
        """For the next draft token, in place: vLLM's V2 model runner has moved the lengths on."""
        stock: Any = super()
        stock.update_draft_decode_metadata(metadata)
        metadata.candidate_limits = candidate_limits(metadata, self.candidate_limits)

    def build_tile_scheduler(self, num_decode_tokens: int) -> dict[str, Any]:
        # FlashMLA's schedules; asked for no tokens, vLLM gives a plan of none.
        return super().build_tile_scheduler(0)


class WindowBackend(DeepseekSparseSWABackend):
    """vLLM's sliding-window cache with our metadata builder."""

    @staticmethod
    def get_builder_cls() -> type[WindowMetadataBuilder]:
        return WindowMetadataBuilder


class WindowCache(DeepseekV4SWACache):
    """The sliding-window cache of one layer."""

    def get_attn_backend(self) -> type[WindowBackend]:
        return WindowBackend


def _take_over_selection(indexer: Any, vllm_config: Any) -> None:
    """Give vLLM's DeepseekV4Indexer our selection, and its cache our metadata builder."""
    stock = indexer.k_cache
    del vllm_config.compilation_config.static_forward_context[stock.prefix]
    indexer.k_cache = IndexerCache(
        head_dim=stock.head_dim,
        dtype=stock.dtype,
        prefix=stock.prefix,
        cache_config=stock.cache_config,
        compress_ratio=stock.compress_ratio,
    )
    indexer.indexer_op = SparseIndexer(vllm_config, indexer.indexer_op, indexer.k_cache)


def quantized_rows(o: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of e4m3 and their scales, in the memory of a token's rows of bf16.

    Args:
        o: bf16 [T, heads, 512], a token's rows one after the other.

    Returns:
        e4m3 [T, heads, 512] in the first half of the memory of each token, and behind them fp32
        [T, heads, 4].
    """
    tokens, heads, _ = o.shape
    rows = o.view(tokens, heads * HEAD_DIM)
    values = rows.view(torch.float8_e4m3fn)[:, : heads * HEAD_DIM]
    scales = rows.view(torch.float32)[:, heads * HEAD_DIM // 4 :]
    scales = scales[:, : heads * HEAD_DIM // SCALE_BLOCK]
    return values.unflatten(1, (heads, -1)), scales.unflatten(1, (heads, -1))


class TritonMlaSparseAttention(BreakableAttention):
    """A DeepSeek V4 attention layer whose sparse MLA runs in Triton."""

    backend_cls = TritonMlaSparseBackend

    def __init__(self, vllm_config: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        # Elsewhere, where VLLM_TRITON_MLA_SPARSE=1 asks for it, only the attention is ours.
        self.on_sm12x_path = providers.on_sm12x_path()
        if self.on_sm12x_path:
            with as_if_deep_gemm(True):
                super().__init__(vllm_config, prefix, *args, **kwargs)
            self.fp8_einsum: Any = providers.implementation("fp8_einsum")
            # DeepGEMM's takes scales as vLLM's op lays them out.
            self.quantizes_output = providers.chosen("fp8_einsum").name == "triton"
        else:
            super().__init__(vllm_config, prefix, *args, **kwargs)
            self.quantizes_output = False
        # The same cache under the same name, built by our metadata builder.
        stock = self.swa_cache_layer
        del vllm_config.compilation_config.static_forward_context[stock.prefix]
        self.swa_cache_layer = WindowCache(
            head_dim=stock.head_dim,
            window_size=stock.window_size,
            dtype=stock.dtype,
            prefix=stock.prefix,
            cache_config=stock.cache_config,
        )
        if self.on_sm12x_path and self.indexer is not None:
            _take_over_selection(self.indexer, vllm_config)
        self.policy = launch_policy()
        # Batch-invariant plans have splits, and sums in another order.
        self.unpacked_capacity = (
            0
            if self.policy.batch_invariant or self.compress_ratio <= 1
            else unpacked_rows.capacity(vllm_config.model_config.max_model_len)
        )
        self.dump_path = (
            knobs.get("VLLM_TRITON_MLA_SPARSE_DUMP_PATH")
            if knobs.get("VLLM_TRITON_MLA_SPARSE_DUMP")
            else None
        )

    @classmethod
    def get_padded_num_q_heads(cls, num_heads: int) -> int:
        """The buffers' head count: vLLM's cache-insert op, not our kernel, needs one of these."""
        for padded in INSERT_OP_HEADS:
            if 1 <= num_heads <= padded:
                return padded
        raise ValueError(
            f"{selection.NAME} takes 1 to {INSERT_OP_HEADS[-1]} query heads on a rank, "
            f"got {num_heads}."
        )

    def _o_proj(self, o: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Output projection of o, bf16 [tokens, heads, 512]: inverse RoPE, wo_a by group, wo_b."""
        wo_a: Any = self.wo_a
        scale = scale_of(wo_a)
        # A wo_a that is not quantized newer releases multiply in bf16, by torch.
        if not self.on_sm12x_path or scale is None:
            return super()._o_proj(o, positions)
        groups = self.n_local_groups
        if self.quantizes_output:
            values, scales = (
                rows.flatten(1).unflatten(1, (groups, -1)) for rows in quantized_rows(o)
            )
        else:
            values, scales = inverse_rope_and_quantize(
                o, positions, self.rotary_emb.cos_sin_cache, groups
            )
        weight, weight_scale = (
            tensor.unflatten(0, (groups, -1)) for tensor in (wo_a.weight, scale[1])
        )
        return self.wo_b(self.fp8_einsum(values, scales, weight, weight_scale).flatten(1))

    def forward_mqa(
        self, q: torch.Tensor, kv: torch.Tensor, positions: torch.Tensor, output: torch.Tensor
    ) -> None:
        """Attend; q and output are bf16 [tokens, padded heads, 512], kv is read from the caches.

        Where `_o_proj` multiplies by a quantized wo_a, output holds `quantized_rows` instead.
        """
        metadata = current_metadata()
        if metadata is None:
            if self.unpacked_capacity:
                unpacked_rows.reserve(self.unpacked_capacity)
            output.zero_()
            return
        window = metadata[self.swa_cache_layer.prefix]
        compressed = metadata.get(self.prefix)
        calls = []
        decodes = window.num_decode_tokens
        if decodes:
            calls.append((slice(0, decodes), window.decode_swa_indices, window.decode_swa_lens))
        if window.num_prefills:
            prefill = slice(decodes, decodes + window.num_prefill_tokens)
            calls.append((prefill, window.prefill_swa_indices, window.prefill_swa_lens))
        heads = slice(0, self.n_local_heads)
        arguments = [
            {
                "q": q[tokens, heads],
                "swa_cache": self.swa_cache_layer.kv_cache,
                "swa_indices": indices,
                "swa_lens": lens,
                **self._compressed_candidates(tokens, window, compressed),
                "sink": self.attn_sink[heads],
                "softmax_scale": self.scale,
                **self._result(output[tokens, heads], positions[tokens]),
            }
            for tokens, indices, lens in calls
        ]
        # Warm-up runs have no valid token, and are no request's.
        if self.dump_path and window.is_valid_token.any():
            dump_and_abort(self.dump_path, self.prefix, self.compress_ratio, arguments)
        for call in arguments:
            sparse_mla(**call, policy=self.policy)

    def _result(self, o: torch.Tensor, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        """Where sparse_mla leaves, in the memory of `o`, what `_o_proj` finds there."""
        if not self.quantizes_output or scale_of(self.wo_a) is None:
            return {"out": o}
        values, scales = quantized_rows(o)
        return {
            "out": values,
            "out_scale": scales,
            "positions": positions,
            "cos_sin_cache": self.rotary_emb.cos_sin_cache,
        }

    def _compressed_candidates(
        self, tokens: slice, window: Any, compressed: Any
    ) -> dict[str, torch.Tensor]:
        """The extra candidates of `tokens`, which are all of the decodes or all of the prefills."""
        ratio = self.compress_ratio
        if ratio <= 1:
            return {}
        decodes = tokens.start == 0 and window.num_decode_tokens > 0
        if ratio == 128 and decodes:
            return {
                "extra_cache": self.kv_cache,
                "extra_indices": compressed.c128a_global_decode_topk_indices,
                "extra_lens": compressed.c128a_decode_topk_lens,
            }
        # Positions within the request: top-k of the indexer (ratio 4), all of them (ratio 128).
        top_k: Any = self.topk_indices_buffer
        positions = top_k[tokens] if ratio == 4 else compressed.c128a_prefill_topk_indices
        candidates = {
            "extra_cache": self.kv_cache,
            "extra_indices": positions,
            "extra_lens": window.candidate_limits[ratio][tokens],
            "extra_block_table": compressed.block_table,
            "request_ids": window.token_to_req_indices[tokens],
        }
        if decodes:
            return candidates
        rows = window.prefill_rows[ratio]
        unpacked = unpacked_rows.room(
            rows,
            tokens=window.num_prefill_tokens,
            width=positions.shape[-1],
            capacity=self.unpacked_capacity,
        )
        if unpacked is None:
            return candidates
        prefills = slice(window.num_decodes, window.num_decodes + window.num_prefills)
        return candidates | {
            "extra_block_table": compressed.block_table[prefills],
            "request_ids": window.prefill_request_ids,
            "unpacked": unpacked,
            "unpacked_lens": rows.lens,
        }

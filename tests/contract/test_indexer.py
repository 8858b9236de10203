# SPDX-License-Identifier: Apache-2.0
"""The sparse indexer on vLLM's own metadata builder, against selection by plain loops."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.contract

RATIO, TOP_K, HEADS, BLOCK = 4, 16, 4, 64
COLUMNS = 512


@pytest.fixture(scope="module")
def module():
    pytest.importorskip("vllm", reason="the indexer works on vLLM's metadata")
    from vllm_sm12x.integration import indexer

    return indexer


class Requests:
    """Requests with caches and queries; `query_lens` new tokens each, decodes first."""

    def __init__(self, query_lens: list[int], contexts: list[int], seed: int = 0) -> None:
        gen = torch.Generator().manual_seed(seed)
        self.query_lens, self.contexts = query_lens, contexts
        blocks = [-(-(context // RATIO) // BLOCK) + 1 for context in contexts]
        self.table = torch.full((len(contexts), max(blocks) + 1), -1, dtype=torch.int32)
        free = torch.randperm(sum(blocks), generator=gen).int().split(blocks)
        for row, ids in zip(self.table, free, strict=True):
            row[: len(ids)] = ids
        keys = torch.randn(sum(blocks), BLOCK, 128, generator=gen).to(torch.float8_e4m3fn)
        self.keys = keys.float()
        self.scales = torch.exp2(torch.randint(-2, 3, (sum(blocks), BLOCK), generator=gen).float())
        packed = [keys.view(torch.uint8).flatten(1), self.scales.view(torch.uint8)]
        self.cache = torch.cat(packed, 1).view(-1, BLOCK, 132)
        tokens = sum(query_lens)
        self.q = torch.randn(tokens, HEADS, 128, generator=gen).to(torch.float8_e4m3fn)
        self.weights = torch.randn(tokens, HEADS, generator=gen)

    def common(self) -> SimpleNamespace:
        """What vLLM's runner gives a metadata builder."""
        starts = torch.tensor([0, *self.query_lens]).cumsum(0).int()
        lens = torch.tensor(self.contexts, dtype=torch.int32)
        return SimpleNamespace(
            num_reqs=len(self.contexts),
            num_actual_tokens=sum(self.query_lens),
            max_query_len=max(self.query_lens),
            max_seq_len=max(self.contexts),
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lens,
            seq_lens_cpu_upper_bound=lens,
            slot_mapping=torch.zeros(sum(self.query_lens), dtype=torch.int64),
            block_table_tensor=self.table,
            dcp_local_seq_lens=None,
            is_prefilling=None,
        )

    def selected(self) -> list[set[int]]:
        """The best TOP_K compressed keys of each token, by loops."""
        found, token = [], 0
        for request, (new, context) in enumerate(zip(self.query_lens, self.contexts, strict=True)):
            for position in range(context - new, context):
                seen = (position + 1) // RATIO
                scores = []
                for key in range(seen):
                    block = self.table[request, key // BLOCK]
                    dots = self.q[token].float() @ self.keys[block, key % BLOCK]
                    score = (dots.relu() * self.weights[token]).sum()
                    scores.append((score * self.scales[block, key % BLOCK]).item())
                best = sorted(range(seen), key=lambda key: -scores[key])
                found.append(set(best[:TOP_K]))
                token += 1
        return found


def builder(module: Any, *, speculative: int = 0) -> Any:
    """Our builder with what vLLM's constructor would have put in, but no GPU."""
    made = module.IndexerMetadataBuilder.__new__(module.IndexerMetadataBuilder)
    buffers = ("decode_lens_buffer", "decode_seq_lens_buffer", "expanded_seq_lens_buffer")
    for name in buffers:
        setattr(made, name, torch.zeros(64, dtype=torch.int32))
    made.compressed_slot_mapping_buffer = torch.zeros(64, dtype=torch.int64)
    made.expanded_block_table_buffer = torch.zeros(64, 8, dtype=torch.int32)
    made.scheduler_metadata_buffer = torch.zeros(133, 2, dtype=torch.int32)
    made.arange_buffer = made.offsets_buffer = torch.arange(64, dtype=torch.int32)
    made.num_speculative_tokens, made.use_flattening = speculative, False
    made.reorder_batch_threshold = made.decode_threshold = 1 + speculative
    made.compress_ratio, made.max_prefill_buffer_size = RATIO, 40 * 4096
    made.kv_cache_spec = SimpleNamespace(storage_block_size=BLOCK, block_size=BLOCK * RATIO)
    made.num_sms, made.use_pcp = 132, False
    made.dcp_world_size = made.pcp_world_size = 1
    made.dcp_rank, made.cp_kv_cache_interleave_size = 0, 1
    return made


@pytest.fixture
def select(module, monkeypatch):
    """Build metadata and select, with torch in place of vLLM's CUDA kernels."""
    from vllm_sm12x.vllm_api import indexer as api

    stock = api.builder_module
    monkeypatch.setattr(stock, "get_compressed_slot_mapping", lambda *args, **kwargs: None)
    monkeypatch.setattr(stock, "build_prefill_chunk_metadata", lambda *args, **kwargs: None)
    monkeypatch.setattr(stock, "has_deep_gemm", lambda: module.has_deep_gemm(lambda: True))

    def top_k_of_decode(scores, next_n, lens, indices):
        for row, limit, out in zip(scores, lens.flatten().tolist(), indices, strict=True):
            assert limit >= 0, "vLLM's kernel would write before its row"
            best = row[:limit].topk(min(TOP_K, limit)).indices
            out[: len(best)] = best

    monkeypatch.setattr(module, "top_k_of_decode", top_k_of_decode)
    monkeypatch.setattr(
        module, "workspace", lambda *specs: [torch.empty(s, dtype=t) for s, t in specs]
    )

    def run(requests: Requests, *, speculative: int = 0, cap: int = 2**20, padding: int = 0):
        monkeypatch.setattr(module, "max_logits_bytes", lambda: cap)
        metadata = builder(module, speculative=speculative).build(0, requests.common())
        monkeypatch.setattr(module, "current_metadata", lambda: {"k_cache": metadata})
        tokens = sum(requests.query_lens) + padding
        top_k_indices = torch.full((tokens + 3, TOP_K), 7, dtype=torch.int32)
        layer = module.SparseIndexer(
            SimpleNamespace(
                speculative_config=SimpleNamespace(num_speculative_tokens=speculative),
                scheduler_config=SimpleNamespace(max_num_seqs=8),
            ),
            SimpleNamespace(
                topk_tokens=TOP_K,
                topk_indices_buffer=top_k_indices,
                max_model_len=COLUMNS,
                max_total_seq_len=4096,
            ),
            SimpleNamespace(prefix="k_cache", kv_cache=requests.cache, head_dim=132),
        )
        result = layer(torch.empty(tokens, 8), requests.q, None, requests.weights)
        assert result is top_k_indices
        assert (result[tokens:] == 7).all(), "rows of other tokens were written"
        return metadata, result[:tokens]

    return run


def assert_selected(rows: torch.Tensor, want: list[set[int]]) -> None:
    for row, chosen in zip(rows.tolist(), want, strict=True):
        found = [position for position in row if position >= 0]
        assert len(found) == len(set(found)) and set(found) == chosen


BATCHES = {
    "decodes": Requests([1, 1, 1], [300, 7, 3]),
    "prefills": Requests([70, 5], [70, 400]),
    "both": Requests([1, 1, 40], [90, 1000, 130]),
    "a prompt too short to have a compressed key": Requests([3, 9], [3, 9]),
}


@pytest.mark.parametrize("name", BATCHES)
def test_selects_what_loops_select(select, name):
    metadata, rows = select(BATCHES[name])
    assert_selected(rows, BATCHES[name].selected())
    assert metadata.num_decodes == BATCHES[name].query_lens.count(1)


def test_speculative_rows_stay_with_their_request(select):
    requests = Requests([3, 3, 20], [40, 333, 60])
    metadata, rows = select(requests, speculative=2)
    assert metadata.decode.seq_lens.shape == (2, 3), "one block table row for three query rows"
    assert_selected(rows, requests.selected())


def test_requests_that_pad_a_batch_change_nothing(select):
    requests = Requests([3, 3, 0, 0], [40, 333, 0, 0])
    metadata, rows = select(requests, speculative=2, padding=6)
    assert metadata.decode.seq_lens.min() == 0
    assert_selected(rows[:6], requests.selected())
    assert (rows[6:] == -1).all()


@pytest.mark.parametrize("rows_at_once", [1, 2, 4])
def test_scores_of_decodes_stay_below_the_cap(select, monkeypatch, module, rows_at_once):
    sizes = []

    def workspace(*specs):
        sizes.extend(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in specs)
        return [torch.empty(shape, dtype=dtype) for shape, dtype in specs]

    monkeypatch.setattr(module, "workspace", workspace)
    requests = Requests([1] * 5, [300, 7, 3, 99, 1200])
    _, rows = select(requests, cap=4 * COLUMNS * rows_at_once)
    assert_selected(rows, requests.selected())
    assert max(sizes) <= 4 * COLUMNS * rows_at_once and len(sizes) == -(-5 // rows_at_once)


def test_no_schedule_is_asked_of_deep_gemm(select, monkeypatch, module):
    from vllm_sm12x.vllm_api import indexer as api

    def refuse(*args):
        raise AssertionError("asked")

    monkeypatch.setattr(api.builder_module, "get_paged_mqa_logits_metadata", refuse)
    select(BATCHES["decodes"])
    assert module.has_deep_gemm(lambda: "stock") == "stock", "others hear vLLM's own answer"

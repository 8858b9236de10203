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

    def scores(self) -> list[list[float]]:
        """The score of each compressed key that a token sees, by loops."""
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
                found.append(scores)
                token += 1
        return found


def builder(module: Any, *, speculative: int = 0) -> Any:
    """Our builder with what vLLM's constructor would have put in, but no GPU."""
    made = module.IndexerMetadataBuilder.__new__(module.IndexerMetadataBuilder)
    buffers = ("decode_lens", "per_req_decode_lens", "decode_seq_lens", "expanded_seq_lens")
    for name in buffers:
        setattr(made, f"{name}_buffer", torch.zeros(64, dtype=torch.int32))
    made.compressed_slot_mapping_buffer = torch.zeros(64, dtype=torch.int64)
    made.scheduler_metadata_buffer = torch.zeros(133, 2, dtype=torch.int32)
    made.arange_buffer = made.offsets_buffer = torch.arange(64, dtype=torch.int32)
    made.num_speculative_tokens, made.use_flattening = speculative, False
    made.reorder_batch_threshold = made.decode_threshold = 1 + speculative
    made.compress_ratio, made.max_prefill_buffer_size = RATIO, COLUMNS
    made.kv_cache_spec = SimpleNamespace(
        storage_block_size=BLOCK, num_states=BLOCK, block_size=BLOCK * RATIO
    )
    made.vllm_config = SimpleNamespace(
        speculative_config=None, compilation_config=SimpleNamespace(cudagraph_mode=None)
    )
    made.kernel_block_size = made.kv_cache_spec.block_size
    made.num_sms, made.use_pcp, made.supports_varlen, made.tp_size = 132, False, False, 1
    made.compressed_cp_interleave_size = 1
    made.one_pass = module.in_one_pass()
    made.dcp_world_size = made.pcp_world_size = 1
    made.dcp_rank, made.cp_kv_cache_interleave_size = 0, 1
    return made


def prefill_chunk(first, last, starts, starts_cpu, lens, compressed, compressed_cpu, table, ratio,
                  query_slice, skip_kv_gather, **unused):  # fmt: skip
    """vLLM's build_prefill_chunk_metadata, whose kernel needs a GPU, by loops."""
    counts = [int(lens[r]) // ratio for r in range(first, last)]
    if sum(counts) == 0:
        return None
    ks, ke = [], []
    for r in range(first, last):
        start, new = sum(counts[: r - first]), int(starts[r + 1] - starts[r])
        for token in range(new):
            ks.append(start)
            ke.append(start + (int(lens[r]) - new + token + 1) // ratio)
    token_start = int(starts[first])
    return SimpleNamespace(
        block_table=table[first:last],
        cu_seqlen_ks=torch.tensor(ks[query_slice], dtype=torch.int32),
        cu_seqlen_ke=torch.tensor(ke[query_slice], dtype=torch.int32),
        cu_seq_lens=torch.tensor([0, *counts]).cumsum(0).int(),
        total_seq_lens=sum(counts),
        token_start=token_start + query_slice.start,
        token_end=token_start + query_slice.stop,
        skip_kv_gather=skip_kv_gather,
    )


def gather_keys(cache, chunk, keys, scales):
    """vLLM's cp_gather_indexer_k_quant_cache, by loops."""
    values = cache.flatten(1)[:, : BLOCK * 128].view(-1, BLOCK, 128)
    their_scales = cache.flatten(1)[:, BLOCK * 128 :].view(-1, BLOCK, 4)
    for r, (start, end) in enumerate(chunk.cu_seq_lens.unfold(0, 2, 1).tolist()):
        for key in range(end - start):
            block = chunk.block_table[r, key // BLOCK]
            keys.view(torch.uint8)[start + key] = values[block, key % BLOCK]
            scales[start + key] = their_scales[block, key % BLOCK]


def top_k_of_prefill(logits, ks, ke, indices):
    for row, start, end, out in zip(logits, ks.tolist(), ke.tolist(), indices, strict=True):
        best = row[start:end].topk(min(TOP_K, end - start)).indices
        out[: len(best)] = best


MEMORY = torch.zeros(2**25, dtype=torch.uint8)


def workspace(*specs):
    """vLLM's shared workspace: one piece of memory, whoever asks."""
    taken, start = [], 0
    for shape, dtype in specs:
        size = torch.Size(shape).numel() * dtype.itemsize
        taken.append(MEMORY[start : start + size].view(dtype).view(shape))
        start += -(-size // 256) * 256
    return taken


@pytest.fixture(params=["0", "1"], ids=["two passes", "one pass"])
def select(request, module, monkeypatch):
    """Build metadata and select, with torch in place of vLLM's CUDA kernels."""
    from vllm_sm12x.vllm_api import indexer as api

    monkeypatch.setenv("VLLM_SM12X_ONE_PASS_TOP_K", request.param)
    stock = api.builder_module
    # A function of the module, since 0.32 of the class.
    owner, name = stock, "split_indexer_prefill_chunks"
    if not hasattr(owner, name):
        owner, name = stock.DeepseekV32IndexerMetadataBuilder, f"_{name}"
    split = getattr(owner, name)
    monkeypatch.setattr(stock, "get_compressed_slot_mapping", lambda *args, **kwargs: None)
    monkeypatch.setattr(stock, "build_prefill_chunk_metadata", prefill_chunk)
    monkeypatch.setattr(module, "gather_keys", gather_keys)
    monkeypatch.setattr(module, "top_k_of_prefill", top_k_of_prefill)
    monkeypatch.setattr(stock, "has_deep_gemm", lambda: module.has_deep_gemm(lambda: True))

    def top_k_of_decode(scores, next_n, lens, indices):
        for row, limit, out in zip(scores, lens.flatten().tolist(), indices, strict=True):
            assert limit >= 0, "vLLM's kernel would write before its row"
            best = row[:limit].topk(min(TOP_K, limit)).indices
            out[: len(best)] = best

    monkeypatch.setattr(module, "top_k_of_decode", top_k_of_decode)
    monkeypatch.setattr(module, "workspace", workspace)

    def run(requests: Requests, *, speculative: int = 0, cap: int = 2**20, padding: int = 0):
        monkeypatch.setattr(module, "max_logits_bytes", lambda: cap)

        def split_by_cap(lens, new, keys, _, **offset):
            return split(lens, new, keys, cap, **offset)

        by_class = owner is not stock
        monkeypatch.setattr(owner, name, staticmethod(split_by_cap) if by_class else split_by_cap)
        metadata = builder(module, speculative=speculative).build(0, requests.common())
        monkeypatch.setattr(module, "current_metadata", lambda: {"k_cache": metadata})
        tokens = sum(requests.query_lens) + padding
        top_k_indices = torch.full((tokens + 3, TOP_K), 7, dtype=torch.int32)
        layer = module.last = module.SparseIndexer(
            SimpleNamespace(
                speculative_config=SimpleNamespace(num_speculative_tokens=speculative),
                scheduler_config=SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=64),
                model_config=SimpleNamespace(max_model_len=COLUMNS * RATIO),
            ),
            SimpleNamespace(
                topk_tokens=TOP_K,
                topk_indices_buffer=top_k_indices,
            ),
            SimpleNamespace(prefix="k_cache", kv_cache=requests.cache, compress_ratio=RATIO),
        )
        result = layer(torch.empty(tokens, 8), requests.q, None, requests.weights)
        assert result is top_k_indices
        assert (result[tokens:] == 7).all(), "rows of other tokens were written"
        return metadata, result[:tokens]

    return run


def assert_selected(rows: torch.Tensor, requests: Requests) -> None:
    """Each row has the best of its scores; among equal ones (0 is frequent), any."""
    for row, scores in zip(rows.tolist(), requests.scores(), strict=True):
        found = [position for position in row if position >= 0]
        assert len(found) == len(set(found)) == min(TOP_K, len(scores))
        best = sorted(scores, reverse=True)[:TOP_K]
        got = sorted((scores[position] for position in found), reverse=True)
        assert got == pytest.approx(best, rel=1e-4, abs=1e-4)


def in_order(rows: torch.Tensor) -> bool:
    """Whether each row has its last position first, and -1 at its end."""
    return bool((rows.diff(dim=1) <= 0).all())


BATCHES = {
    "decodes": Requests([1, 1, 1], [300, 7, 3]),
    "prefills": Requests([70, 5], [70, 400]),
    "both": Requests([1, 1, 40], [90, 1000, 130]),
    "a prompt too short to have a compressed key": Requests([3, 9], [3, 9]),
}


@pytest.mark.parametrize("name", ["decodes", "prefills", "both"])
def test_a_selection_has_one_order_where_batches_must_not_matter(select, monkeypatch, name):
    _, rows = select(BATCHES[name])
    assert not in_order(rows)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    _, rows = select(BATCHES[name])
    assert in_order(rows)
    assert_selected(rows, BATCHES[name])


@pytest.mark.parametrize("name", BATCHES)
def test_selects_what_loops_select(select, name):
    metadata, rows = select(BATCHES[name])
    assert_selected(rows, BATCHES[name])
    assert metadata.num_decodes == BATCHES[name].query_lens.count(1)


def test_speculative_rows_stay_with_their_request(select):
    requests = Requests([3, 3, 20], [40, 333, 60])
    metadata, rows = select(requests, speculative=2)
    assert metadata.decode.seq_lens.shape == (2, 3), "one block table row for three query rows"
    assert_selected(rows, requests)


def test_requests_that_pad_a_batch_change_nothing(select):
    requests = Requests([3, 3, 0, 0], [40, 333, 0, 0])
    metadata, rows = select(requests, speculative=2, padding=6)
    assert metadata.decode.seq_lens.min() == 0
    assert_selected(rows[:6], requests)
    assert (rows[6:] == -1).all()


@pytest.mark.parametrize("rows_at_once", [1, 2, 4])
@pytest.mark.parametrize("query_lens", [[1] * 5, [17, 5, 20, 3, 14]], ids=["decodes", "prefills"])
def test_scores_stay_below_the_cap(select, monkeypatch, module, rows_at_once, query_lens):
    sizes = []

    def watched(*specs):
        sizes.extend(4 * torch.Size(shape).numel() for shape, t in specs if t is torch.float32)
        return workspace(*specs)

    monkeypatch.setattr(module, "workspace", watched)
    # One row of a list of one-pass selection takes 24,580 B.
    cap = rows_at_once * (24_580 if module.in_one_pass() else 4 * COLUMNS)
    requests = Requests(query_lens, [300, 7, 90, 99, 1200])
    _, rows = select(requests, cap=cap)
    assert_selected(rows, requests)
    assert max(sizes, default=0) <= cap
    if not module.in_one_pass():
        assert len(sizes) > 1, "all at once"


def test_the_profile_run_takes_what_serving_takes(select, monkeypatch, module):
    taken = []

    def watched(*specs):
        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in specs]
        taken.append(sum(-(-size // 256) * 256 for size in sizes))
        return workspace(*specs)

    monkeypatch.setattr(module, "workspace", watched)
    requests = Requests([64], [COLUMNS * RATIO])
    select(requests, cap=2**18)
    serving = max(taken, default=0)
    layer = module.last
    monkeypatch.setattr(module, "current_metadata", lambda: None)
    taken.clear()
    layer(torch.empty(64, 8), requests.q, None, requests.weights)
    assert serving <= max(taken)


@pytest.mark.parametrize("cap_mib", [256, 512])
@pytest.mark.parametrize(
    "max_model_len, batched", [(1_000_000, 2048), (500_000, 4096), (8192, 8192), (4096, 512)]
)
def test_no_chunk_that_vllm_can_plan_needs_more(
    module, monkeypatch, max_model_len, batched, cap_mib
):
    """Every number of keys, with as many rows as split_indexer_prefill_chunks then allows."""
    monkeypatch.setattr(module, "max_logits_bytes", lambda: cap_mib * 2**20)
    layer = module.SparseIndexer(
        SimpleNamespace(
            speculative_config=None,
            scheduler_config=SimpleNamespace(max_num_seqs=256, max_num_batched_tokens=batched),
            model_config=SimpleNamespace(max_model_len=max_model_len),
        ),
        SimpleNamespace(topk_tokens=512, topk_indices_buffer=torch.empty(1, 512)),
        SimpleNamespace(prefix="k_cache", compress_ratio=RATIO),
    )
    taken = []
    monkeypatch.setattr(
        module, "workspace", lambda *specs: taken.append(specs) or [None for _ in specs]
    )
    layer._reserve()
    keys_taken = max(specs[0][0][0] for specs in taken)
    scores_taken = max(specs[2][0][0] * specs[2][0][1] for specs in taken)
    most_keys = max(max_model_len // RATIO, 65_536) + 8
    keys = torch.arange(1, most_keys + 1)
    rows = (cap_mib * 2**20 // 4 // keys).clamp(1, batched)
    assert keys_taken >= most_keys
    assert int((rows * keys).max()) <= scores_taken <= cap_mib * 2**20 // 4
    decode_rows = min(256, max(1, cap_mib * 2**20 // (4 * (max_model_len // RATIO))))
    assert scores_taken >= decode_rows * (max_model_len // RATIO)


def test_no_schedule_is_asked_of_deep_gemm(select, monkeypatch, module):
    from vllm_sm12x.vllm_api import indexer as api

    def refuse(*args):
        raise AssertionError("asked")

    monkeypatch.setattr(api.builder_module, "get_paged_mqa_logits_metadata", refuse)
    select(BATCHES["decodes"])
    assert module.has_deep_gemm(lambda: "stock") == "stock", "others hear vLLM's own answer"

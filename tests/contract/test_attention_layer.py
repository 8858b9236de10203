# SPDX-License-Identifier: Apache-2.0
"""The attention layer on vLLM's own metadata, against dense attention over unpaged rows."""

import dataclasses
import itertools
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sm12x.demo.attention import PHASES, SWA_BLOCK, WINDOW, Batch, padded
from vllm_sm12x.integration.candidate_limits import candidate_limits
from vllm_sm12x.ops.sparse_mla.config import LaunchPolicy
from vllm_sm12x.ops.sparse_mla.spec import SPARSE_MLA

pytestmark = [
    pytest.mark.contract,
    pytest.mark.skipif(torch.cuda.is_available(), reason="has its tensors on the CPU"),
]

PADDING = 2  # tokens that a CUDA graph adds to a batch of decodes
GARBAGE = 2**31 - 1


@pytest.fixture(scope="module")
def layer_module():
    pytest.importorskip("vllm", reason="the layer is a subclass of vLLM's")
    from vllm_sm12x.integration import sparse_mla

    return sparse_mla


def layer_and_metadata(
    module: Any, batch: Batch, *, padding: int = 0, dump_path: str | None = None
):
    """A layer without its projections, and the metadata that vLLM's builders make of `batch`."""
    tokens = len(batch.tokens)
    decodes = batch.num_decode_tokens
    request_ids = torch.tensor([i for i, _ in batch.tokens] + [0] * padding, dtype=torch.int32)
    valid = torch.arange(tokens + padding) < tokens
    windows = [
        batch.window.slots(i, torch.arange(max(0, position - WINDOW + 1), position + 1))
        for i, position in batch.tokens
    ]
    indices = torch.cat([padded(windows, WINDOW), torch.full((padding, WINDOW), GARBAGE)]).int()
    lens = torch.tensor([len(slots) for slots in windows] + [0] * padding, dtype=torch.int32)
    split = decodes + padding
    window = module.WindowMetadata(
        block_table=batch.window.table,
        slot_mapping=torch.where(valid, 0, -1),
        block_size=SWA_BLOCK,
        is_valid_token=valid,
        token_to_req_indices=request_ids,
        decode_swa_indices=indices[:split].unsqueeze(1),
        decode_swa_lens=lens[:split],
        prefill_swa_indices=indices[split:].unsqueeze(1),
        prefill_swa_lens=lens[split:],
        num_decodes=len(batch.requests) - batch.num_prefills,
        num_decode_tokens=split,
        num_prefills=batch.num_prefills,
        num_prefill_tokens=tokens - decodes,
        candidate_limits={
            ratio: torch.tensor([(p + 1) // ratio for _, p in batch.tokens] + [0] * padding).int()
            for ratio in (4, 128)
        },
        **prefill_metadata(module, batch),
    )
    layer = module.TritonMlaSparseAttention.__new__(module.TritonMlaSparseAttention)
    torch.nn.Module.__init__(layer)
    layer.prefix, layer.compress_ratio = "layer", max(1, batch.ratio)
    layer.swa_cache_layer = SimpleNamespace(prefix="layer.swa_cache", kv_cache=batch.window.cache)
    layer.attn_sink = torch.nn.Parameter(batch.sink, requires_grad=False)
    layer.n_local_heads = len(batch.sink)
    layer.scale, layer.policy, layer.dump_path = 512**-0.5, LaunchPolicy(), dump_path
    layer.unpacked_capacity, layer.quantizes_output = 4096, False
    metadata: dict[str, Any] = {"layer.swa_cache": window}
    if batch.compressed is not None:
        layer.kv_cache = batch.compressed.cache
        width = max(512 if batch.ratio == 4 else 128, *map(len, batch.chosen))
        positions = torch.cat([padded(batch.chosen, width), torch.full((padding, width), GARBAGE)])
        slots = [
            batch.compressed.slots(i, rows)
            for (i, _), rows in zip(batch.tokens, batch.chosen, strict=True)
        ]
        counts = torch.tensor([len(rows) for rows in slots] + [0] * padding, dtype=torch.int32)
        slots = torch.cat([padded(slots, width), torch.full((padding, width), GARBAGE)]).int()
        layer.topk_indices_buffer = positions.int()
        metadata["layer"] = SimpleNamespace(
            block_table=batch.compressed.table,
            c128a_global_decode_topk_indices=slots[:split].unsqueeze(1),
            c128a_decode_topk_lens=counts[:split],
            c128a_prefill_topk_indices=positions[split:].int(),
        )
    return layer, metadata


def prefill_metadata(module: Any, batch: Batch) -> dict[str, Any]:
    """What our builder adds for the prefills of `batch`."""
    first = len(batch.requests) - batch.num_prefills
    lens = torch.tensor([r.length for r in batch.requests[first:]], dtype=torch.int32)
    if not len(lens):
        return {}
    owners = [i - first for i, _ in batch.tokens[batch.num_decode_tokens :]]
    stock = SimpleNamespace(num_decodes=0, num_prefills=len(lens), seq_lens=lens)
    return {
        "prefill_rows": module.unpacked_rows.prefill_rows(stock, int(lens.max())),
        "prefill_request_ids": torch.tensor(owners, dtype=torch.int32),
    }


def forward(module: Any, monkeypatch, batch: Batch, **options: Any) -> torch.Tensor:
    layer, metadata = layer_and_metadata(module, batch, **options)
    monkeypatch.setattr(module, "current_metadata", lambda: metadata)
    padding = options.get("padding", 0)
    q = torch.cat([batch.q, torch.full((padding, *batch.q.shape[1:]), math.nan)]).bfloat16()
    output = torch.full_like(q, math.nan)
    layer.forward_mqa(q, torch.empty(0), torch.empty(0), output)
    return output


class Projection:
    """A layer's output projection to one value for each head, of weights that are all one."""

    def __init__(self, module: Any, layer: Any, *, quantized: bool = True) -> None:
        heads = layer.n_local_heads
        scales = torch.ones(heads, 4) if quantized else None
        layer.wo_a = SimpleNamespace(weight=torch.ones(heads, 512), weight_scale_inv=scales)
        layer.wo_b = lambda projected: projected
        layer.fp8_einsum, layer.n_local_groups = self.einsum, heads
        layer.on_sm12x_path, layer.quantizes_output = True, True
        angles = torch.randn(3000, 32, generator=torch.Generator().manual_seed(0)) * 10
        self.cos_sin = torch.cat([angles.cos(), angles.sin()], 1)
        layer.rotary_emb = SimpleNamespace(cos_sin_cache=self.cos_sin)

    def einsum(self, a, a_scale, b, b_scale):
        self.multiplied = (a.float().unflatten(-1, (4, 128)) * a_scale[..., None]).flatten(-2)
        return torch.einsum("tgr,gdr->tgd", self.multiplied, b)

    def without_rope(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cos, sin = self.cos_sin[positions][:, None].chunk(2, -1)
        pairs = torch.view_as_complex(rows[..., 448:].unflatten(-1, (32, 2)).contiguous())
        pairs = torch.view_as_real(pairs * torch.complex(cos, -sin)).flatten(-2)
        return torch.cat([rows[..., :448], pairs], -1)


@pytest.mark.usefixtures("rounds_to_e4m3")
@pytest.mark.parametrize(
    "phase, heads, ratio",
    [*((phase, 64, 4) for phase in PHASES), (PHASES[2], 5, 128), (PHASES[2], 5, 0)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_attention_leaves_what_the_projection_multiplies(
    layer_module, monkeypatch, phase, heads, ratio
):
    batch = Batch(ratio, phase)
    layer, metadata = layer_and_metadata(layer_module, batch)
    layer.n_local_heads = heads
    projection = Projection(layer_module, layer)
    monkeypatch.setattr(layer_module, "current_metadata", lambda: metadata)
    # Heads that pad the buffers hold NaN, and nothing is to read or write them.
    positions = torch.tensor([position for _, position in batch.tokens])
    q = torch.full((len(positions), 64, 512), math.nan, dtype=torch.bfloat16)
    q[:, :heads] = batch.q[:, :heads]
    output = torch.full_like(q, math.nan)
    layer.forward_mqa(q, torch.empty(0), positions, output)
    layer._o_proj(output[:, :heads], positions)
    want = projection.without_rope(batch.dense()[:, :heads].float(), positions)
    assert (projection.multiplied - want).norm() <= 2**-4 * want.norm()
    assert output[:, heads:].isnan().all()


@pytest.mark.parametrize("provider", ["triton", "deep_gemm"])
def test_rows_stay_bf16_where_another_einsum_or_weights_of_bf16_want_them(
    layer_module, monkeypatch, provider
):
    batch = Batch(4, PHASES[1])
    layer, metadata = layer_and_metadata(layer_module, batch)
    Projection(layer_module, layer, quantized=provider == "deep_gemm")
    layer.quantizes_output = provider == "triton"
    asked = []

    def quantize(o, positions, cos_sin_cache, groups):
        asked.append(o)
        return o.float(), torch.ones(*o.shape[:2], 4)

    def stock(self, o, positions):
        asked.append(o)

    monkeypatch.setattr(layer_module, "current_metadata", lambda: metadata)
    monkeypatch.setattr(layer_module, "inverse_rope_and_quantize", quantize)
    monkeypatch.setattr(layer_module.BreakableAttention, "_o_proj", stock)
    output = torch.full_like(batch.q, math.nan)
    layer.forward_mqa(batch.q, torch.empty(0), torch.empty(0), output)
    layer._o_proj(output, torch.empty(0))
    (rows,) = asked
    want = batch.dense()
    assert (rows.double() - want).norm() / want.norm() <= SPARSE_MLA.tolerance


def test_vllm_is_told_that_batches_do_not_matter_and_says_when_they_must_not(
    layer_module, monkeypatch
):
    stock = layer_module.DeepseekV4FlashMLABackend
    assert not getattr(stock, "supports_batch_invariance", lambda: False)()
    assert layer_module.TritonMlaSparseBackend.supports_batch_invariance()
    for value in (False, True):
        monkeypatch.setenv("VLLM_BATCH_INVARIANT", f"{value:d}")
        assert layer_module.launch_policy().batch_invariant is value


@pytest.mark.parametrize("ratio", [0, 4, 128])
@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
def test_layer_is_dense_attention(layer_module, monkeypatch, ratio, phase):
    batch = Batch(ratio, phase)
    want = batch.dense()
    got = forward(layer_module, monkeypatch, batch).double()
    assert (got - want).norm() / want.norm() <= SPARSE_MLA.tolerance


@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("phase", [p for p in PHASES if p.prefills], ids=lambda phase: phase.name)
def test_prefills_that_unpack_their_rows_are_dense_attention(
    layer_module, monkeypatch, ratio, phase
):
    unpacked_rows, taken = layer_module.unpacked_rows, []

    def workspace(spec):
        taken.append(torch.full(spec[0], math.nan, dtype=spec[1]))
        return taken[-1:]

    monkeypatch.setattr(unpacked_rows, "workspace", workspace)
    monkeypatch.setattr(unpacked_rows, "unpacks", lambda tokens, width, rows: rows > 0)
    batch = Batch(ratio, phase)
    want = batch.dense()
    got = forward(layer_module, monkeypatch, batch).double()
    assert (got - want).norm() / want.norm() <= SPARSE_MLA.tolerance
    longest = max(request.length for request in phase.prefills)
    shapes = [tuple(buffer.shape) for buffer in taken]
    assert shapes == [(len(phase.prefills), longest // ratio, 512)] * (longest >= ratio)


def test_rows_are_unpacked_where_it_pays_and_there_is_room(layer_module, monkeypatch):
    unpacked_rows = layer_module.unpacked_rows
    monkeypatch.setattr(unpacked_rows, "workspace", lambda spec: [spec[0]])
    rows = unpacked_rows.PrefillRows(1000, torch.tensor([1000, 3], dtype=torch.int32))
    many = {"tokens": 300, "width": 512, "capacity": 2000}
    assert unpacked_rows.room(rows, **many) == (2, 1000, 512)
    assert unpacked_rows.room(rows, **many | {"capacity": 1999}) is None
    assert unpacked_rows.room(rows, **many | {"width": 26}) is None, "each is read thrice"
    assert unpacked_rows.room(rows, **many | {"tokens": 255}) is None
    with unpacked_rows.packed_only():
        assert unpacked_rows.room(rows, **many) is None
    none = unpacked_rows.PrefillRows(0, torch.tensor([0, 0], dtype=torch.int32))
    assert unpacked_rows.room(none, **many) is None
    assert unpacked_rows.capacity(1_048_576) == 2**18 and unpacked_rows.capacity(8192) == 4096


def test_vllm_gives_its_builders_the_lengths_that_ours_reads(layer_module):
    from vllm.v1.attention.backend import CommonAttentionMetadata

    names = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
    assert {"max_seq_len", "seq_lens_cpu_upper_bound"} <= names


def test_the_builder_limits_each_token_to_the_rows_that_it_sees(layer_module, monkeypatch):
    """Two decoding requests of two tokens, a prefill of three, two padded tokens."""
    starts, lens = [0, 2, 4, 7], [5, 1029, 130]
    valid = torch.tensor([True] * 7 + [False] * 2)
    stock = layer_module.DeepseekSparseSWAMetadata(
        block_table=torch.zeros(3, 4, dtype=torch.int32),
        slot_mapping=torch.zeros(9, dtype=torch.int64),
        block_size=SWA_BLOCK,
        seq_lens=torch.tensor(lens, dtype=torch.int32),
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        is_valid_token=valid,
        token_to_req_indices=torch.tensor([0, 0, 1, 1, 2, 2, 2, 250, 250], dtype=torch.int32),
        num_decodes=2,
        num_decode_tokens=4,
        num_prefills=1,
        num_prefill_tokens=3,
    )
    base = layer_module.DeepseekSparseSWAMetadataBuilder
    monkeypatch.setattr(base, "build", lambda self, common_prefix_len, common: stock)
    builder = layer_module.WindowMetadataBuilder.__new__(layer_module.WindowMetadataBuilder)
    builder.candidate_limits = {ratio: torch.full((64,), GARBAGE).int() for ratio in (4, 128)}
    # Where vLLM's builder gives prefills no slots of their window, ours does, by vLLM's kernel.
    monkeypatch.setattr(layer_module, "window_slots", lambda *arguments: None)
    builder.window_size, builder.window_indices, builder.window_lens = WINDOW, valid, valid
    upper_bound = torch.tensor([6, 2000, 131], dtype=torch.int32)
    common = SimpleNamespace(max_seq_len=1029, seq_lens_cpu_upper_bound=upper_bound)
    metadata = builder.build(0, common)
    assert {r: (most, lens.tolist()) for r, (most, lens) in metadata.prefill_rows.items()} == {
        4: (32, [32]), 128: (1, [1]),
    }  # fmt: skip
    assert metadata.prefill_request_ids.tolist() == [0, 0, 0]
    common.seq_lens_cpu_upper_bound = None
    assert builder.build(0, common).prefill_rows[4].most == 1029 // 4
    limits = metadata.candidate_limits
    positions = [3, 4, 1027, 1028, 127, 128, 129]
    for ratio in (4, 128):
        assert limits[ratio].tolist() == [(p + 1) // ratio for p in positions] + [0, 0]
        assert limits[ratio].data_ptr() == builder.candidate_limits[ratio].data_ptr()


@settings(max_examples=30, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 300), st.integers(0, 140_000)), min_size=1),
    padding=st.integers(0, 300),
)
def test_limits_of_any_batch(requests, padding):
    """Requests of (query tokens, tokens before them), and padded tokens of a request long gone."""
    queries = [query for query, _ in requests]
    seen = [before + 1 + i for query, before in requests for i in range(query)]
    owner = [request for request, query in enumerate(queries) for _ in range(query)]
    tokens = len(owner) + padding
    metadata = SimpleNamespace(
        seq_lens=torch.tensor([sum(request) for request in requests], dtype=torch.int32),
        query_start_loc=torch.tensor([0, *itertools.accumulate(queries)], dtype=torch.int32),
        token_to_req_indices=torch.tensor(owner + [9999] * padding, dtype=torch.int32),
        is_valid_token=torch.arange(tokens) < len(owner),
    )
    buffers = {ratio: torch.full((tokens + 5,), GARBAGE).int() for ratio in (4, 128)}
    limits = candidate_limits(metadata, buffers)
    for ratio, buffer in buffers.items():
        assert limits[ratio].tolist() == [n // ratio for n in seen] + [0] * padding
        assert (buffer[tokens:] == GARBAGE).all()


@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_padded_decodes_read_nothing_and_change_nothing(layer_module, monkeypatch, ratio):
    batch = Batch(ratio, PHASES[1])
    plain = forward(layer_module, monkeypatch, batch)
    padded = forward(layer_module, monkeypatch, batch, padding=PADDING)
    torch.testing.assert_close(padded[:-PADDING], plain, rtol=2e-2, atol=1e-2)


def test_profile_run_gives_zeros_and_has_room_for_rows(layer_module, monkeypatch):
    layer, _ = layer_and_metadata(layer_module, Batch(4, PHASES[1]))
    monkeypatch.setattr(layer_module, "current_metadata", lambda: None)
    taken = []
    monkeypatch.setattr(layer_module.unpacked_rows, "workspace", taken.append)
    output = torch.full((4, 64, 512), math.nan, dtype=torch.bfloat16)
    layer.forward_mqa(torch.empty_like(output), torch.empty(0), torch.empty(0), output)
    assert (output == 0).all()
    assert taken == [((layer.unpacked_capacity, 512), torch.bfloat16)]


def test_dump_describes_a_request_and_aborts(layer_module, monkeypatch, tmp_path):
    from vllm_sm12x.integration.dump import DumpedAndAborted

    path = tmp_path / "dump.jsonl"
    batch = Batch(4, PHASES[2])
    layer, metadata = layer_and_metadata(layer_module, batch, dump_path=str(path))
    Projection(layer_module, layer)
    monkeypatch.setattr(layer_module, "current_metadata", lambda: metadata)
    positions = torch.tensor([position for _, position in batch.tokens])
    with pytest.raises(DumpedAndAborted, match=f"(?s)written to {path}.*ending the engine"):
        layer.forward_mqa(batch.q, torch.empty(0), positions, torch.empty_like(batch.q))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["call"] for line in lines} == {0, 1}, "decodes and prefills"
    first = {line["tensor"]: line for line in lines if line["call"] == 0}
    assert first["q"]["shape"] == [4, 64, 512] and first["q"]["dtype"] == "bfloat16"
    assert first["swa_cache"]["strides"] == list(batch.window.cache.stride())
    assert first["swa_lens"]["max"] == WINDOW
    assert first["out"]["dtype"] == "float8_e4m3fn" and "max" not in first["out"]
    assert first["positions"]["max"] == int(positions[:4].max())
    assert first["extra_indices"]["max"] == max(int(rows.max()) for rows in batch.chosen[:4])


def test_warm_up_is_no_request(layer_module, monkeypatch, tmp_path):
    """vLLM warms the layer up with tokens that are all padding; a dump then would end the start."""
    path = tmp_path / "dump.jsonl"
    batch = Batch(0, PHASES[1])
    layer, metadata = layer_and_metadata(layer_module, batch, dump_path=str(path))
    window = metadata["layer.swa_cache"]
    window.is_valid_token = torch.zeros_like(window.is_valid_token)
    monkeypatch.setattr(layer_module, "current_metadata", lambda: metadata)
    layer.forward_mqa(batch.q, torch.empty(0), torch.empty(0), torch.empty_like(batch.q))
    assert not path.exists()


@pytest.mark.parametrize("heads, padded", [(1, 8), (4, 8), (8, 8), (9, 16), (64, 64), (65, 128)])
def test_buffers_have_a_head_count_of_vllms_insert_op(layer_module, heads, padded):
    """vLLM's C++ op that inserts rows and pads queries is compiled for 8, 16, 32, 64 and 128."""
    assert layer_module.TritonMlaSparseAttention.get_padded_num_q_heads(heads) == padded


def test_heads_that_pad_the_buffers_are_left_alone(layer_module, monkeypatch):
    batch = Batch(4, PHASES[1])
    want = batch.dense()[:, :5]
    layer, metadata = layer_and_metadata(layer_module, batch)
    layer.n_local_heads = 5
    monkeypatch.setattr(layer_module, "current_metadata", lambda: metadata)
    q = batch.q[:, :8].clone()
    q[:, 5:] = math.nan
    output = torch.full_like(q, math.nan)
    layer.forward_mqa(q, torch.empty(0), torch.empty(0), output)
    assert (output[:, :5].double() - want).norm() / want.norm() <= SPARSE_MLA.tolerance
    assert output[:, 5:].isnan().all()


@pytest.mark.parametrize("heads", [0, 129])
def test_head_counts_beyond_the_kernel_are_refused(layer_module, heads):
    with pytest.raises(ValueError, match=f"1 to 128 query heads on a rank, got {heads}"):
        layer_module.TritonMlaSparseAttention.get_padded_num_q_heads(heads)

# SPDX-License-Identifier: Apache-2.0
"""sparse_mla against its fp32 oracle: interpreter on a CPU, native on a GPU."""

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sm12x.ops import pack_fp8_ds_mla, sparse_mla, unpack_fp8_ds_mla
from vllm_sm12x.ops.sparse_mla.config import CONFIGS, LaunchPlan, LaunchPolicy
from vllm_sm12x.ops.sparse_mla.reference import sparse_mla_reference
from vllm_sm12x.ops.sparse_mla.spec import SPARSE_MLA, SparseMlaShape, sparse_mla_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# More than 32 heads have kernels of their own, in the invariant mode always and by shape for many
# tokens: that of wgmma on a Hopper GPU, that of mma.sync on another or without wgmma.
POLICIES = {
    "by shape": None,
    "invariant": LaunchPolicy(batch_invariant=True),
    "by shape, no wgmma": LaunchPolicy(wgmma=False),
    "invariant, no wgmma": LaunchPolicy(batch_invariant=True, wgmma=False),
    "Triton": LaunchPolicy(mma=False, wgmma=False),
}


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.float() - want).norm() / want.norm().clamp_min(1e-30)).item()


def check(inputs: dict, policy: LaunchPolicy | None = None) -> float:
    """Run into NaN-poisoned output and compare output and LSE with the oracle."""
    out = torch.full_like(inputs["q"], math.nan)
    got, lse = sparse_mla(**inputs, out=out, return_lse=True, policy=policy)
    want, want_lse = sparse_mla_reference(**inputs, return_lse=True)
    assert got is out
    assert not got.isnan().any(), "an output element was not written"
    error = relative_error(got, want)
    print(f"relative error {error:.2e}")
    assert error <= SPARSE_MLA.tolerance, SPARSE_MLA.tolerance_reason
    assert torch.equal(lse.isinf(), want_lse.isinf())
    finite = want_lse.isfinite()
    torch.testing.assert_close(lse[finite], want_lse[finite], atol=1e-3, rtol=0)
    assert (got[want_lse.isinf()] == 0).all()
    return error


@pytest.mark.parametrize("shape", SPARSE_MLA.small, ids=str)
def test_small_shapes(shape):
    check(sparse_mla_inputs(shape, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
@pytest.mark.parametrize("shape", SPARSE_MLA.full, ids=str)
def test_model_shapes(shape, policy):
    check(sparse_mla_inputs(shape, device=DEVICE), policy)


@pytest.mark.parametrize("head_block", [1, 2, 4])
@pytest.mark.parametrize("topk_chunk", [16, 512])
def test_every_tile_and_split(head_block, topk_chunk):
    shape = SparseMlaShape(2, heads=40, swa=40, extra=70, lens="ragged", holes=0.2, rows=90)
    policy = LaunchPolicy(head_block=head_block, topk_chunk=topk_chunk)
    check(sparse_mla_inputs(shape, device=DEVICE, seed=3), policy)


def test_several_launches_cover_every_token(monkeypatch):
    plan = LaunchPlan(CONFIGS[1], 1, tokens_per_launch=16)
    # By import_module: the package's attribute of that name is the function.
    op = importlib.import_module("vllm_sm12x.ops.sparse_mla")
    monkeypatch.setattr(op, "choose", lambda *_, **__: plan)
    shape = SparseMlaShape(40, heads=3, swa=5, extra=0, rows=50, lens="ragged")
    check(sparse_mla_inputs(shape, device=DEVICE))


@settings(max_examples=25 if DEVICE == "cpu" else 40)
@given(
    shape=st.builds(
        SparseMlaShape,
        tokens=st.integers(1, 4),
        heads=st.integers(1, 40),
        swa=st.integers(1, 50),
        extra=st.integers(0, 50),
        swa_block=st.sampled_from([1, 2, 7, 64]),
        extra_block=st.sampled_from([1, 2, 7, 64]),
        sink=st.booleans(),
        holes=st.sampled_from([0.0, 0.5, 1.0]),
        lens=st.sampled_from([None, "full", "ragged"]),
        padded=st.booleans(),
        rows=st.integers(1, 120),
    ),
    positions=st.sampled_from([{}, {"table": True}, {"table": True, "unpack": True}]),
    policy=st.sampled_from(list(POLICIES.values())),
    seed=st.integers(0, 1000),
)
def test_any_indices_lengths_and_pages(shape, positions, policy, seed):
    if shape.extra:
        shape = SparseMlaShape(**{**vars(shape), **positions})
    check(sparse_mla_inputs(shape, device=DEVICE, seed=seed), policy)


def test_strided_query_output_and_indices():
    inputs = sparse_mla_inputs(SparseMlaShape(3, heads=6, swa=20, extra=24, rows=50), device=DEVICE)
    want = sparse_mla_reference(**inputs)
    wide_q = torch.randn(3, 9, 512, device=DEVICE).to(torch.bfloat16)
    wide_q[:, 2:8] = inputs["q"]
    wide_out = torch.full((3, 9, 512), math.nan, dtype=torch.bfloat16, device=DEVICE)
    for name in ("swa_indices", "extra_indices"):
        wide = torch.full((3, 77), 10**6, dtype=torch.int32, device=DEVICE)
        wide[:, : inputs[name].shape[1]] = inputs[name]
        inputs[name] = wide[:, : inputs[name].shape[1]].unsqueeze(1)
    inputs["q"] = wide_q[:, 2:8]
    sparse_mla(**inputs, out=wide_out[:, 2:8])
    assert relative_error(wide_out[:, 2:8], want) <= SPARSE_MLA.tolerance
    assert wide_out[:, :2].isnan().all() and wide_out[:, 8:].isnan().all(), "wrote past its heads"


def test_entries_past_the_length_are_never_read():
    inputs = sparse_mla_inputs(SparseMlaShape(2, heads=4, swa=20, extra=20, rows=40), device=DEVICE)
    for kind in ("swa", "extra"):
        inputs[f"{kind}_lens"] = torch.tensor([7, 0], dtype=torch.int32, device=DEVICE)
        inputs[f"{kind}_indices"][:, 7:] = 2**31 - 1
        inputs[f"{kind}_indices"][1] = 2**31 - 1
    check(inputs)


def test_positions_past_the_block_table_are_ignored():
    shape = SparseMlaShape(2, heads=4, swa=3, extra=6, table=True, extra_block=4, rows=16)
    inputs = sparse_mla_inputs(shape, device=DEVICE)
    pages = inputs["extra_block_table"].shape[1]
    inputs["extra_indices"][:, 3:] = pages * 4 + 1
    short = {**inputs, "extra_indices": inputs["extra_indices"][:, :3].contiguous()}
    short["extra_lens"] = torch.full_like(inputs["extra_lens"], 3)
    torch.testing.assert_close(sparse_mla(**inputs), sparse_mla(**short))
    check(inputs)


UNPACK = SparseMlaShape(
    6, heads=4, swa=3, extra=20, table=True, extra_block=4, rows=50, unpack=True
)


def test_rows_are_unpacked_as_they_are():
    inputs = sparse_mla_inputs(UNPACK, device=DEVICE)
    sparse_mla(**inputs)
    pages = inputs["extra_block_table"].long()
    packed = unpack_fp8_ds_mla(inputs["extra_cache"])[pages].flatten(1, 2)
    for got, want, rows in zip(inputs["unpacked"], packed, inputs["unpacked_lens"], strict=True):
        assert torch.equal(got[:rows].float(), want[:rows])
        assert got[-(-rows // 16) * 16 :].isnan().all(), "wrote past the request's rows"


def test_positions_past_the_unpacked_rows_are_ignored():
    inputs = sparse_mla_inputs(UNPACK, device=DEVICE)
    rows = inputs["unpacked_lens"][inputs["request_ids"].long()]
    inputs["extra_indices"][:, ::2] = rows[:, None] + torch.arange(10, device=DEVICE).int()
    check(inputs)
    inputs["unpacked_lens"].zero_()
    check(inputs)


@pytest.mark.parametrize("head_block", [1, 2, 4])
def test_unpacked_rows_in_every_tile(head_block):
    shape = SparseMlaShape(3, heads=40, swa=40, extra=70, lens="ragged", holes=0.2, rows=90)
    shape = SparseMlaShape(**{**vars(shape), "table": True, "unpack": True})
    check(sparse_mla_inputs(shape, device=DEVICE), LaunchPolicy(head_block=head_block))


@pytest.mark.gpu
def test_unpacked_rows_beyond_2_gib():
    shape = SparseMlaShape(5, heads=16, extra=64, table=True, unpack=True)
    inputs = sparse_mla_inputs(shape, device=DEVICE)
    requests, rows = len(inputs["extra_block_table"]), 2**20
    inputs["unpacked"] = inputs["unpacked"].new_empty(requests, rows, 512)
    inputs["request_ids"].fill_(requests - 1)
    check(inputs)


def test_sink_takes_weight_from_the_candidates_only():
    inputs = sparse_mla_inputs(SparseMlaShape(2, heads=4, swa=9, extra=0, rows=9), device=DEVICE)
    inputs["sink"] = torch.tensor([-math.inf, 0.0, 50.0, 1000.0], device=DEVICE)
    out, lse = sparse_mla(**inputs, return_lse=True)
    without = {k: v for k, v in inputs.items() if k != "sink"}
    plain, plain_lse = sparse_mla(**without, return_lse=True)
    assert torch.equal(out[:, 0], plain[:, 0]), "a sink of -inf must change nothing"
    assert torch.equal(lse, plain_lse), "the LSE is without the sink"
    assert (out[:, 3] == 0).all(), "an overwhelming sink leaves nothing to the candidates"
    check(inputs)


def test_same_inputs_give_the_same_bits():
    inputs = sparse_mla_inputs(
        SparseMlaShape(4, heads=16, swa=50, extra=90, rows=200, lens="ragged"), device=DEVICE
    )
    policy = LaunchPolicy(topk_chunk=64)
    first = sparse_mla(**inputs, policy=policy)
    assert torch.equal(first, sparse_mla(**inputs, policy=policy))


def test_cache_addresses_beyond_two_gib():
    """A page whose byte offset does not fit 32 bits: int32 arithmetic would read elsewhere."""
    page_bytes = 37_440
    pages = 2**31 // page_bytes + 70
    storage = torch.empty(pages * page_bytes, dtype=torch.uint8, device=DEVICE)
    cache = storage.as_strided((pages, 64, 584), (page_bytes, 584, 1))
    rows = torch.randn(1, 64, 512, device=DEVICE).to(torch.bfloat16)
    cache[-1] = pack_fp8_ds_mla(rows)[0]
    slots = torch.arange((pages - 1) * 64, pages * 64, device=DEVICE, dtype=torch.int32)
    q = torch.randn(1, 8, 512, device=DEVICE).to(torch.bfloat16)
    check(
        {
            "q": q,
            "swa_cache": cache,
            "swa_indices": slots[None],
            "extra_cache": cache,
            "extra_indices": slots[None].flip(1).contiguous(),
            "softmax_scale": 512**-0.5,
        }
    )


@pytest.mark.gpu
def test_more_query_elements_than_int32_addresses():
    tokens, heads = 33_000, 128
    assert tokens * heads * 512 > 2**31
    shape = SparseMlaShape(tokens, heads=heads, swa=4, extra=0, rows=64)
    inputs = sparse_mla_inputs(shape, device=DEVICE)
    out = sparse_mla(**inputs)
    tail = slice(tokens - 8, tokens)
    part = {**inputs, "q": inputs["q"][tail], "swa_indices": inputs["swa_indices"][tail]}
    part["swa_lens"] = inputs["swa_lens"][tail]
    assert relative_error(out[tail], sparse_mla_reference(**part)) <= SPARSE_MLA.tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
@pytest.mark.parametrize("tokens", [1, 7, 64, 512])
def test_cuda_graph_replay_with_changed_inputs(tokens, policy):
    shape = SparseMlaShape(tokens, lens="ragged", table=True)
    static = sparse_mla_inputs(shape, device=DEVICE, seed=1)
    out = torch.empty_like(static["q"])
    sparse_mla(**static, out=out, policy=policy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sparse_mla(**static, out=out, policy=policy)
    for seed in (2, 3):
        fresh = sparse_mla_inputs(shape, device=DEVICE, seed=seed)
        for name, tensor in static.items():
            if isinstance(tensor, torch.Tensor):
                tensor.copy_(fresh[name])
        out.fill_(math.nan)
        graph.replay()
        assert relative_error(out, sparse_mla_reference(**fresh)) <= SPARSE_MLA.tolerance


@pytest.mark.gpu
def test_error_is_no_worse_than_bf16_torch():
    """The yardstick of the tolerance: the same attention by torch in bf16 on the same rows."""
    inputs = sparse_mla_inputs(SparseMlaShape(64, extra=512), device=DEVICE)
    want = sparse_mla_reference(**inputs)
    bf16 = torch.bfloat16
    rows = []
    for kind in ("swa", "extra"):
        cache, slots = inputs[f"{kind}_cache"], inputs[f"{kind}_indices"].long()
        rows.append(unpack_fp8_ds_mla(cache).to(bf16).flatten(0, 1)[slots])
    rows = torch.cat(rows, 1)
    scores = torch.einsum("thd,twd->thw", inputs["q"], rows).float() * inputs["softmax_scale"]
    sink = inputs["sink"][None, :, None].expand(64, -1, 1)
    weights = torch.softmax(torch.cat([scores, sink], -1), -1)[..., :-1].to(bf16)
    torch_error = relative_error(torch.einsum("thw,twd->thd", weights, rows), want)
    ours = relative_error(sparse_mla(**inputs), want)
    print(f"ours {ours:.2e}, torch bf16 {torch_error:.2e}")
    assert ours <= torch_error * 1.05


BAD = {
    "q dtype": ({"q": lambda t: t.float()}, TypeError, "q: expected dtype torch.bfloat16"),
    "q heads": ({"q": lambda t: t.repeat(1, 33, 1)}, ValueError, "H from 1 to 128"),
    "q dim": ({"q": lambda t: t[..., :448]}, ValueError, r"expected \[T, H, 512\]"),
    "cache dtype": ({"swa_cache": lambda t: t.float()}, TypeError, "swa_cache: expected dtype"),
    "cache shape": ({"extra_cache": lambda t: t[..., :576]}, ValueError, "584"),
    "indices dtype": ({"swa_indices": lambda t: t.long()}, TypeError, "swa_indices"),
    "indices rows": ({"extra_indices": lambda t: t[:1]}, ValueError, "extra_indices: expected 2"),
    "lens length": ({"swa_lens": lambda t: t[:1]}, ValueError, "swa_lens: expected a contiguous"),
    "lens dtype": ({"extra_lens": lambda t: t.long()}, TypeError, "extra_lens"),
    "sink length": ({"sink": lambda t: t[:2]}, ValueError, "sink: expected a contiguous vector"),
    "lone extra": ({"extra_indices": lambda t: None}, ValueError, "both or neither"),
    "lone unpacked": ({"unpacked_lens": lambda t: None}, ValueError, "unpacked_lens: give both"),
    "no table": (
        {"extra_block_table": lambda t: None, "request_ids": lambda t: None},
        ValueError,
        "unpacked: needs extra_block_table",
    ),
    "unpacked dtype": ({"unpacked": lambda t: t.float()}, TypeError, "unpacked: expected dtype"),
    "unpacked shape": ({"unpacked": lambda t: t[:1]}, ValueError, r"expected \[2, N, 512\]"),
    "no rows": ({"unpacked": lambda t: t[:, :0]}, ValueError, "N from 1 on"),
    "unpacked strides": (
        {"unpacked": lambda t: t[:, ::2]},
        ValueError,
        "unpacked: expected contiguous",
    ),
    "unpacked lens": ({"unpacked_lens": lambda t: t.long()}, TypeError, "unpacked_lens"),
    "device": ({"sink": lambda t: t.to("meta")}, ValueError, "sink: expected device"),
}


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_named_before_anything_is_written(change, error, message):
    shape = SparseMlaShape(2, heads=4, swa=8, extra=8, rows=16, table=True, unpack=True)
    inputs = sparse_mla_inputs(shape, device=DEVICE)
    inputs["out"] = torch.full_like(inputs["q"], math.nan)
    for name, alter in change.items():
        inputs[name] = alter(inputs[name])
    with pytest.raises(error, match=message):
        sparse_mla(**inputs)
    assert inputs["out"].isnan().all()

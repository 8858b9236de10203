# SPDX-License-Identifier: Apache-2.0
"""`vllm-sm12x bench`: every peer is called as vLLM calls it, and only what is right gets a time."""

import ast
import dataclasses
import importlib.util
import inspect
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from flashinfer.mla import trtllm_batch_decode_sparse_mla_dsv4
from typer.testing import CliRunner
from vllm.v1.attention.ops.rocm_aiter_mla_sparse import (
    build_ragged_indices_from_dense,
    rocm_sparse_attn_decode,
    rocm_sparse_attn_prefill,
)

from vllm_sm12x import bench
from vllm_sm12x.bench import as_sm12x, attention, indexer, projections, race, report
from vllm_sm12x.bench.timing import Timing
from vllm_sm12x.cli import app
from vllm_sm12x.ops.fp8_einsum.spec import FP8_EINSUM, Fp8EinsumShape
from vllm_sm12x.ops.hc_head.spec import HcHeadShape
from vllm_sm12x.ops.hc_post.spec import HcPostShape
from vllm_sm12x.ops.hc_post_prenorm_gemm.spec import HcPostPrenormGemmShape
from vllm_sm12x.ops.hc_pre.spec import HcPreShape
from vllm_sm12x.ops.hc_prenorm_gemm.spec import HC_PRENORM_GEMM, HcPrenormGemmShape
from vllm_sm12x.ops.mqa_logits.spec import MQA_LOGITS, MqaLogitsShape
from vllm_sm12x.ops.paged_mqa_logits.spec import PAGED_MQA_LOGITS, PagedMqaLogitsShape
from vllm_sm12x.ops.paged_mqa_topk.spec import PagedMqaTopkShape
from vllm_sm12x.ops.sparse_mla.reference import quantised_reference
from vllm_sm12x.ops.sparse_mla.spec import SPARSE_MLA, SparseMlaShape
from vllm_sm12x.ops.specs import SPECS
from vllm_sm12x.vllm_api import deep_gemm
from vllm_sm12x.vllm_api.peers import Peers, find_peers

pytestmark = pytest.mark.once

RATES = {"copy": 4e12, "bf16": 8e14, "fp8": 16e14}
LOGITS_OF_PADDING = 7.0
# The weights are two bf16 terms, and Triton's interpreter truncates each, at most 2^-7 of it.
INTERPRETED_PRENORM = 2.0**-14
# It truncates P and the output to bf16, too, where a peer's are rounded as ours are on a GPU.
INTERPRETED_ATTENTION = 2 * SPARSE_MLA.tolerance


class StandInDeepGemm:
    """DeepGEMM's functions as vLLM 0.26 calls them on SM90, computed by the oracles.

    As there: more than two rows a request are refused, and what is past a context is not cleaned.
    """

    @staticmethod
    def get_paged_mqa_logits_metadata(context_lens, block_size, num_sms):
        assert context_lens.dim() == 2
        return torch.zeros(num_sms + 1, 2, dtype=torch.int32)

    @staticmethod
    def fp8_fp4_paged_mqa_logits(
        q, cache, weights, lens, table, schedule, max_model_len, clean_logits
    ):
        values, scale = q
        assert scale is None
        assert not clean_logits
        assert values.shape[1] in (1, 2)
        assert lens.shape == values.shape[:2]
        assert (lens.dtype, lens.is_contiguous()) == (torch.int32, True)
        arguments = (values, cache, weights, lens, table)
        logits = PAGED_MQA_LOGITS.oracle(*arguments, max_model_len=max_model_len)
        return logits.masked_fill(logits.isinf(), LOGITS_OF_PADDING)

    @staticmethod
    def fp8_fp4_mqa_logits(q, kv, weights, ks, ke, clean_logits):
        logits = MQA_LOGITS.oracle(q[0], *kv, weights, ks, ke)
        return logits.masked_fill(logits.isinf(), LOGITS_OF_PADDING)

    @staticmethod
    def transform_sf_into_required_layout(sf, mn, k, recipe, num_groups, is_sfa):
        assert sf.shape == (num_groups, mn // recipe[1], k // recipe[2])
        return sf

    @staticmethod
    def fp8_einsum(equation, a, b, out, recipe):
        assert (equation, recipe) == ("bhr,hdr->bhd", (1, 128, 128))
        tokens, _, steps = a[1].shape
        aligned = -(-tokens // 4) * 4
        assert a[1].stride() == (1, steps * aligned, aligned)
        out.copy_(FP8_EINSUM.oracle(*a, *b))

    @staticmethod
    def tf32_hc_prenorm_gemm(x, fn, out, sqrsum, num_split):
        assert out.shape[0] == sqrsum.shape[0] == num_split
        for target, result in zip((out, sqrsum), HC_PRENORM_GEMM.oracle(x, fn), strict=True):
            target.copy_(result / num_split)


def gather(cache, k, scale, table, ends):
    assert ends.tolist() == [0, len(k)]
    rows = cache.flatten(1)[table[0].long()]
    k.copy_(rows[:, : 64 * 128].contiguous().view(torch.float8_e4m3fn).view(-1, 128))
    scale.copy_(rows[:, 64 * 128 :].contiguous().view(-1, 4))


def top_k(logits, starts, ends, chosen, rows, stride0, stride1, topk):
    assert (rows, stride0, stride1) == (len(logits), *logits.stride())
    inside = torch.arange(logits.shape[1], device=logits.device) < ends[:, None]
    chosen.copy_(logits.masked_fill(~inside, -torch.inf).topk(topk, 1).indices)


def flash_mla(**arguments):
    """FlashMLA's function, by our oracle: a batch of single-token queries, caches with a head."""
    assert arguments["q"].shape[1] == arguments["indices"].shape[1] == 1
    assert (arguments["is_fp8_kvcache"], arguments["head_dim_v"]) == (True, 512)
    extra = {}
    if "extra_k_cache" in arguments:
        extra = {
            "extra_cache": arguments["extra_k_cache"].squeeze(-2),
            "extra_indices": arguments["extra_indices_in_kvcache"].squeeze(1),
            "extra_lens": arguments["extra_topk_length"],
        }
    out = SPARSE_MLA.oracle(
        arguments["q"].squeeze(1),
        arguments["k_cache"].squeeze(-2),
        arguments["indices"].squeeze(1),
        arguments["topk_length"],
        softmax_scale=arguments["softmax_scale"],
        sink=arguments["attn_sink"],
        **extra,
    )
    arguments["out"].copy_(out.unsqueeze(1))


def flash_mla_prefill(q, kv, indices, sm_scale, attn_sink, topk_length, out):
    """FlashMLA's prefill kernel by plain attention: a list of rows for each token."""
    assert kv.shape[1:] == (1, 512) and indices.shape[1] == 1
    # What its kernels assert, which read so many indices at a time.
    assert indices.shape[2] % (64 if q.shape[1] == 64 else 128) == 0
    for token, length in enumerate(topk_length.tolist()):
        places = indices[token, 0, :length].long()
        assert places.min() >= 0 and places.max() < len(kv)
        rows = kv[places, 0].float()
        scores = torch.cat([q[token].float() @ rows.T * sm_scale, attn_sink[:, None]], 1)
        out[token] = (scores.softmax(1)[:, :-1] @ rows).to(out.dtype)


def rocm_prefill(**arguments):
    """The prefill kernel of vLLM's ROCm backend, which takes what its signature has."""
    inspect.signature(rocm_sparse_attn_prefill).bind(**arguments)
    assert arguments["head_dim"] == arguments["nope_head_dim"] + arguments["rope_head_dim"] == 512
    flash_mla_prefill(
        arguments["q"],
        arguments["kv"],
        arguments["indices"].unsqueeze(1),
        arguments["scale"],
        arguments["attn_sink"],
        arguments["topk_length"],
        arguments["output"],
    )


def ragged(indices, lens, num_rows):
    inspect.signature(build_ragged_indices_from_dense).bind(indices, lens, num_rows=num_rows)
    assert indices.max() < num_rows
    lists = [row[:length] for row, length in zip(indices, lens.tolist(), strict=True)]
    return torch.cat(lists), torch.cat([lens.new_zeros(1), lens.cumsum(0).int()])


def rocm_decode(**arguments):
    """Its decode kernel, which reads packed lists: those of the tokens, one after the other."""
    inspect.signature(rocm_sparse_attn_decode).bind(**arguments)
    assert arguments["head_dim"] == arguments["nope_head_dim"] + arguments["rope_head_dim"] == 512

    def dense(kind):
        flat, starts = arguments[f"{kind}_ragged_indices"], arguments[f"{kind}_ragged_indptr"]
        lists = flat.tensor_split(starts[1:-1].tolist())
        return torch.nn.utils.rnn.pad_sequence(lists, batch_first=True, padding_value=-1)

    extra = {}
    if not arguments["swa_only"]:
        extra = {"extra_cache": arguments["kv_cache"], "extra_indices": dense("topk")}
    out = SPARSE_MLA.oracle(
        arguments["q"],
        arguments["swa_k_cache"],
        dense("swa"),
        softmax_scale=arguments["scale"],
        sink=arguments["attn_sink"],
        **extra,
    )
    arguments["output"].copy_(out)


def vllm_cache_utils():
    """vLLM's gather and list kernels; without a GPU vLLM itself has none, and its Triton is off."""
    where = importlib.util.find_spec("vllm.models.deepseek_v4").submodule_search_locations[0]
    path = Path(where) / "common/ops/cache_utils.py"
    spec = importlib.util.spec_from_file_location("interpreted_cache_utils", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "vllm.triton_utils", SimpleNamespace(tl=tl, triton=triton))
        spec.loader.exec_module(module)
    module.has_cutedsl = lambda: False
    return module


def gather_rows(*arguments, **keywords):
    vllm_cache_utils().dequantize_and_gather_k_cache(*arguments, **keywords)


def combine_lists(*arguments):
    return vllm_cache_utils().combine_topk_swa_indices(*arguments)


def flashinfer(**arguments):
    """FlashInfer's, which takes what its signature has."""
    inspect.signature(trtllm_batch_decode_sparse_mla_dsv4).bind(**arguments)
    assert arguments["kv_layout"] == "NHD"
    extra = {}
    if "extra_sparse_indices" in arguments:
        extra = {
            "extra_cache": arguments["compressed_kv_cache"].squeeze(-2),
            "extra_indices": arguments["extra_sparse_indices"].squeeze(1),
            "extra_lens": arguments["extra_sparse_topk_lens"],
        }
    out = SPARSE_MLA.oracle(
        arguments["query"],
        arguments["swa_kv_cache"].squeeze(-2),
        arguments["sparse_indices"],
        arguments["swa_topk_lens"],
        softmax_scale=arguments["bmm1_scale"],
        sink=arguments["sinks"],
        **extra,
    )
    arguments["out"].copy_(out)


def quantize(rows, positions, cos_sin_cache, groups):
    """vLLM's op, whose results are by group of heads, and scales have tokens side by side."""
    values, scales = quantised_reference(rows, positions, cos_sin_cache)
    values, scales = (part.flatten(1).unflatten(1, (groups, -1)) for part in (values, scales))
    return values, scales.permute(1, 2, 0).contiguous().permute(2, 0, 1)


PEERS = Peers(
    deep_gemm=deep_gemm,
    indexer=SimpleNamespace(gather=gather, top_k=top_k),
    flash_mla=SimpleNamespace(
        flash_mla_with_kvcache=flash_mla,
        flash_mla_sparse_fwd=flash_mla_prefill,
        get_mla_metadata=lambda: [None],
    ),
    flashinfer=flashinfer,
    prefill=SimpleNamespace(gather=gather_rows, combine=combine_lists),
    rocm=SimpleNamespace(decode=rocm_decode, prefill=rocm_prefill, ragged=ragged),
    quantize=quantize,
)
# Small shapes for the interpreter, by the op's name in the command.
SHAPES = {
    "sparse_mla": [
        SparseMlaShape(3, heads=64, swa=17, extra=21, rows=70),
        SparseMlaShape(1, heads=64, swa=16, extra=0, rows=64),
        SparseMlaShape(21, heads=64, swa=16, extra=4, swa_block=8, extra_block=4, context=21),
        *(
            SparseMlaShape(
                5, heads=64, swa=16, extra=4, swa_block=8, extra_block=4, context=83, unpack=unpack
            )
            for unpack in (False, True)
        ),
        SparseMlaShape(3, heads=16, swa=17, extra=21, rows=70, table=True, quantised=True),
    ],
    "paged_mqa_logits": [PagedMqaLogitsShape(2, 192), PagedMqaLogitsShape(5, 130, next_n=3)],
    "mqa_logits": [MqaLogitsShape(6, 140, ranges="full")],
    "fp8_einsum": [Fp8EinsumShape(t, groups=8, cols=128, depth=256) for t in (1, 5)],
    "hc_prenorm_gemm": [HcPrenormGemmShape(3, depth=512)],
    "hc_pre": [HcPreShape(3, width=64)],
    "hc_post": [HcPostShape(3, width=64)],
    "hc_post_prenorm_gemm": [HcPostPrenormGemmShape(3, width=64)],
    "hc_head": [HcHeadShape(3, width=64)],
    "paged_mqa_topk": [PagedMqaTopkShape(6, 128, 16)],
}
EXPECTED = {
    "sparse_mla": {"flash_mla", "rocm", "flashinfer"},
    **dict.fromkeys(("hc_pre", "hc_post", "hc_head"), {"torch"}),
    "hc_prenorm_gemm": {"deep_gemm", "torch"},
    "hc_post_prenorm_gemm": {projections.TWO_KERNELS},
    "paged_mqa_topk": {"deep_gemm", "logits, top-k"},
}


def cases(op, where, peers=PEERS):
    return list(bench.CASES[op](peers, where, shapes=SHAPES[op]))


@pytest.fixture
def where(monkeypatch):
    """The device that kernels run on here, with two input sets a row."""
    for module in (attention, indexer, projections):
        monkeypatch.setattr(module, "input_sets", lambda bytes_of_one, device: 2)
    monkeypatch.setattr(deep_gemm, "wrappers", lambda: StandInDeepGemm)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_every_op_has_a_race():
    assert set(bench.CASES) == {spec.name for spec in SPECS}


@pytest.mark.usefixtures("rounds_to_e4m3")
@pytest.mark.parametrize("op", SHAPES)
def test_each_op_is_raced_as_vllm_calls_its_peers(where, op):
    for case in cases(op, where):
        calls, errors, refused = race.gate(case)
        assert refused == {}
        expected = EXPECTED.get(op, {"deep_gemm"})
        if case.shape.endswith("quantised"):
            expected = {attention.IN_TWO}
        assert set(errors) == {"ours", *expected}
        if where.type == "cpu" and op == "hc_prenorm_gemm":
            case = dataclasses.replace(case, tolerance=INTERPRETED_PRENORM)
        if where.type == "cpu" and op == "sparse_mla" and expected == EXPECTED[op]:
            case = dataclasses.replace(case, peer_tolerance=INTERPRETED_ATTENTION)
        assert race.red_variants(case, errors) == [], errors
        assert [len(variant) for variant in calls.values()] == [2] * len(calls)
        assert min(case.bytes, case.flops) > 0
    alone = cases(op, where, Peers())[0]
    assert set(alone.peers) <= {"torch", projections.TWO_KERNELS}


def test_peers_with_other_heads_are_refused_in_words(where):
    shapes = [SparseMlaShape(1, heads=5, swa=16, extra=0, rows=64)]
    (case,) = bench.CASES["sparse_mla"](PEERS, where, shapes=shapes)
    _, errors, refused = race.gate(case)
    assert set(errors) == {"ours", "rocm"}
    assert refused == {
        "flash_mla": "FlashMLA takes 64 or 128 heads, not 5",
        "flashinfer": "FlashInfer takes 8, 16, 32, 64 or 128 heads, not 5",
    }


def test_a_prefill_is_raced_with_what_vllm_does_before_flash_mla(where):
    case = cases("sparse_mla", where)[2]
    assert case.slowest == {"flash_mla": 1.6}
    assert "vLLM's gather" in case.note
    alone = cases("sparse_mla", where, dataclasses.replace(PEERS, prefill=None))[2]
    assert (set(alone.peers), alone.note) == ({"flashinfer"}, "")
    late = race.judge({"ours": 170.0, "flash_mla": 100.0}, case, RATES)
    assert (late["floors"], late["missed"]) == ({"ratio": 1.6}, ["1.70 x FlashMLA, not 1.6"])
    assert race.judge({"ours": 159.0, "flash_mla": 100.0}, case, RATES)["missed"] == []


def test_a_prefill_is_raced_with_packed_rows_and_with_rows_that_are_unpacked(where):
    packed, unpacked = cases("sparse_mla", where)[3:5]
    assert packed.shape == "T 5, 64 heads, 16+4 of a context of 83, packed rows"
    assert unpacked.shape == "T 5, 64 heads, 16+4 of a context of 83, rows unpacked once"
    assert packed.series != unpacked.series
    assert unpacked.slowest == packed.slowest == {"flash_mla": 1.6}
    assert (unpacked.bytes, unpacked.flops) == (packed.bytes, packed.flops)
    assert set(unpacked.peers) == set(packed.peers) == EXPECTED["sparse_mla"]
    for case, rooms in ((packed, 0), (unpacked, 2)):
        calls = [call.keywords for call in case.ours]
        assert len({call["unpacked"].data_ptr() for call in calls if "unpacked" in call}) == rooms
    # Written by our calls, which are timed with that.
    assert unpacked.ours[0].keywords["unpacked"].isnan().all()
    unpacked.ours[0]()
    assert not unpacked.ours[0].keywords["unpacked"].isnan().any()


def test_batch_invariant_calls_never_unpack(where):
    *others, quantised = cases("sparse_mla", where)
    assert quantised.invariant is None
    for case in others:
        for call in case.invariant():
            assert call.keywords["policy"].batch_invariant
            assert not {"unpacked", "unpacked_lens"} & call.keywords.keys()


def test_a_prefills_tokens_see_what_lies_before_them():
    shape = SparseMlaShape(5, heads=64, swa=8, extra=2, swa_block=4, extra_block=2, context=13)
    inputs = SPARSE_MLA.inputs(shape, device="cpu")
    table = attention.window_table(inputs, shape.context)[0]
    for token, position in enumerate(range(8, 13)):
        first = max(0, position - 7)
        slots = [int(table[p // 4]) * 4 + p % 4 for p in range(first, position + 1)]
        assert inputs["swa_indices"][token].tolist() == slots
        chosen = inputs["extra_indices"][token]
        seen = (position + 1) // 4
        assert inputs["extra_lens"][token] == seen
        assert len(set(chosen.tolist()) & set(range(seen))) == 2
    pages = inputs["extra_block_table"].shape[1]
    assert sorted(inputs["extra_block_table"][0].tolist()) == list(range(pages))
    early = SPARSE_MLA.inputs(dataclasses.replace(shape, context=5), device="cpu")
    assert early["extra_indices"].tolist() == [[-1, -1]] * 3 + [[0, -1]] * 2
    assert early["swa_lens"].tolist() == [1, 2, 3, 4, 5]
    # 8 rows of each window, and 2 compressed ones.
    assert shape.candidates == 5 * 8 + 5 * 2
    assert shape.flops == 2 * 2 * 50 * 64 * 512


def test_flash_mla_is_called_by_the_names_that_it_has():
    where = importlib.util.find_spec("vllm").submodule_search_locations[0]
    path = Path(where) / "third_party/flashmla/flash_mla_interface.py"
    functions = {n.name: n for n in ast.parse(path.read_text()).body if hasattr(n, "name")}
    theirs = {argument.arg for argument in functions["flash_mla_sparse_fwd"].args.args}
    assert set(inspect.signature(flash_mla_prefill).parameters) <= theirs


@pytest.mark.contract
@pytest.mark.parametrize("sms", [84, 132, 188])
@pytest.mark.parametrize("depth", [4096, 16_384, 28_672])
def test_deep_gemm_gets_as_many_splits_as_vllm_gives_it(sms, depth):
    # Importing the module would want CUDA and TileLang.
    where = importlib.util.find_spec("vllm").submodule_search_locations[0]
    path = Path(where) / "model_executor/kernels/mhc/tilelang_kernels.py"
    module = ast.parse(path.read_text(encoding="utf-8"))
    (function,) = [n for n in module.body if getattr(n, "name", "") == "compute_num_split"]
    properties = SimpleNamespace(multi_processor_count=sms)
    cuda = SimpleNamespace(get_device_properties=lambda index: properties)
    names = {
        "cache": lambda function: function,
        "cdiv": lambda a, b: -(-a // b),
        "torch": SimpleNamespace(cuda=cuda),
    }
    exec(ast.unparse(function), names)
    for tokens in (1, 63, 64, 65, 500, 4096, 100_000):
        expected = names["compute_num_split"](64, depth, -(-tokens // 64))
        assert projections.vllm_splits(tokens, depth, sms=sms) == expected


def test_a_deep_gemm_that_is_wrong_or_refuses_gets_no_time(where, monkeypatch):
    class Wrong(StandInDeepGemm):
        @staticmethod
        def fp8_fp4_mqa_logits(*args, **kwargs):
            logits = StandInDeepGemm.fp8_fp4_mqa_logits(*args, **kwargs)
            return logits + 0.01 * logits.abs().max()

    class Refusing(StandInDeepGemm):
        @staticmethod
        def fp8_fp4_mqa_logits(*args, **kwargs):
            raise RuntimeError("Unsupported architecture\nstack")

    (case,) = cases("mqa_logits", where)
    monkeypatch.setattr(deep_gemm, "wrappers", lambda: Wrong)
    row = race.measure(case, RATES)
    assert (row["red"], row["median_us"]) == (["deep_gemm"], {})
    cells = report.table_cells(row)
    assert cells[2:7] == ["-"] * 5
    assert cells[7] == "[red]red: deep_gemm[/]"
    assert report.markdown_table([row]).count("\n") == 2
    monkeypatch.setattr(deep_gemm, "wrappers", lambda: Refusing)
    calls, errors, refused = race.gate(case)
    assert (list(calls), list(errors)) == (["ours"], ["ours"])
    assert refused == {"deep_gemm": "Unsupported architecture"}
    assert race.red_variants(case, {"ours": float("nan")}) == ["ours"]


@pytest.fixture
def on_a_gpu(where, monkeypatch):
    """All but CUDA itself: graphs, events and the allocator are stood in for."""
    order = []

    def timed(variants, *, calls, rounds):
        order.append(list(variants))
        return {name: Timing(100.0 + 10 * i, 1.0) for i, name in enumerate(variants)}

    races = {op: partial(bench.CASES[op], shapes=SHAPES[op]) for op in SHAPES}
    monkeypatch.setattr(bench, "CASES", races)
    monkeypatch.setattr(bench, "find_peers", lambda: PEERS)
    monkeypatch.setattr(bench, "measured_rates", lambda: RATES)
    monkeypatch.setattr(race, "interleaved", timed)
    monkeypatch.setattr(race, "extra_memory", lambda call: 3 << 20)
    monkeypatch.setattr(race, "repetitions", lambda call, sets: (sets, 7))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    if where.type == "cpu":
        monkeypatch.setattr(bench.torch, "device", lambda *_: where)
    return order


def test_a_whole_race_is_printed_written_and_drawn(on_a_gpu, tmp_path):
    result, plot = tmp_path / "result.json", tmp_path / "race.png"
    ops = ["paged_mqa_logits", "paged_mqa_topk", "fp8_einsum"]
    ran = CliRunner().invoke(
        app, ["bench", *ops, "--json", str(result), "--plot", str(plot), "--markdown"]
    )
    assert isinstance(ran.exception, SystemExit), ran.exception
    assert ran.exit_code == 1, ran.output  # for the floor that is missed below
    assert "DeepGEMM 110.0 ± 1.0" in ran.output
    assert "| `paged_mqa_logits` batch 2, 192 keys, next_n 1 | 100.0 | DeepGEMM | 110.0 | 0.91" in (
        ran.output
    )
    written = json.loads(result.read_text())
    assert [row["op"] for row in written["rows"]] == [
        *["paged_mqa_logits"] * 2,
        "paged_mqa_topk",
        *["fp8_einsum"] * 2,
    ]
    assert (
        on_a_gpu
        == [["ours", "deep_gemm"]] * 2
        + [["ours", "logits, top-k", "deep_gemm"]]
        + [["ours", "deep_gemm"]] * 2
    )
    first = written["rows"][0]
    assert written["rows"][2]["extra_bytes"]["deep_gemm"] == 3 << 20
    assert first["ratios"]["deep_gemm"] == pytest.approx(100 / 110)
    assert first["floor_us"] == pytest.approx(first["bytes"] / 4e12 * 1e6)
    # One token of this small einsum moves next to nothing in 100 us.
    assert "of the copy bandwidth, not 60%" in written["rows"][3]["missed"][0]
    assert plot.read_bytes().startswith(b"\x89PNG")

    shown = CliRunner().invoke(app, ["bench", "--show", str(result), "--markdown"])
    assert shown.exit_code == 1
    table = ran.output[ran.output.index("| op |") : ran.output.index("drawn: ")]
    assert shown.output == table


def test_the_price_of_bits_that_no_batch_changes_is_raced(on_a_gpu, tmp_path):
    result = tmp_path / "result.json"
    ops = ["fp8_einsum", "hc_prenorm_gemm", "hc_post", "hc_head"]
    ran = CliRunner().invoke(app, ["bench", *ops, "--batch-invariant", "--json", str(result)])
    assert isinstance(ran.exception, SystemExit), ran.exception
    rows = json.loads(result.read_text())["rows"]
    raced = {row["op"]: set(row["error"]) for row in rows}
    mode = "ours, batch-invariant"
    assert raced == {
        "fp8_einsum": {"ours", "deep_gemm", mode},
        "hc_prenorm_gemm": {"ours", "deep_gemm", "torch", mode},
        "hc_post": {"ours", "torch"},
        "hc_head": {"ours", "torch", mode},
    }
    assert f"{mode} 120.0 ± 1.0" in ran.output.replace("\n", " ")


def test_kernels_run_as_on_sm12x_where_the_gpu_has_more(on_a_gpu, tmp_path, monkeypatch):
    set_attributes = []

    class Driver:
        @staticmethod
        def cuFuncSetAttribute(function, attribute, value):
            set_attributes.append((function.value, attribute, value))
            return 0

    knobs = triton.knobs.runtime
    monkeypatch.setattr(knobs, "override_arch", None)
    monkeypatch.setattr(knobs, "kernel_load_end_hook", type(knobs.kernel_load_end_hook)())
    monkeypatch.setattr(as_sm12x.ctypes, "CDLL", lambda name: Driver)
    hopper = SimpleNamespace(shared_memory_per_multiprocessor=228 << 10, L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: hopper)
    result = tmp_path / "result.json"
    ran = CliRunner().invoke(app, ["bench", "hc_head", "--as-sm12x", "--json", str(result)])
    assert ran.exit_code == 0, ran.output
    assert "as SM12x would run them" in ran.output
    assert json.loads(result.read_text())["machine"]["triton_code"] == "SM12x"
    assert knobs.override_arch == "sm89"
    knobs.kernel_load_end_hook(None, 4711, "kernel", {}, "hash")
    # Of the sizes that Hopper has, the least that is no less than 43 % of 228 KiB is 100 KiB.
    assert set_attributes == [(4711, 9, 43)]

    small = SimpleNamespace(shared_memory_per_multiprocessor=100 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: small)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA RTX 5090")
    ran = CliRunner().invoke(app, ["bench", "hc_head", "--as-sm12x"])
    assert ran.exit_code == 2
    assert "only a larger GPU can run as SM12x" in ran.output


def test_a_floor_that_is_missed_is_named(where):
    (case,) = [c for c in cases("mqa_logits", where)]
    case = dataclasses.replace(case, bytes=10**9, flops=2 * 10**9, copy_share=0.6)
    passed = race.judge({"ours": 400.0, "deep_gemm": 200.0}, case, RATES)
    assert passed["copy_share"] == pytest.approx(0.625)
    assert passed["flops_per_second"] == pytest.approx(5e12)
    assert passed["floor_us"] == pytest.approx(250.0)
    assert (passed["ratios"], passed["missed"]) == ({"deep_gemm": 2.0}, [])
    assert passed["floors"] == {"copy_share": 0.6, "ratio": 2.5}
    missed = race.judge({"ours": 600.0, "deep_gemm": 200.0}, case, RATES)
    assert missed["missed"] == ["42% of the copy bandwidth, not 60%", "3.00 x DeepGEMM, not 2.5"]
    alone = race.judge({"ours": 400.0}, case, RATES)
    assert alone["floors"] == {"copy_share": 0.6}
    bound = race.judge({"ours": 400.0}, dataclasses.replace(case, flops=10**12), RATES)
    assert bound["floor_us"] == pytest.approx(1e12 / RATES["fp8"] * 1e6)


def test_what_cannot_be_raced_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ran = CliRunner().invoke(app, ["bench"])
    assert ran.exit_code == 2 and "no NVIDIA GPU" in ran.output
    ran = CliRunner().invoke(app, ["bench", "flash_attention"])
    assert ran.exit_code == 2
    assert "unknown op flash_attention; there are sparse_mla, fp8_einsum" in ran.output


def test_a_picture_that_cannot_be_drawn_is_said_before_anything_is_measured(
    on_a_gpu, monkeypatch, tmp_path
):
    ran = CliRunner().invoke(app, ["bench", "--plot", str(tmp_path / "race.txt")])
    assert ran.exit_code == 2 and "png" in ran.output and "not race.txt" in ran.output
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    ran = CliRunner().invoke(app, ["bench", "--plot", str(tmp_path / "race.png")])
    assert ran.exit_code == 2 and "pip install 'vllm-sm12x[bench]'" in ran.output
    assert on_a_gpu == []


def test_another_file_is_no_result(tmp_path):
    (tmp_path / "other.json").write_text('{"benchmark": "readiness"}')
    ran = CliRunner().invoke(app, ["bench", "--show", str(tmp_path / "other.json")])
    assert ran.exit_code == 2 and "is no result of" in ran.output


@pytest.mark.contract
def test_a_peer_that_is_not_here_says_why():
    peers = find_peers()
    for name in ("deep_gemm", "indexer", "flash_mla", "flashinfer", "prefill", "rocm"):
        assert (getattr(peers, name) is None) == (name in peers.absent)
    if not torch.cuda.is_available():
        assert peers.flash_mla is None and peers.absent["flash_mla"]


def test_logits_past_a_context_must_be_minus_infinity():
    expected = torch.tensor([[1.0, 2.0, -torch.inf]])
    assert indexer.logits_error(expected.clone(), expected) == 0
    assert indexer.logits_error(torch.tensor([[1.0, 2.0, 0.0]]), expected) == float("inf")
    unclean = torch.tensor([[1.0, 2.0, 9.0]])
    assert indexer.logits_difference(unclean, expected) == 0
    assert indexer.logits_difference(unclean + 1, expected) > 0.1


def test_a_selection_is_judged_by_its_scores():
    logits = torch.tensor([[5.0, 1.0, 4.0, 3.0], [4.0, 4.0, 4.0, 1.0]])

    def error(*rows):
        return indexer.selection_error(torch.tensor(rows, dtype=torch.int32), logits)

    assert error([0, 2], [1, 0]) == 0  # of a tie, any
    assert error([0, 3], [1, 2]) == pytest.approx(1 / (51 / 4) ** 0.5)
    for wrong in ([0, 0], [0, -1], [0, 4]):
        assert error(wrong, [0, 1]) == float("inf")
    a, b = torch.tensor([[3, 1, 2], [5, 6, 7]]), torch.tensor([[1, 2, 3], [7, 8, 9]])
    assert indexer.selection_difference(a, b) == pytest.approx(2 / 6)

# SPDX-License-Identifier: Apache-2.0
"""A row's bits alone and among others: interpreter on a CPU, native on a GPU."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_sm12x.ops.fp8_einsum import config as fp8_einsum
from vllm_sm12x.ops.fp8_einsum.spec import FP8_EINSUM, Fp8EinsumShape
from vllm_sm12x.ops.hc_head.spec import HC_HEAD, HcHeadShape
from vllm_sm12x.ops.hc_post import config as hc_post
from vllm_sm12x.ops.hc_post.spec import HC_POST, HcPostShape
from vllm_sm12x.ops.hc_pre.spec import HC_PRE, HcPreShape
from vllm_sm12x.ops.hc_prenorm_gemm import config as hc_prenorm_gemm
from vllm_sm12x.ops.hc_prenorm_gemm.spec import HC_PRENORM_GEMM, HcPrenormGemmShape
from vllm_sm12x.ops.mqa_logits.spec import MQA_LOGITS, MqaLogitsShape
from vllm_sm12x.ops.op_spec import OpSpec
from vllm_sm12x.ops.paged_mqa_logits.spec import PAGED_MQA_LOGITS, PagedMqaLogitsShape
from vllm_sm12x.ops.paged_mqa_topk.spec import PAGED_MQA_TOPK, PagedMqaTopkShape
from vllm_sm12x.ops.sparse_mla import config as sparse_mla
from vllm_sm12x.ops.sparse_mla.config import LaunchPolicy
from vllm_sm12x.ops.sparse_mla.spec import SPARSE_MLA, SparseMlaShape
from vllm_sm12x.ops.specs import SPECS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MANY = 130  # rows that the shapes below have
COMPANY = (7, 33, MANY)


@dataclass(frozen=True)
class Op:
    """An op, and how to put one of its rows in other company.

    Attributes:
        small, full: shapes of at least MANY rows, for the interpreter and a GPU.
        by_row: the arguments that have a row's own values, with the axis of the rows.
        axis: of the rows in the results.
        mode: arguments with which a row's bits do not depend on the others; none if they never do.
        company: numbers of rows to be among, in the interpreter.
        cancel: changes the inputs so that the first and the last part of a sum cancel: then the
            order of sums shows in a result of bf16.
        result: of what the op returns, what must be the same.
    """

    spec: OpSpec
    small: Any
    full: Any
    by_row: dict[str, int]
    axis: int = 0
    mode: dict[str, Any] = field(default_factory=dict)
    company: tuple[int, ...] = COMPANY
    cancel: Callable[[dict[str, Any]], None] = lambda inputs: None
    result: Callable[[Any], Any] = lambda result: result

    def __str__(self) -> str:
        return self.spec.name

    def rows(self, inputs: dict[str, Any], rows: list[int]) -> dict[str, Any]:
        some = torch.tensor(rows, device=DEVICE)
        own = {
            name: inputs[name].index_select(axis, some)
            for name, axis in self.by_row.items()
            if inputs.get(name) is not None
        }
        if "query_start_loc" in inputs:
            own["query_start_loc"] = torch.tensor([0, len(rows)], dtype=torch.int32, device=DEVICE)
        return {**inputs, **own}

    def call(self, inputs: dict[str, Any], mode: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        result = self.result(self.spec.function(**inputs, **mode))
        return result if isinstance(result, tuple) else (result,)

    def same_bits(self, shape: Any, mode: dict[str, Any]) -> bool:
        """Whether the last row has the same bits alone, and amid each number of others."""
        inputs = self.spec.inputs(shape, device=DEVICE)
        self.cancel(inputs)
        mine = MANY - 1
        alone = self.call(self.rows(inputs, [mine]), mode)
        for count in self.company if DEVICE == "cpu" else COMPANY:
            place = count // 2
            rows = [*range(place), mine, *range(place, count - 1)]
            among = self.call(self.rows(inputs, rows), mode)
            for one, many in zip(alone, among, strict=True):
                own = many.narrow(self.axis, place, 1) if many.dim() else many
                # Bytes, as NaN is not equal to itself.
                if not torch.equal(_bytes(one), _bytes(own)):
                    return False
        return True


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _in_order(selected: torch.Tensor) -> torch.Tensor:
    return selected.sort(1).values


def _cancel_in_einsum(inputs: dict[str, Any]) -> None:
    for name in ("a", "b"):
        inputs[name][..., -128:] = inputs[name][..., :128]
    inputs["b_scale"][..., 0] = inputs["b_scale"][..., -1] = 8.0
    inputs["a_scale"][..., 0] = 2.0**20
    inputs["a_scale"][..., -1] = -(2.0**20)


def _cancel_in_head(inputs: dict[str, Any]) -> None:
    inputs["hs"][:, -1, -64:] = inputs["hs"][:, 0, :64]
    inputs["fn"][:, :64] = 2.0**14
    inputs["fn"][:, -64:] = -(2.0**14)


INVARIANT = {"batch_invariant": True}
OPS = (
    Op(
        SPARSE_MLA,
        SparseMlaShape(MANY, heads=4, swa=20, extra=130, rows=300, holes=0.1),
        SparseMlaShape(MANY, holes=0.1, table=True),
        dict.fromkeys(
            ("q", "swa_indices", "swa_lens", "extra_indices", "extra_lens", "request_ids"), 0
        ),
        mode={"policy": LaunchPolicy(batch_invariant=True)},
        company=(7, 20),
    ),
    Op(
        FP8_EINSUM,
        Fp8EinsumShape(MANY, groups=2, cols=40, depth=2048),
        Fp8EinsumShape(MANY, groups=2),
        dict.fromkeys(("a", "a_scale"), 0),
        mode=INVARIANT,
        cancel=_cancel_in_einsum,
    ),
    Op(
        HC_PRENORM_GEMM,
        HcPrenormGemmShape(MANY, depth=1600),
        HcPrenormGemmShape(MANY, depth=16_384),
        {"x": 0},
        axis=1,
        mode=INVARIANT,
    ),
    Op(
        HC_HEAD,
        HcHeadShape(MANY, width=400),
        HcHeadShape(MANY),
        {"hs": 0},
        mode=INVARIANT,
        cancel=_cancel_in_head,
    ),
    Op(
        HC_PRE,
        HcPreShape(MANY, width=96, splits=5),
        HcPreShape(MANY, splits=32),
        {"parts": 1, "sqrsum": 1, "residual": 0},
    ),
    Op(
        HC_POST,
        HcPostShape(MANY, width=300),
        HcPostShape(MANY),
        dict.fromkeys(("x", "residual", "post_mix", "comb_mix"), 0),
    ),
    Op(
        MQA_LOGITS,
        MqaLogitsShape(MANY, 150, heads=8, ranges="random"),
        MqaLogitsShape(MANY, 20_000, ranges="random"),
        dict.fromkeys(("q", "weights", "ks", "ke"), 0),
    ),
    Op(
        PAGED_MQA_LOGITS,
        PagedMqaLogitsShape(MANY, 150, heads=8, lens="ragged"),
        PagedMqaLogitsShape(MANY, 20_000, lens="ragged"),
        dict.fromkeys(("q", "weights", "context_lens", "block_table"), 0),
    ),
    Op(
        PAGED_MQA_TOPK,
        PagedMqaTopkShape(MANY, 4200, 16, heads=2, lens="full"),
        PagedMqaTopkShape(MANY, 20_000, lens="full"),
        dict.fromkeys(("q", "weights", "lens"), 0),
        # Alone a row's keys are shared by two programs, amid 16 others by one.
        company=(17,),
        # Which positions; their order depends on the others.
        result=_in_order,
    ),
)


def test_every_op_is_here_but_the_one_that_the_mode_does_not_take():
    here = {op.spec.name for op in OPS}
    assert {spec.name for spec in SPECS} - here == {"hc_post_prenorm_gemm"}


@pytest.mark.parametrize("op", OPS, ids=str)
def test_a_row_has_the_same_bits_in_any_company(op):
    assert op.same_bits(op.small, op.mode)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS, ids=str)
def test_a_row_of_the_model_has_the_same_bits_in_any_company(op):
    assert op.same_bits(op.full, op.mode)


@pytest.mark.skipif(DEVICE == "cuda", reason="the small shapes have one plan on a large GPU")
@pytest.mark.parametrize("op", [op for op in OPS if op.mode], ids=str)
def test_without_the_mode_the_bits_depend_on_the_company(op):
    assert not op.same_bits(op.small, {})


@pytest.mark.parametrize("op", [op for op in OPS if op.mode], ids=str)
def test_the_mode_computes_the_same(op):
    inputs = op.rows(op.spec.inputs(op.small, device=DEVICE), [0, 1, 2])
    want = op.result(op.spec.oracle(**inputs))
    wanted = want if isinstance(want, tuple) else (want,)
    for got, expected in zip(op.call(inputs, op.mode), wanted, strict=True):
        if op.spec is HC_PRENORM_GEMM:
            got, expected = got.sum(0), expected.sum(0)
        error = (got.float() - expected.float()).norm() / expected.float().norm()
        # The interpreter truncates to bf16 where a GPU rounds, the terms of the prenorm's weights
        # too.
        assert error <= (op.spec.tolerance if DEVICE == "cuda" else 2**-7), op


def test_it_does_not_matter_in_which_launch_a_token_is(monkeypatch):
    shape = SparseMlaShape(7, heads=4, swa=20, extra=130, rows=300, lens="ragged")
    inputs = SPARSE_MLA.inputs(shape, device=DEVICE)
    policy = LaunchPolicy(batch_invariant=True)
    together = SPARSE_MLA.function(**inputs, policy=policy)
    plan = sparse_mla.choose(7, 4, 150, sms=8, policy=policy)
    module = importlib.import_module("vllm_sm12x.ops.sparse_mla")
    in_threes = replace(plan, tokens_per_launch=3)
    monkeypatch.setattr(module, "choose", lambda *shape, **where: in_threes)
    assert torch.equal(SPARSE_MLA.function(**inputs, policy=policy), together)


@pytest.mark.parametrize("next_n", [2, 3, 4])
def test_index_scores_of_drafts_are_those_of_single_rows(next_n):
    """A batch's next_n is that of its requests; where drafts are off, it is 1."""
    inputs = PAGED_MQA_LOGITS.inputs(
        PagedMqaLogitsShape(3, 150, next_n=next_n, heads=64, lens="rows"), device=DEVICE
    )
    together = PAGED_MQA_LOGITS.function(**inputs)
    inputs["q"] = inputs["q"].flatten(0, 1).unsqueeze(1)
    inputs["context_lens"] = inputs["context_lens"].flatten()
    inputs["block_table"] = inputs["block_table"].repeat_interleave(next_n, 0)
    assert torch.equal(PAGED_MQA_LOGITS.function(**inputs), together)


@pytest.mark.parametrize(
    "keys",
    [(150, 300), pytest.param((16_000, 40_000), marks=pytest.mark.gpu)],
    ids=["few", "many"],
)
def test_index_scores_do_not_depend_on_other_requests_keys(keys):
    """A chunk of a prefill has the keys of some requests, one after the other."""
    own, together = keys
    inputs = MQA_LOGITS.inputs(MqaLogitsShape(5, together, ranges="full"), device=DEVICE)
    before = together - own
    inputs["ks"] += before
    alone = {**inputs, "k": inputs["k"][before:], "k_scale": inputs["k_scale"][before:]}
    alone |= {"ks": inputs["ks"] - before, "ke": inputs["ke"] - before}
    got = MQA_LOGITS.function(**inputs)[:, before:]
    assert torch.equal(MQA_LOGITS.function(**alone), got)


def test_equal_scores_are_selected_by_position_in_any_company():
    op = next(op for op in OPS if op.spec is PAGED_MQA_TOPK)
    shape = PagedMqaTopkShape(MANY, 4200, 16, heads=2, lens="full", scores="constant")
    inputs = op.spec.inputs(shape, device=DEVICE)
    for count in (1, 17):
        (selected,) = op.call(op.rows(inputs, list(range(count))), {})
        assert selected.tolist() == [list(range(16))] * count


@given(
    tokens=st.integers(1, 9000),
    heads=st.integers(1, 128),
    candidates=st.integers(1, 9000),
    sms=st.sampled_from([8, 48, 132, 170, 188]),
    head_block=st.sampled_from([None, 1, 2, 4]),
    topk_chunk=st.sampled_from([16, 32, 512]),
    mma=st.booleans(),
    wgmma=st.booleans(),
)
def test_in_the_mode_one_plan_serves_any_number_of_rows(
    tokens, heads, candidates, sms, head_block, topk_chunk, mma, wgmma
):
    policy = LaunchPolicy(head_block=head_block, topk_chunk=topk_chunk, batch_invariant=True)
    one, many = (
        sparse_mla.choose(count, heads, candidates, sms=sms, policy=policy, mma=mma, wgmma=wgmma)
        for count in (1, tokens)
    )
    assert one == many
    assert one.num_splits * one.config.block_n <= max(topk_chunk, one.config.block_n)
    if one.num_splits > 1:
        held = one.tokens_per_launch * one.num_splits * heads * 512 * 4
        assert held <= max(64 << 20, one.num_splits * heads * 512 * 4)
    shape = (heads, candidates, -(-candidates // 128))
    plans = {
        fp8_einsum.choose(t, *shape, sms=sms, batch_invariant=True, hopper=wgmma)
        for t in (1, tokens)
    }
    assert {plan.num_splits for plan in plans} == {1} and len(plans) == 1
    splits = {
        hc_prenorm_gemm.splits_of(t, candidates, sms=sms, batch_invariant=True) for t in (1, tokens)
    }
    assert len(splits) == 1
    assert hc_prenorm_gemm.choose(1, batch_invariant=True) == hc_prenorm_gemm.choose(
        tokens, batch_invariant=True
    )


def test_without_the_mode_plans_follow_the_number_of_rows():
    def plans(tokens: int) -> tuple:
        return (
            sparse_mla.choose(tokens, 64, 640, sms=188, policy=LaunchPolicy()),
            fp8_einsum.choose(tokens, 8, 1024, 32, sms=188),
            hc_prenorm_gemm.splits_of(tokens, 16_384, sms=188),
            # Elementwise: which of its tiles a column is in does not matter.
            hc_post.choose(tokens, 4096, sms=188),
        )

    assert all(one != many for one, many in zip(plans(1), plans(4096), strict=True))

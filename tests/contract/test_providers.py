# SPDX-License-Identifier: Apache-2.0
"""Who serves each op: what is found, what is refused in which words, and DeepGEMM's adapters."""

import inspect
import math
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from toolkits import SM120_HEADERS, cuda_toolkit, deep_gemm_package

from vllm_sm12x import knobs, ops
from vllm_sm12x.changes import host as host_changes
from vllm_sm12x.integration import deep_gemm_ops, providers, toolkit
from vllm_sm12x.ops.fp8_einsum.reference import fp8_einsum_reference
from vllm_sm12x.ops.fp8_einsum.spec import Fp8EinsumShape, fp8_einsum_inputs
from vllm_sm12x.ops.hc_post_prenorm_gemm.config import MOST_TOKENS
from vllm_sm12x.ops.hc_prenorm_gemm.reference import hc_prenorm_gemm_reference
from vllm_sm12x.ops.mqa_logits.reference import mqa_logits_reference
from vllm_sm12x.ops.mqa_logits.spec import MqaLogitsShape, mqa_logits_inputs
from vllm_sm12x.ops.paged_mqa_logits.reference import paged_mqa_logits_reference
from vllm_sm12x.ops.paged_mqa_logits.spec import PagedMqaLogitsShape, paged_mqa_logits_inputs
from vllm_sm12x.vllm_api import deep_gemm

TILED = "VLLM_DEEP_GEMM_SM120_PAGED_MQA_TILED"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """No settings, no CUDA toolkit, and a DeepGEMM with SM120 kernels, in folders of the test."""
    for name in list(os.environ):
        if name.startswith(("VLLM_", "DG_", "CUDA_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(toolkit, "_DEFAULT_HOME", tmp_path / "usr_local_cuda")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    monkeypatch.delitem(sys.modules, "deep_gemm", raising=False)
    deep_gemm_package(tmp_path / "site")
    return tmp_path


@pytest.fixture
def complete(machine, monkeypatch):
    """The same with nvcc 12.9."""
    monkeypatch.setenv("CUDA_HOME", str(cuda_toolkit(machine / "cuda", "12.9")))
    return machine


def refusal(op: str) -> str:
    with pytest.raises(providers.NoProvider) as raised:
        providers.chosen(op)
    sentence = str(raised.value)
    assert "\n" not in sentence and sentence.endswith(".") and ". " not in sentence
    assert sentence.startswith(f"The op {op} has no provider: ")
    return sentence


@pytest.mark.parametrize("setting", [None, "auto", "triton", "fp8_einsum=deep_gemm"])
def test_ours_serves_unless_deep_gemm_is_asked_for(machine, monkeypatch, setting):
    if setting:
        monkeypatch.setenv("VLLM_SM12X_PROVIDERS", setting)
    assert providers.chosen("mqa_logits").name == "triton"
    assert providers.implementation("mqa_logits") is ops.mqa_logits


def test_where_batches_must_not_matter_ours_take_one_plan(complete, monkeypatch):
    from vllm_sm12x.integration import hyper_connections

    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    one_plan = {"batch_invariant": True}
    for op in ("fp8_einsum", "hc_prenorm_gemm"):
        served = providers.implementation(op)
        assert (served.func, served.keywords) == (getattr(ops, op), one_plan)
    assert hyper_connections.head.__wrapped__().keywords == one_plan
    assert hyper_connections.most_tokens_of_one_kernel.__wrapped__() == 0
    # Their sums are the same in any plan.
    for op in ("mqa_logits", "paged_mqa_logits"):
        assert providers.implementation(op) is getattr(ops, op)
    monkeypatch.setenv("VLLM_SM12X_PROVIDERS", "deep_gemm")
    sentence = refusal("hc_prenorm_gemm")
    assert "VLLM_BATCH_INVARIANT is set, and its sums are split by the number of tokens" in sentence
    assert "unset VLLM_BATCH_INVARIANT" in sentence
    assert providers.chosen("fp8_einsum").name == "deep_gemm"


def test_a_deep_gemm_that_is_asked_for_multiplies_what_hc_post_wrote(complete, monkeypatch):
    from vllm_sm12x.integration import hyper_connections

    most_tokens = hyper_connections.most_tokens_of_one_kernel.__wrapped__
    assert most_tokens() == MOST_TOKENS
    monkeypatch.setenv("VLLM_SM12X_PROVIDERS", "hc_prenorm_gemm=deep_gemm")
    assert most_tokens() == 0


def test_an_engine_that_is_taken_for_sm12x_has_the_einsum_of_sm12x(machine, monkeypatch):
    assert providers.implementation("fp8_einsum") is ops.fp8_einsum
    monkeypatch.setenv("VLLM_SM12X_ASSUME", "12.0")
    served = providers.implementation("fp8_einsum")
    assert (served.func, served.keywords) == (ops.fp8_einsum, {"wgmma": False})
    for op in ("hc_prenorm_gemm", "mqa_logits", "paged_mqa_logits"):
        assert providers.implementation(op) is getattr(ops, op)


@pytest.mark.parametrize("op", providers.OPS)
def test_deep_gemm_serves_what_it_is_asked_for(complete, monkeypatch, op):
    monkeypatch.setenv("VLLM_SM12X_PROVIDERS", f"{op}=deep_gemm")
    provider = providers.chosen(op)
    assert provider.name == "deep_gemm"
    assert "VLLM_SM12X_PROVIDERS asks for it" in provider.why
    assert str(complete / "site" / "deep_gemm") in provider.why
    assert f"{complete / 'cuda' / 'bin' / 'nvcc'} 12.9" in provider.why
    assert providers.implementation(op) is getattr(deep_gemm_ops, op)
    others = set(providers.OPS) - {op}
    assert {providers.chosen(other).name for other in others} == {"triton"}


@pytest.mark.parametrize("op", providers.OPS)
def test_a_deep_gemm_without_the_ops_sm120_kernel_is_refused(complete, monkeypatch, op):
    header = SM120_HEADERS[providers.OPS.index(op)]
    impls = complete / "site" / "deep_gemm" / "include" / "deep_gemm" / "impls"
    (impls / header).unlink()
    monkeypatch.setenv("VLLM_SM12X_PROVIDERS", "deep_gemm")
    for word in (
        f"the DeepGEMM in {complete / 'site' / 'deep_gemm'} has no SM120 kernel for it",
        header,
        "triton because VLLM_SM12X_PROVIDERS asks for deep_gemm",
        "install a DeepGEMM with SM120 kernels",
        f"set {op}=triton in VLLM_SM12X_PROVIDERS",
    ):
        assert word in refusal(op)
    others = set(providers.OPS) - {op}
    assert {providers.chosen(other).name for other in others} == {"deep_gemm"}


def test_the_installed_deep_gemm_comes_before_vllms_copy(complete, monkeypatch):
    assert deep_gemm.package_folder() == complete / "site" / "deep_gemm"
    monkeypatch.setattr(sys, "path", sys.path[1:])
    vendored = deep_gemm.package_folder()
    assert vendored is not None and vendored.parts[-3:] == ("vllm", "third_party", "deep_gemm")
    assert (vendored / "include" / "deep_gemm" / "impls").is_dir()


def test_that_is_the_order_in_which_vllm_imports_it(monkeypatch):
    tried = []

    def import_module(name):
        tried.append(name)
        raise ImportError(name)

    theirs = deep_gemm.wrappers()
    monkeypatch.setattr(theirs.importlib, "import_module", import_module)
    assert theirs._import_deep_gemm.__wrapped__() is None
    assert tried == ["deep_gemm", "vllm.third_party.deep_gemm"]


def test_no_deep_gemm_is_refused(complete, monkeypatch):
    monkeypatch.setattr(deep_gemm, "package_folder", lambda: None)
    monkeypatch.setenv("VLLM_SM12X_PROVIDERS", "deep_gemm")
    sentence = refusal("fp8_einsum")
    assert "deep_gemm is refused because no DeepGEMM is installed" in sentence
    assert "install a DeepGEMM with SM120 kernels" in sentence


def test_no_compiler_is_refused(machine, monkeypatch):
    monkeypatch.setenv("VLLM_SM12X_PROVIDERS", "deep_gemm")
    sentence = refusal("paged_mqa_logits")
    assert "nvcc was not found (it is neither on PATH nor " in sentence
    assert "install CUDA toolkit 12.9 or later and set CUDA_HOME to it" in sentence


def test_an_old_compiler_is_refused(machine, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(cuda_toolkit(machine / "cuda", "12.8")))
    monkeypatch.setenv("VLLM_SM12X_PROVIDERS", "deep_gemm")
    sentence = refusal("paged_mqa_logits")
    assert f"{machine / 'cuda/bin/nvcc'} is 12.8, and SM12x needs 12.9 or later" in sentence


def test_auto_falls_to_deep_gemm_where_triton_is_not_installed(complete, monkeypatch):
    find_spec = providers.importlib.util.find_spec
    absent = {"triton"}
    monkeypatch.setattr(
        providers.importlib.util,
        "find_spec",
        lambda name: None if name in absent else find_spec(name),
    )
    assert providers.chosen("fp8_einsum").name == "deep_gemm"
    monkeypatch.delenv("CUDA_HOME")
    sentence = refusal("fp8_einsum")
    assert "triton is refused because the package triton is not installed" in sentence
    assert "deep_gemm is refused because DeepGEMM compiles at run time and nvcc" in sentence
    assert "install triton, or install CUDA toolkit 12.9" in sentence


class TestCompiler:
    def test_cuda_home_then_cuda_path_then_path_then_the_default(self, machine, monkeypatch):
        for name in ("home", "path", "on_path", "usr_local_cuda"):
            cuda_toolkit(machine / name, "13.0")
        monkeypatch.setenv("CUDA_HOME", str(machine / "home"))
        monkeypatch.setenv("CUDA_PATH", str(machine / "path"))
        monkeypatch.setenv("PATH", f"{machine / 'on_path' / 'bin'}:{os.environ['PATH']}")
        for leaving, found in (
            ("CUDA_HOME", "home"),
            ("CUDA_PATH", "path"),
            ("PATH", "on_path"),
            (None, "usr_local_cuda"),
        ):
            expected = (True, f"{machine / found / 'bin' / 'nvcc'} 13.0")
            assert toolkit.compiler_for_sm12x() == expected
            if leaving:
                monkeypatch.delenv(leaving)

    def test_a_folder_that_a_variable_names_is_not_passed_over(self, machine, monkeypatch):
        cuda_toolkit(machine / "usr_local_cuda", "13.0")
        monkeypatch.setenv("CUDA_HOME", str(machine / "gone"))
        found = toolkit.compiler_for_sm12x()
        assert not found.yes
        assert f"{machine / 'gone/bin/nvcc'} does not exist" in found.reason

    @pytest.mark.parametrize("script", ["#!/bin/sh\nexit 3\n", "#!/bin/sh\necho hello\n", "no\n"])
    def test_an_nvcc_that_says_nothing_is_refused(self, machine, monkeypatch, script):
        home = cuda_toolkit(machine / "broken", "13.0")
        (home / "bin" / "nvcc").write_text(script)
        monkeypatch.setenv("CUDA_HOME", str(home))
        found = toolkit.compiler_for_sm12x()
        assert not found.yes and str(home / "bin" / "nvcc") in found.reason


class TestServedOps:
    def test_the_tiled_setting_has_an_effect_in_a_deep_gemm_that_reads_it(
        self, complete, monkeypatch
    ):
        def why() -> str:
            served = {row.op: row.why for row in host_changes.served_ops()}
            assert TILED not in served["mqa_logits"]
            return served["paged_mqa_logits"]

        assert f"{TILED} has no effect" in why()
        monkeypatch.setenv("VLLM_SM12X_PROVIDERS", "paged_mqa_logits=deep_gemm")
        assert f"{TILED} has no effect" in why()
        library = complete / "site" / "deep_gemm" / "_C.abi3.so"
        library.write_bytes(b"\x7fELF\0" + knobs.DEEP_GEMM_TILED.encode() + b"\0")
        assert f"{TILED} has an effect" in why()

    def test_an_op_that_nobody_serves_is_a_row_too(self, machine, monkeypatch):
        monkeypatch.setenv("VLLM_SM12X_PROVIDERS", "fp8_einsum=deep_gemm")
        served = {row.op: row for row in host_changes.served_ops()}
        assert set(served) == set(providers.OPS)
        assert served["fp8_einsum"].provider is None
        assert served["fp8_einsum"].why == refusal("fp8_einsum")
        assert served["mqa_logits"].provider == "triton"


class DeepGemmStandIn:
    """The signatures of vllm.utils.deep_gemm, and what DeepGEMM's host code asserts."""

    def fp8_fp4_mqa_logits(self, q, kv, weights, cu_seqlen_ks, cu_seqlen_ke, clean_logits):
        assert q[0].is_contiguous() and q[1] is None and clean_logits is False
        return mqa_logits_reference(q[0], *kv, weights, cu_seqlen_ks, cu_seqlen_ke)

    def get_paged_mqa_logits_metadata(self, context_lens, block_size, num_sms):
        assert context_lens.dim() == 2 and context_lens.is_contiguous()
        assert context_lens.dtype == torch.int32 and context_lens.min() >= 0
        return SimpleNamespace(lens=context_lens, block_size=block_size, num_sms=num_sms)

    def fp8_fp4_paged_mqa_logits(
        self, q, kv_cache, weights, context_lens, block_tables, schedule_metadata, max_model_len,
        clean_logits,
    ):  # fmt: skip
        values, scale = q
        requests, next_n = values.shape[:2]
        assert scale is None and isinstance(clean_logits, bool) and values.is_contiguous()
        assert next_n in (1, 2), "SM90 takes no other"
        assert context_lens.shape == (requests, next_n) and len(block_tables) == requests
        assert schedule_metadata.lens is context_lens
        assert schedule_metadata.block_size == kv_cache.shape[1]
        return paged_mqa_logits_reference(
            values, kv_cache, weights, context_lens, block_tables, max_model_len=max_model_len
        )

    def fp8_einsum(self, expression, a, b, out, recipe):
        assert expression == "bhr,hdr->bhd" and recipe == (1, 128, 128)
        assert a[1].dtype == b[1].dtype == torch.float32
        out.copy_(fp8_einsum_reference(*a, *b))

    def tf32_hc_prenorm_gemm(self, x, fn, out, sqrsum, num_split):
        assert out.shape == (num_split, len(x), len(fn)) and sqrsum.shape == (num_split, len(x))
        depth = -(-x.shape[1] // num_split)
        for split, part in enumerate(zip(x.split(depth, 1), fn.split(depth, 1), strict=True)):
            out[split], sqrsum[split] = (each[0] for each in hc_prenorm_gemm_reference(*part))


class DeepGemmStandInFrom028(DeepGemmStandIn):
    """Rows of one request may name it."""

    def get_paged_mqa_logits_metadata(self, context_lens, block_size, num_sms, indices=None):
        assert indices is None
        return super().get_paged_mqa_logits_metadata(context_lens, block_size, num_sms)

    def fp8_fp4_paged_mqa_logits(
        self, q, kv_cache, weights, context_lens, block_tables, schedule_metadata, max_model_len,
        clean_logits, indices=None,
    ):  # fmt: skip
        assert indices is None
        return super().fp8_fp4_paged_mqa_logits(
            q, kv_cache, weights, context_lens, block_tables, schedule_metadata, max_model_len,
            clean_logits,
        )  # fmt: skip


class DeepGemmStandInFrom033(DeepGemmStandInFrom028):
    """Scores of a prefill begin at each row's first key, and nothing is cleaned."""

    def fp8_fp4_mqa_logits(self, q, kv, weights, cu_seqlen_ks, cu_seqlen_ke, max_seqlen_k):
        assert max_seqlen_k > 0 and max_seqlen_k >= int((cu_seqlen_ke - cu_seqlen_ks).max())
        whole = super().fp8_fp4_mqa_logits(q, kv, weights, cu_seqlen_ks, cu_seqlen_ke, False)
        compressed = whole.new_full((len(whole), max_seqlen_k), math.nan)
        ranges = zip(cu_seqlen_ks.tolist(), cu_seqlen_ke.tolist(), strict=True)
        for row, (start, end) in enumerate(ranges):
            compressed[row, : end - start] = whole[row, start:end]
        return compressed

    def fp8_fp4_paged_mqa_logits(
        self, q, kv_cache, weights, context_lens, block_tables, schedule_metadata, max_model_len,
        indices=None,
    ):  # fmt: skip
        logits = super().fp8_fp4_paged_mqa_logits(
            q, kv_cache, weights, context_lens, block_tables, schedule_metadata, max_model_len,
            True, indices,
        )  # fmt: skip
        return logits.masked_fill(logits == -math.inf, math.nan)


GENERATIONS = {
    (0, 23): DeepGemmStandIn,
    (0, 28): DeepGemmStandInFrom028,
    (0, 33): DeepGemmStandInFrom033,
}


@pytest.fixture(params=GENERATIONS, ids=lambda first: "from {}.{}".format(*first))
def wrappers(request, monkeypatch):
    """A stand-in for vllm.utils.deep_gemm that checks what it is given, and computes plainly."""
    stand_in = GENERATIONS[request.param]()
    monkeypatch.setattr(deep_gemm, "wrappers", lambda: stand_in)
    return stand_in


class TestAdapters:
    """DeepGEMM behind the signatures of our ops gives what the ops' oracles give."""

    def test_the_stand_in_has_the_signatures_of_vllm(self, vllm_version):
        """But for fp8_einsum, whose arguments vLLM hands on as they are."""
        stand_in = GENERATIONS[max(first for first in GENERATIONS if first <= vllm_version)]()
        methods = {name for name in vars(DeepGemmStandIn) if not name.startswith("_")}
        for name in methods - {"fp8_einsum"}:
            theirs = inspect.signature(getattr(deep_gemm.wrappers(), name)).parameters
            ours = inspect.signature(getattr(stand_in, name)).parameters
            assert list(ours) == list(theirs), name

    @pytest.mark.parametrize("given_out", [False, True])
    def test_mqa_logits(self, wrappers, given_out):
        inputs = mqa_logits_inputs(MqaLogitsShape(rows=5, keys=40, heads=8), device="cpu")
        want = mqa_logits_reference(**inputs)
        out = torch.empty_like(want) if given_out else None
        got = deep_gemm_ops.mqa_logits(**inputs, out=out)
        assert out is None or got is out
        column = torch.arange(want.shape[1])
        seen = (column >= inputs["ks"][:, None]) & (column < inputs["ke"][:, None])
        assert seen.any(1).all() and torch.equal(got[seen], want[seen])

    @pytest.mark.parametrize("lens", ["full", "ragged", "rows"])
    @pytest.mark.parametrize("next_n", [1, 2, 3, 5])
    def test_paged_mqa_logits(self, wrappers, next_n, lens):
        shape = PagedMqaLogitsShape(
            requests=4, context=70, next_n=next_n, heads=4, columns=96, block_size=16, lens=lens
        )
        inputs = paged_mqa_logits_inputs(shape, device="cpu")
        want = paged_mqa_logits_reference(**inputs)
        out = torch.empty_like(want)
        assert deep_gemm_ops.paged_mqa_logits(**inputs, out=out) is out
        assert want.isfinite().any()
        torch.testing.assert_close(out, want)

    @pytest.mark.parametrize("scales", [torch.float32, torch.uint8, torch.float8_e8m0fnu])
    def test_fp8_einsum(self, wrappers, scales):
        inputs = fp8_einsum_inputs(Fp8EinsumShape(tokens=3, groups=2, cols=192, depth=256),
                                   device="cpu")  # fmt: skip
        for name in ("a_scale", "b_scale"):
            e8m0 = inputs[name].float().to(torch.float8_e8m0fnu)
            inputs[name] = e8m0.view(torch.uint8) if scales is torch.uint8 else e8m0.to(scales)
        want = fp8_einsum_reference(**inputs)
        assert torch.equal(deep_gemm_ops.fp8_einsum(**inputs), want.bfloat16())

    @pytest.mark.parametrize("num_splits", [None, 1, 3])
    def test_hc_prenorm_gemm(self, wrappers, num_splits):
        gen = torch.Generator().manual_seed(0)
        x = torch.randn(6, 1536, generator=gen).bfloat16()
        fn = torch.randn(24, 1536, generator=gen)
        out, sqrsum = deep_gemm_ops.hc_prenorm_gemm(x, fn, num_splits=num_splits)
        # vLLM's compute_num_split with 8 multiprocessors and K = 1536: min(8 / 1, 24 / 4).
        assert len(out) == len(sqrsum) == (num_splits or 6)
        want, want_sqrsum = hc_prenorm_gemm_reference(x, fn)
        torch.testing.assert_close(out.sum(0), want[0], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(sqrsum.sum(0), want_sqrsum[0])

    def test_nothing_is_asked_for_no_tokens(self, monkeypatch):
        monkeypatch.setattr(deep_gemm, "wrappers", lambda: pytest.fail("asked"))
        x, fn = torch.empty(0, 512, dtype=torch.bfloat16), torch.empty(24, 512)
        out, sqrsum = deep_gemm_ops.hc_prenorm_gemm(x, fn)
        assert out.shape[1:] == (0, 24) and sqrsum.shape[1:] == (0,)

# SPDX-License-Identifier: Apache-2.0
"""What `vllm serve` makes of DeepSeek V4 on SM12x, and that the user's own choices stand."""

import pytest

pytestmark = pytest.mark.contract

OURS = "vllm_sm12x.integration"
OUR_WORKER = f"{OURS}.worker.Sm12xWorker"
OUR_ATTENTION = f"{OURS}.sparse_mla.TritonMlaSparseAttention"
MODEL_PACKAGE = "vllm.models.deepseek_v4.nvidia"


@pytest.fixture(scope="module")
def configs(host):
    """Many configs in one front end with two GPUs: facts, or the message with which it refused."""
    return host(
        """
from vllm.config import CompilationConfig
from vllm.engine.arg_utils import EngineArgs

fp8 = ["--kv-cache-dtype", "fp8", "--block-size", "256"]
CASES = {
    "plain": lambda: served_config(MODEL, *fp8),
    "without cache flags": lambda: served_config(MODEL),
    "fp8_e4m3": lambda: served_config(MODEL, "--kv-cache-dtype", "fp8_e4m3"),
    "fp8_ds_mla": lambda: served_config(MODEL, "--kv-cache-dtype", "fp8_ds_mla"),
    "bfloat16": lambda: served_config(MODEL, "--kv-cache-dtype", "bfloat16"),
    "fp8_e5m2": lambda: served_config(MODEL, "--kv-cache-dtype", "fp8_e5m2"),
    "block size 64": lambda: served_config(MODEL, "--kv-cache-dtype", "fp8", "--block-size", "64"),
    "two GPUs": lambda: served_config(MODEL, *fp8, "--tensor-parallel-size", "2"),
    "mtp": lambda: served_config(
        MODEL, *fp8, "--speculative-config", '{"method": "mtp", "num_speculative_tokens": 2}'
    ),
    "by name": lambda: served_config(MODEL, *fp8, "--attention-backend", "TRITON_MLA_SPARSE"),
    "by name, lower case": lambda: served_config(
        MODEL, *fp8, "--attention-backend", "triton_mla_sparse"
    ),
    "by config": lambda: served_config(
        MODEL, *fp8, "--attention-config", '{"backend": "TRITON_MLA_SPARSE"}'
    ),
    "misspelt": lambda: served_config(MODEL, *fp8, "--attention-backend", "TRITON_MLA_SPARS"),
    "FlashMLA": lambda: served_config(MODEL, *fp8, "--attention-backend", FLASHMLA),
    "FlashInfer": lambda: served_config(
        MODEL, *fp8, "--attention-backend", "FLASHINFER_MLA_SPARSE_DSV4"
    ),
    "eager": lambda: served_config(MODEL, *fp8, "--enforce-eager"),
    "piecewise": lambda: served_config(
        MODEL, *fp8, "--compilation-config",
        '{"cudagraph_mode": "PIECEWISE", "cudagraph_capture_sizes": [1, 3, 6]}',
    ),
    "own worker": lambda: served_config(MODEL, *fp8, "--worker-cls", "worker_classes.Derived"),
    "stock worker": lambda: served_config(
        MODEL, *fp8, "--worker-cls", "vllm.v1.worker.gpu_worker.Worker"
    ),
    "stock worker and by name": lambda: served_config(
        MODEL, *fp8, "--worker-cls", "vllm.v1.worker.gpu_worker.Worker",
        "--attention-backend", "TRITON_MLA_SPARSE",
    ),
}
FLASHMLA = "FLASHMLA_SPARSE"

def examine(make):
    try:
        config = make()
    except Exception as error:
        return {"refused": str(error)}
    return {**config_facts(config), "worker": worker_facts(config)}

answer({name: examine(make) for name, make in CASES.items()})
""",
        count=2,
    ).answer


@pytest.mark.parametrize(
    "case", ["plain", "two GPUs", "mtp", "eager", "piecewise", "fp8_e4m3", "fp8_ds_mla"]
)
def test_chosen_by_itself(configs, case):
    assert configs[case]["attention_backend"] is None
    assert configs[case]["worker"] == {"class": OUR_WORKER, "attention": OUR_ATTENTION}


@pytest.mark.parametrize("case", ["by name", "by name, lower case", "by config"])
def test_chosen_by_name(configs, case):
    assert configs[case]["worker"] == {"class": OUR_WORKER, "attention": OUR_ATTENTION}


def test_the_name_is_checked_as_vllm_checks_it(configs):
    assert "Unknown attention backend: 'TRITON_MLA_SPARS'" in configs["misspelt"]["refused"]


def test_another_attention_backend_stands(configs, vllm_version):
    assert configs["FlashMLA"]["attention_backend"] == "FLASHMLA_SPARSE"
    assert configs["FlashMLA"]["worker"]["attention"] == (
        f"{MODEL_PACKAGE}.flashmla.DeepseekV4FlashMLAAttention"
    )
    flashinfer = "SM120" if vllm_version >= (0, 24) else "MLA"
    assert configs["FlashInfer"]["worker"]["attention"] == (
        f"{MODEL_PACKAGE}.flashinfer_sparse.DeepseekV4FlashInfer{flashinfer}Attention"
    )


def test_cuda_graphs_are_vllms_default(configs):
    assert configs["plain"]["enforce_eager"] is False
    assert configs["plain"]["cudagraph_mode"] == "FULL_AND_PIECEWISE"
    assert {1, 2, 4, 8} <= set(configs["plain"]["capture_sizes"])


def test_the_users_compilation_choices_stand(configs):
    assert configs["eager"]["enforce_eager"] is True
    assert configs["eager"]["cudagraph_mode"] == "NONE"
    assert configs["piecewise"]["cudagraph_mode"] == "PIECEWISE"
    assert configs["piecewise"]["capture_sizes"] == [1, 3, 6]


def test_the_users_worker_class_stands(configs):
    assert configs["own worker"]["worker"] == {
        "class": "worker_classes.Derived",
        "attention": OUR_ATTENTION,
    }
    assert configs["stock worker"]["worker"]["class"] == "vllm.v1.worker.gpu_worker.Worker"


def test_a_worker_class_that_cannot_serve_the_named_backend_is_refused(configs):
    refusal = configs["stock worker and by name"]["refused"]
    assert "--worker-cls vllm.v1.worker.gpu_worker.Worker" in refusal
    assert OUR_WORKER in refusal


def test_the_cache_dtype_defaults_to_fp8(configs):
    assert configs["without cache flags"]["cache_dtype"] == "fp8"
    assert configs["without cache flags"]["worker"]["attention"] == OUR_ATTENTION


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8_e5m2"])
def test_a_cache_dtype_that_does_not_fit_is_refused(configs, dtype):
    refusal = configs[dtype]["refused"]
    assert f"--kv-cache-dtype {dtype}" in refusal
    assert "allowed is auto, fp8, fp8_e4m3, fp8_ds_mla" in refusal


def test_a_block_size_that_does_not_fit_is_refused(configs):
    assert "--block-size 64" in configs["block size 64"]["refused"]
    assert "256" in configs["block size 64"]["refused"]


@pytest.fixture(scope="module")
def off(host):
    """VLLM_TRITON_MLA_SPARSE=0 on SM120."""
    return host(
        """
config = served_config(MODEL, "--kv-cache-dtype", "fp8")
answer({
    "worker": worker_facts(config),
    "by_name": failure_of(
        served_config, MODEL, "--kv-cache-dtype", "fp8", "--attention-backend", "TRITON_MLA_SPARSE"
    ),
    "bfloat16": failure_of(served_config, MODEL, "--kv-cache-dtype", "bfloat16"),
})
""",
        env={"VLLM_TRITON_MLA_SPARSE": "0"},
    ).answer


def test_switched_off_vllm_chooses(off, vllm_version):
    stock = (
        "flashinfer_sparse.DeepseekV4FlashInferSM120Attention"
        if vllm_version >= (0, 24)
        else "flashmla.DeepseekV4FlashMLAAttention"
    )
    assert off["worker"]["attention"] == f"{MODEL_PACKAGE}.{stock}"
    assert off["bfloat16"] is None, "our cache rules must not bind vLLM's own attention"


def test_switched_off_and_named_is_a_contradiction(off):
    assert "TRITON_MLA_SPARSE" in off["by_name"]
    assert "VLLM_TRITON_MLA_SPARSE=0" in off["by_name"]


EVERY_KNOB = {
    "VLLM_TRITON_MLA_SPARSE": "1",
    "VLLM_DEEP_GEMM_SM120_PAGED_MQA_TILED": "0",
    "VLLM_TRITON_MLA_SPARSE_ALLOW_CUDAGRAPH": "0",
    "VLLM_TRITON_MLA_SPARSE_TOPK_CHUNK_SIZE": "256",
    "VLLM_TRITON_MLA_SPARSE_QUERY_CHUNK_SIZE": "128",
    "VLLM_TRITON_MLA_SPARSE_HEAD_BLOCK_SIZE": "2",
    "VLLM_TRITON_MLA_SPARSE_DUMP": "0",
    "VLLM_TRITON_MLA_SPARSE_DUMP_PATH": "dump.jsonl",
}


@pytest.fixture(scope="module")
def every_knob(host):
    return host(
        """
from vllm import envs

config = served_config(
    MODEL, "--kv-cache-dtype", "fp8", "--block-size", "256", "--fail-on-environ-validation"
)
answer({
    **config_facts(config),
    "worker": worker_facts(config),
    "compile_key": {name: str(value) for name, value in envs.compile_factors().items()},
    "deep_gemm": os.environ.get("DG_SM120_PAGED_MQA_TILED"),
})
""",
        env=EVERY_KNOB,
    )


def test_vllm_knows_every_variable(every_knob):
    """The process ran with --fail-on-environ-validation."""
    assert "Unknown vLLM environment variable" not in every_knob.output
    assert set(EVERY_KNOB) <= set(every_knob.answer["compile_key"])


def test_without_cudagraph_nothing_is_captured_or_compiled(every_knob):
    facts = every_knob.answer
    assert (facts["cudagraph_mode"], facts["compilation_mode"]) == ("NONE", 0)
    assert facts["enforce_eager"] is True
    assert facts["worker"]["attention"] == OUR_ATTENTION


def test_deep_gemms_own_variable_follows(every_knob):
    assert every_knob.answer["deep_gemm"] == "0"

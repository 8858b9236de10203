# SPDX-License-Identifier: Apache-2.0
"""What `vllm serve` makes of DeepSeek V4 on SM12x, and that the user's own choices stand."""

import pytest
from toolkits import cuda_toolkit, deep_gemm_package

pytestmark = pytest.mark.contract

OURS = "vllm_sm12x.integration"
OUR_WORKER = f"{OURS}.worker.Sm12xWorker"
OUR_ATTENTION = f"{OURS}.sparse_mla.TritonMlaSparseAttention"
MODEL_PACKAGE = "vllm.models.deepseek_v4.nvidia"


@pytest.fixture(scope="module")
def configs(host, tmp_path_factory):
    """Many configs in one front end with two GPUs: facts, or the message with which it refused.

    The machine has nvcc and a DeepGEMM with SM120 kernels, as far as anyone looks before the model
    is built.
    """
    machine = tmp_path_factory.mktemp("machine")
    deep_gemm_package(machine / "site")
    return host(
        """
from vllm.config import set_current_vllm_config
from vllm.platforms import current_platform

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
    with set_current_vllm_config(config):
        deep_gemm = current_platform.support_deep_gemm()
    return {**config_facts(config), "worker": worker_facts(config), "deep_gemm": deep_gemm}

answer({name: examine(make) for name, make in CASES.items()})
""",
        count=2,
        env={"CUDA_HOME": str(cuda_toolkit(machine / "cuda", "12.9"))},
        first_on_path=[machine / "site"],
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


@pytest.mark.parametrize("case", ["plain", "two GPUs", "mtp", "by name"])
def test_vllm_does_without_deep_gemm_in_linears_and_experts(configs, case):
    assert configs[case]["deep_gemm"] is False


@pytest.mark.parametrize("case", ["FlashMLA", "FlashInfer"])
def test_vllms_own_layers_get_what_vllm_decides(configs, case, vllm_version):
    """0.24 was the first to count SM12x among DeepGEMM's GPUs."""
    assert configs[case]["deep_gemm"] is (vllm_version >= (0, 24))


MXFP4_EXPERTS = """
import dataclasses
import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import select_deepseek_v4_mxfp4_moe_backend

def experts_of(config):
    model = config.model_config.hf_config
    arguments = {
        "num_experts": model.n_routed_experts,
        "num_local_experts": model.n_routed_experts,
        "num_logical_experts": model.n_routed_experts,
        "experts_per_token": model.num_experts_per_tok,
        "hidden_dim": model.hidden_size,
        "intermediate_size": model.moe_intermediate_size,
        "intermediate_size_per_partition": model.moe_intermediate_size,
        "activation": MoEActivation.SILU,
        "device": "cuda",
        "routing_method": RoutingMethodType.DeepseekV4,
        "moe_parallel_config": FusedMoEParallelConfig.make_no_parallel(),
        "in_dtype": torch.bfloat16,
        "swiglu_limit": model.swiglu_limit,
        "moe_backend": config.kernel_config.moe_backend,
    }
    fields = {field.name for field in dataclasses.fields(FusedMoEConfig)}
    if "intermediate_size" in fields:  # which then sets the other itself
        del arguments["intermediate_size_per_partition"]
    else:
        del arguments["intermediate_size"]
    return FusedMoEConfig(**arguments)

def backend_of(*flags):
    config = served_config(MODEL, "--kv-cache-dtype", "fp8", "--block-size", "256", *flags)
    with set_current_vllm_config(config):
        return select_deepseek_v4_mxfp4_moe_backend(experts_of(config))[0].name
"""


@pytest.fixture(scope="module")
def experts(host):
    """What vLLM's own choice of an MXFP4 backend says for the tiny checkpoint."""
    return host(f"""{MXFP4_EXPERTS}
def answer_or_failure(*flags):
    try:
        return backend_of(*flags)
    except ValueError as error:
        return f"ValueError: {{error}}"

answer({{
    "auto": backend_of(),
    "marlin": backend_of("--moe-backend", "marlin"),
    "emulation": answer_or_failure("--moe-backend", "emulation"),
    "deep_gemm": answer_or_failure("--moe-backend", "deep_gemm"),
}})
""").answer


def test_mxfp4_experts_run_on_marlin(experts):
    assert experts["auto"] == "MARLIN"


def test_without_the_plugin_they_run_on_deep_gemm_from_024_on(host, vllm_version):
    stock = host(f"{MXFP4_EXPERTS}\nanswer(backend_of())", plugin=False).answer
    assert stock == ("DEEPGEMM_MXFP4" if vllm_version >= (0, 24) else "MARLIN")


def test_the_users_moe_backend_stands(experts):
    assert experts["marlin"] == "MARLIN"
    # Some releases emulate with a package of AMD's, and refuse without it.
    assert experts["emulation"] == "EMULATION" or (
        experts["emulation"].startswith("ValueError: ") and "'EMULATION'" in experts["emulation"]
    )


def test_a_moe_backend_that_cannot_serve_is_refused_by_vllm_not_replaced(experts):
    assert experts["deep_gemm"].startswith("ValueError: ")
    assert "DEEPGEMM_MXFP4" in experts["deep_gemm"]


DEFAULTS = {"VLLM_SPARSE_INDEXER_MAX_LOGITS_MB": "256", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
READ_DEFAULTS = f"""
from importlib.metadata import entry_points
from vllm import envs
from vllm_sm12x import changes

def seen():
    return [int(getattr(envs, name)) for name in {list(DEFAULTS)!r}]

def states():
    for point in entry_points(group="vllm.general_plugins", name="sm12x"):
        point.load()()
    rows = {{outcome.change.name: outcome for outcome in changes.report()}}
    return {{
        name: [rows[name].state.value, rows[name].detail]
        for name in ("indexer.logits_cap", "sampler")
    }}

def child():
    return [seen(), states()]
"""


def defaults(host, folder, *, modules=(), **arguments):
    """vllm.envs and the two rows: before, after, and after undoing; `modules` are empty ones."""
    folder = folder / "site"
    folder.mkdir(parents=True)
    (folder / "defaults_child.py").write_text(READ_DEFAULTS)
    for module in modules:
        (folder / f"{module}.py").touch()
    return host(
        """
from defaults_child import *

before = seen()
here = states()
after = seen()
if os.environ.get("IN_CHILD"):
    in_child = in_spawned_child(child)
else:
    in_child = None
changes.undo_all()
answer({
    "before": before, "after": after, "states": here, "child": in_child, "undone": seen(),
})
""",
        first_on_path=[folder],
        **arguments,
    ).answer


def test_defaults_reach_vllm_and_its_children_and_can_be_undone(host, tmp_path):
    facts = defaults(host, tmp_path, env={"CUDA_HOME": "/nowhere", "IN_CHILD": "1"})
    assert facts["before"] == facts["undone"] == [512, 1]
    assert facts["after"] == [256, 0]
    assert facts["child"][0] == [256, 0]
    assert [state for state, _ in facts["states"].values()] == ["active", "active"]
    assert facts["states"]["indexer.logits_cap"][1] == (
        "vllm.envs.VLLM_SPARSE_INDEXER_MAX_LOGITS_MB is 256"
    )
    assert "nvcc was not found (/nowhere/bin/nvcc does not exist)" in facts["states"]["sampler"][1]
    assert facts["child"][1] == facts["states"]


def test_the_users_values_stand(host, tmp_path):
    env = {
        "VLLM_SPARSE_INDEXER_MAX_LOGITS_MB": "64",
        "VLLM_USE_FLASHINFER_SAMPLER": "1",
        "CUDA_HOME": "/nowhere",
        "IN_CHILD": "1",
    }
    facts = defaults(host, tmp_path, env=env)
    assert facts["before"] == facts["after"] == facts["child"][0] == facts["undone"] == [64, 1]
    assert facts["states"] == {
        "indexer.logits_cap": ["off", "VLLM_SPARSE_INDEXER_MAX_LOGITS_MB=64 is set"],
        "sampler": ["off", "VLLM_USE_FLASHINFER_SAMPLER=1 is set"],
    }


def test_a_machine_that_can_compile_keeps_flashinfers_sampler(host, tmp_path):
    cuda = cuda_toolkit(tmp_path / "cuda", "12.9")
    facts = defaults(host, tmp_path, env={"CUDA_HOME": str(cuda)})
    assert facts["after"] == [256, 1]
    assert facts["states"]["sampler"] == [
        "not needed", f"{cuda}/bin/nvcc 12.9 compiles FlashInfer's sampler",
    ]  # fmt: skip


def test_an_old_compiler_does_not_and_a_jit_cache_does(host, tmp_path):
    env = {"CUDA_HOME": str(cuda_toolkit(tmp_path / "cuda", "12.8"))}
    without = defaults(host, tmp_path / "without", env=env)
    assert without["after"] == [256, 0]
    assert "is 12.8, and SM12x needs 12.9 or later" in without["states"]["sampler"][1]
    cached = defaults(host, tmp_path / "with", modules=["flashinfer_jit_cache"], env=env)
    assert cached["after"] == [256, 1]
    assert cached["states"]["sampler"][0] == "not needed"
    assert "flashinfer-jit-cache" in cached["states"]["sampler"][1]


def test_a_gpu_that_is_forced_keeps_vllms_defaults(host, tmp_path):
    facts = defaults(
        host, tmp_path, capability="9.0", name="NVIDIA H200",
        env={"VLLM_TRITON_MLA_SPARSE": "1", "CUDA_HOME": "/nowhere"},
    )  # fmt: skip
    assert facts["after"] == [512, 1]
    for state, detail in facts["states"].values():
        assert (state, "SM 9.0" in detail) == ("not needed", True)


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


def test_the_first_request_finds_the_logits_processors_loaded(host):
    """As vLLM checks a request: entry points are read before, and one that is broken stays so."""
    ran = host("""
import importlib.metadata as metadata
from types import SimpleNamespace
from unittest import mock
from vllm import SamplingParams
from vllm.v1.sample import logits_processor

read = []
entry_points = metadata.entry_points

def broken():
    raise ImportError("a broken plugin")

def counted(**asked):
    if asked.get("group") == logits_processor.LOGITSPROCS_GROUP:
        read.append(asked["group"])
        return plugins
    return entry_points(**asked)

def check(config):
    try:
        logits_processor.validate_logits_processors_parameters(
            config.model_config.logits_processors, SamplingParams()
        )
    except RuntimeError as error:
        return str(error)

found = []
with mock.patch.object(metadata, "entry_points", counted):
    for plugins in ([], [SimpleNamespace(name="bad", value="bad", load=broken)]):
        logits_processor.cached_load_custom_logitsprocs.cache_clear()
        read.clear()
        config = served_config(MODEL)
        ready = len(read)
        found.append([ready, check(config), len(read)])
answer(found)
""").answer
    (ready, problem, asked), (_, broken, _) = ran
    assert ready == asked >= 1 and problem is None
    assert "Failed to load LogitsProcessor plugin" in broken

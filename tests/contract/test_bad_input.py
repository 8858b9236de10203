# SPDX-License-Identifier: Apache-2.0
"""Wrong settings, GPUs and vLLMs, and ops that nobody serves: one sentence that names them.

Cache dtypes and block sizes that do not fit are refused with the config, in test_config.py.
"""

import json
import re
import sys
from importlib import metadata

import pytest
from packaging.version import Version
from toolkits import cuda_toolkit, deep_gemm_package

from vllm_sm12x.vllm_api.version import PINS

pytestmark = pytest.mark.contract

STOCK_PLATFORM = "vllm.platforms.cuda.NvmlCudaPlatform"
T4 = {"capability": "7.5", "name": "Tesla T4"}
VLLM = Version(metadata.version("vllm"))
# From 0.31 on vLLM loads plugins before it configures logging: warnings come without their level.
AS_IT_IS = Version("0.31") <= VLLM

# Variable, value, and what the refusal must say is allowed.
BAD_SETTINGS = [
    ("VLLM_TRITON_MLA_SPARSE", "2", "0, 1 or auto"),
    ("VLLM_TRITON_MLA_SPARSE", "yes", "0, 1 or auto"),
    ("VLLM_DEEP_GEMM_SM120_PAGED_MQA_TILED", "true", "0 or 1"),
    ("VLLM_TRITON_MLA_SPARSE_ALLOW_CUDAGRAPH", "maybe", "0 or 1"),
    ("VLLM_TRITON_MLA_SPARSE_TOPK_CHUNK_SIZE", "0", "16"),
    ("VLLM_TRITON_MLA_SPARSE_TOPK_CHUNK_SIZE", "100", "multiple of 16"),
    ("VLLM_TRITON_MLA_SPARSE_TOPK_CHUNK_SIZE", "-512", "16"),
    ("VLLM_TRITON_MLA_SPARSE_TOPK_CHUNK_SIZE", "many", "16"),
    ("VLLM_TRITON_MLA_SPARSE_QUERY_CHUNK_SIZE", "0", "1"),
    ("VLLM_TRITON_MLA_SPARSE_QUERY_CHUNK_SIZE", "2.5", "1"),
    ("VLLM_TRITON_MLA_SPARSE_HEAD_BLOCK_SIZE", "3", "auto, 1, 2 or 4"),
    ("VLLM_TRITON_MLA_SPARSE_DUMP", "on", "0 or 1"),
    ("VLLM_SM12X_ASSUME", "9.0", "12.0 or 12.1"),
    ("VLLM_SM12X_OFF", "atention.select", "attention.select"),
    ("VLLM_SM12X_PROVIDERS", "cutlass", "auto, triton or deep_gemm"),
    ("VLLM_SM12X_PROVIDERS", "fp8_einsun=triton", "did you mean fp8_einsum"),
    ("VLLM_SM12X_OF", "platform", "VLLM_SM12X_OFF"),
    ("VLLM_TRITON_MLA_SPARSE_TOPK_CHUNK", "512", "VLLM_TRITON_MLA_SPARSE_TOPK_CHUNK_SIZE"),
]

PLUGIN = """
from importlib.metadata import entry_points
from vllm import envs
from vllm.v1.attention.backends import registry

stock_names = set(envs.environment_variables)
stock_lookup = type(registry.AttentionBackendEnum).__getitem__

def load_plugin():
    for point in entry_points(group="vllm.general_plugins", name="sm12x"):
        point.load()()

def untouched():
    return (
        set(envs.environment_variables) == stock_names
        and type(registry.AttentionBackendEnum).__getitem__ is stock_lookup
        and not registry.AttentionBackendEnum.CUSTOM.is_overridden()
    )
"""


def is_one_sentence(message: str) -> bool:
    return "\n" not in message and message.endswith(".") and not message.endswith("..")


@pytest.fixture(scope="module")
def refusals(host):
    """What each bad setting is answered with, and at last whether a good one is taken."""
    return host(f"""{PLUGIN}
results = []
for name, value, _ in {BAD_SETTINGS!r}:
    os.environ[name] = value
    results.append({{"refusal": failure_of(load_plugin), "untouched": untouched()}})
    del os.environ[name]
answer({{"bad": results, "good": failure_of(load_plugin), "untouched_by_good": untouched()}})
""").answer


@pytest.mark.parametrize("row", range(len(BAD_SETTINGS)), ids=lambda row: BAD_SETTINGS[row][0])
def test_a_bad_setting_is_refused(refusals, row):
    name, value, allowed = BAD_SETTINGS[row]
    result = refusals["bad"][row]
    assert result["refusal"] is not None, f"{name}={value} was taken"
    kind, _, sentence = result["refusal"].partition(": ")
    assert kind == "KnobError"
    assert is_one_sentence(sentence), sentence
    assert name in sentence
    assert allowed in sentence
    assert value in sentence or "is not a setting" in sentence
    assert result["untouched"], "a refused setting must leave vLLM alone"


def test_the_probe_would_notice_a_change(refusals):
    assert refusals["good"] is None
    assert refusals["untouched_by_good"] is False


def test_vllm_serve_ends_with_the_sentence(host):
    run = host.command(
        [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(host.model)],
        env={"VLLM_TRITON_MLA_SPARSE": "2"},
        check=False,
    )
    last_line = run.stderr.splitlines()[-1]
    assert run.returncode > 0
    assert "VLLM_TRITON_MLA_SPARSE='2'" in last_line
    assert last_line.endswith("0, 1 or auto.")


@pytest.fixture(scope="module")
def turing(host):
    return host(
        f"""{PLUGIN}
unforced = failure_of(load_plugin)
os.environ["VLLM_TRITON_MLA_SPARSE"] = "1"
forced = failure_of(load_plugin)
answer({{
    "platform": platform_facts()["class"],
    "unforced": unforced,
    "forced": forced,
    "untouched": untouched(),
}})
""",
        **T4,
    )


def test_a_gpu_below_sm89_cannot_be_forced(turing):
    kind, _, sentence = turing.answer["forced"].partition(": ")
    assert kind == "RuntimeError"
    assert is_one_sentence(sentence), sentence
    for part in ("VLLM_TRITON_MLA_SPARSE=1", "Tesla T4", "SM 7.5", "SM 8.9"):
        assert part in sentence
    assert turing.answer["platform"] == STOCK_PLATFORM
    assert turing.answer["untouched"]


def test_a_gpu_below_sm89_is_left_alone_in_silence(turing):
    assert turing.answer["unforced"] is None
    assert "vllm-sm12x" not in turing.output


def distribution(folder, name, version, entry_points=""):
    """A folder for the front of the path in which a distribution is installed, by its metadata."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)
    return folder


@pytest.fixture(scope="module")
def below_the_floor(host, tmp_path_factory):
    """The installed vLLM under a dist-info that calls it 0.22.1."""
    older = distribution(tmp_path_factory.mktemp("older"), "vllm", "0.22.1")
    return host(
        f"""{PLUGIN}
unforced = failure_of(load_plugin)
load_plugin()
os.environ["VLLM_TRITON_MLA_SPARSE"] = "1"
forced = failure_of(load_plugin)
answer({{
    "platform": platform_facts()["class"],
    "unforced": unforced,
    "forced": forced,
    "untouched": untouched(),
}})
""",
        first_on_path=[older],
    )


def lines_with(words, run):
    return [line for line in run.output.splitlines() if words in line]


def test_a_vllm_below_the_floor_is_left_alone_with_one_warning(below_the_floor):
    assert below_the_floor.answer["platform"] == STOCK_PLATFORM
    assert below_the_floor.answer["unforced"] is None
    assert below_the_floor.answer["untouched"]
    (warning,) = lines_with("vllm-sm12x is off", below_the_floor)
    assert "WARNING" in warning or AS_IT_IS
    assert "vLLM 0.22.1 is installed" in warning and ">=0.23" in warning
    assert f"install vllm=={PINS[-1]}" in warning


def test_a_vllm_below_the_floor_cannot_be_forced(below_the_floor):
    kind, _, sentence = below_the_floor.answer["forced"].partition(": ")
    assert kind == "RuntimeError"
    assert is_one_sentence(sentence), sentence
    assert "vLLM 0.22.1" in sentence and ">=0.23" in sentence


def test_two_platform_plugins_are_named_before_vllm_refuses(host, tmp_path):
    entry_points = "[vllm.platform_plugins]\nother = other_platform:platform\n"
    folder = distribution(tmp_path / "other", "other-platform", "1.0", entry_points)
    (folder / "other_platform.py").write_text(f"def platform(): return {STOCK_PLATFORM!r}\n")
    both = host(
        "answer(failure_of(platform_facts))", first_on_path=[folder], env={"VLLM_PLUGINS": ""}
    )
    assert both.answer is None, "neither is on the list"
    both = host("answer(failure_of(platform_facts))", first_on_path=[folder])
    assert both.answer.startswith("RuntimeError: Only one platform plugin can be activated")
    (sentence,) = lines_with("Nothing is on", both)
    assert "ERROR" in sentence or AS_IT_IS
    assert "sm12x and other: uninstall other, or list in VLLM_PLUGINS" in sentence
    chosen = {"VLLM_PLUGINS": "sm12x"}
    run = host("answer(platform_facts()['class'])", first_on_path=[folder], env=chosen)
    assert run.answer.endswith("Sm12xPlatform") and not lines_with("Nothing is on", run)
    doctor = host.command(
        [sys.executable, "-m", "vllm_sm12x", "doctor", "--json"],
        gpu={"FAKE_NVML_CAPABILITY": "12.0", "FAKE_NVML_NAME": "a GPU", "FAKE_NVML_COUNT": "1"},
        first_on_path=[folder],
        check=False,
    )
    assert doctor.returncode == 2
    findings = json.loads(doctor.stdout)["findings"]
    assert any("sm12x and other: uninstall other" in finding for finding in findings), findings


# What is refused with the config, in the front end; with variables, flags, and parts of the answer.
FP4_KEYS = (
    {"use_fp4_indexer_cache": True} if Version("0.30") > VLLM else {"indexer_kv_dtype": "mxfp4"}
)
NO_NVCC = "nvcc was not found (/nowhere/bin/nvcc does not exist)"
GET_NVCC = "install CUDA toolkit 12.9 or later and set CUDA_HOME to it"
UNSERVED = {
    "deep_gemm for every op": (
        {"VLLM_SM12X_PROVIDERS": "deep_gemm"}, [],
        ["The op mqa_logits has no provider", NO_NVCC, GET_NVCC,
         "triton because VLLM_SM12X_PROVIDERS asks for deep_gemm", "set mqa_logits=triton"],
    ),
    "deep_gemm for one op": (
        {"VLLM_SM12X_PROVIDERS": "hc_prenorm_gemm=deep_gemm"}, [],
        ["The op hc_prenorm_gemm has no provider", NO_NVCC, "set hc_prenorm_gemm=triton"],
    ),
    "FP4 indexer cache": (
        {}, ["--attention-config", json.dumps(FP4_KEYS)],
        ["mqa_logits and paged_mqa_logits have no provider for an FP4 indexer cache", "FP8",
         f'leave "{next(iter(FP4_KEYS))}"'],
    ),
    "FP4 indexer cache of vLLM's own layers": (
        {"VLLM_TRITON_MLA_SPARSE": "0"}, ["--attention-config", json.dumps(FP4_KEYS)],
        ["an FP4 indexer cache", "vLLM's own layers on SM12x",
         f'leave "{next(iter(FP4_KEYS))}"'],
    ),
    "prefill context parallelism": (
        {}, ["--prefill-context-parallel-size", "2"],
        ["--prefill-context-parallel-size 2", "does not merge across ranks", "allowed is 1"],
    ),
    "decode context parallelism": (
        {}, ["--tensor-parallel-size", "2", "--decode-context-parallel-size", "2"],
        ["--decode-context-parallel-size 2", "does not merge across ranks", "allowed is 1"],
    ),
    "index head dim": (
        {}, ["--hf-overrides", '{"index_head_dim": 64}'],
        ["mqa_logits and paged_mqa_logits", "index_head_dim 64", "triton and deep_gemm take 128"],
    ),
    "FlashMLA": (
        {}, ["--attention-backend", "FLASHMLA_SPARSE"],
        ["--attention-backend FLASHMLA_SPARSE takes vLLM's own DeepSeek V4 layer, whose mqa_logits "
         "only DeepGEMM serves", NO_NVCC, GET_NVCC, "leave out --attention-backend"],
    ),
    "FlashInfer": (
        {}, ["--attention-backend", "FLASHINFER_MLA_SPARSE_DSV4"],
        ["--attention-backend FLASHINFER_MLA_SPARSE_DSV4", NO_NVCC, GET_NVCC],
    ),
}  # fmt: skip
SERVED = {
    "ours": ({}, []),
    "ours by setting": ({"VLLM_SM12X_PROVIDERS": "triton"}, []),
    "switched off": ({"VLLM_TRITON_MLA_SPARSE": "0"}, []),
}
MAKE_CONFIGS = """
def failure(environment, flags):
    os.environ.update(environment)
    try:
        return failure_of(served_config, MODEL, "--kv-cache-dtype", "fp8", *flags)
    finally:
        for name in environment:
            del os.environ[name]
"""


@pytest.fixture(scope="module")
def without_a_toolkit(host, tmp_path_factory):
    """A machine with a DeepGEMM that has SM120 kernels, and without nvcc."""
    site = tmp_path_factory.mktemp("site")
    deep_gemm_package(site)
    asked = {name: case[:2] for name, case in {**UNSERVED, **SERVED}.items()}
    return host(
        f"{MAKE_CONFIGS}\nanswer({{name: failure(*case) for name, case in {asked!r}.items()}})",
        count=2,
        env={"CUDA_HOME": "/nowhere"},
        first_on_path=[site],
    )


@pytest.mark.parametrize("case", UNSERVED)
def test_what_nobody_can_serve_is_refused_with_the_config(without_a_toolkit, case):
    refusal = without_a_toolkit.answer[case]
    assert refusal is not None, f"{case} was taken"
    said = re.search(r"Value error, (.*) \[type=value_error", refusal, re.DOTALL)
    assert said, refusal
    assert is_one_sentence(said[1])
    for part in UNSERVED[case][2]:
        assert part in said[1]


@pytest.mark.parametrize("case", SERVED)
def test_what_is_served_is_not_refused(without_a_toolkit, case):
    assert without_a_toolkit.answer[case] is None


def test_switching_our_attention_off_warns_of_what_vllms_own_lacks(without_a_toolkit):
    lines = [line for line in without_a_toolkit.output.splitlines() if "DeepSeek V4 layer" in line]
    warnings = [line for line in lines if "WARNING" in line]
    assert len(warnings) == 1
    assert "VLLM_TRITON_MLA_SPARSE=0 takes vLLM's own DeepSeek V4 layer" in warnings[0]
    assert NO_NVCC in warnings[0] and "unset VLLM_TRITON_MLA_SPARSE" in warnings[0]


@pytest.fixture(scope="module")
def without_kernels(host, tmp_path_factory):
    """The other way round: nvcc, and a DeepGEMM without SM120 kernels."""
    machine = tmp_path_factory.mktemp("machine")
    package = deep_gemm_package(machine / "site", headers=())
    asked = [UNSERVED["deep_gemm for every op"][:2], UNSERVED["FlashInfer"][:2]]
    answer = host(
        f"{MAKE_CONFIGS}\nanswer([failure(*case) for case in {asked!r}])",
        env={"CUDA_HOME": str(cuda_toolkit(machine / "cuda", "13.0"))},
        first_on_path=[machine / "site"],
    ).answer
    return package, answer


@pytest.mark.parametrize("case", [0, 1])
def test_a_deep_gemm_without_sm120_kernels_serves_nothing(without_kernels, case):
    package, answers = without_kernels
    assert f"the DeepGEMM in {package} has no SM120 kernel for it" in answers[case]
    assert "install a DeepGEMM with SM120 kernels" in answers[case]


def test_on_a_gpu_that_is_forced_the_ops_stay_vllms_business(host):
    """VLLM_TRITON_MLA_SPARSE=1 on an H200 brings our attention and nothing else."""
    asked = UNSERVED["deep_gemm for every op"][:2]
    assert host(
        f"{MAKE_CONFIGS}\nanswer(failure(*{asked!r}))",
        capability="9.0",
        name="NVIDIA H200",
        env={"VLLM_TRITON_MLA_SPARSE": "1", "CUDA_HOME": "/nowhere"},
    ).answer is None  # fmt: skip

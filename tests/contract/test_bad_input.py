# SPDX-License-Identifier: Apache-2.0
"""Wrong settings, GPUs and vLLMs: one sentence that names them, and vLLM left as it was.

Cache dtypes and block sizes that do not fit are refused with the config, in test_config.py.
"""

import sys

import pytest

pytestmark = pytest.mark.contract

STOCK_PLATFORM = "vllm.platforms.cuda.NvmlCudaPlatform"
T4 = {"capability": "7.5", "name": "Tesla T4"}

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


def test_a_gpu_below_sm80_cannot_be_forced(turing):
    kind, _, sentence = turing.answer["forced"].partition(": ")
    assert kind == "RuntimeError"
    assert is_one_sentence(sentence), sentence
    for part in ("VLLM_TRITON_MLA_SPARSE=1", "Tesla T4", "SM 7.5", "SM 8.0"):
        assert part in sentence
    assert turing.answer["platform"] == STOCK_PLATFORM
    assert turing.answer["untouched"]


def test_a_gpu_below_sm80_is_left_alone_in_silence(turing):
    assert turing.answer["unforced"] is None
    assert "vllm-sm12x" not in turing.output


@pytest.fixture(scope="module")
def below_the_floor(host, tmp_path_factory):
    """The installed vLLM under a dist-info that calls it 0.22.1."""
    older = tmp_path_factory.mktemp("older")
    info = older / "vllm-0.22.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.22.1\n")
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


def test_a_vllm_below_the_floor_is_left_alone_with_one_warning(below_the_floor):
    assert below_the_floor.answer["platform"] == STOCK_PLATFORM
    assert below_the_floor.answer["unforced"] is None
    assert below_the_floor.answer["untouched"]
    warnings = [line for line in below_the_floor.output.splitlines() if "vllm-sm12x is off" in line]
    assert len(warnings) == 1
    assert "WARNING" in warnings[0]
    assert "vLLM 0.22.1 is installed" in warnings[0] and ">=0.23" in warnings[0]


def test_a_vllm_below_the_floor_cannot_be_forced(below_the_floor):
    kind, _, sentence = below_the_floor.answer["forced"].partition(": ")
    assert kind == "RuntimeError"
    assert is_one_sentence(sentence), sentence
    assert "vLLM 0.22.1" in sentence and ">=0.23" in sentence

# SPDX-License-Identifier: Apache-2.0
"""Where the plugin is active and where vLLM stays stock: by GPU, by variable, by installation."""

import re

import pytest

pytestmark = pytest.mark.contract

OURS = "vllm_sm12x.integration"
STOCK_PLATFORM = "vllm.platforms.cuda.NvmlCudaPlatform"
STOCK_WORKER = "vllm.v1.worker.gpu_worker.Worker"

SM121 = {"capability": "12.1", "name": "NVIDIA GB10"}
SM90 = {"capability": "9.0", "name": "NVIDIA H200"}

# SM120 itself, with and without VLLM_PLUGINS=sm12x, is test_spawn.py's and test_config.py's.
ACTIVE = {
    "SM121": SM121,
    "SM90 forced": {**SM90, "env": {"VLLM_TRITON_MLA_SPARSE": "1"}},
    "SM90 taken for SM120": {**SM90, "env": {"VLLM_SM12X_ASSUME": "12.0"}},
}
INERT = {
    "uninstalled": {"plugin": False},
    "not allow-listed": {"env": {"VLLM_PLUGINS": "other"}},
    "SM90": SM90,
}

SITUATION = """
config = engine_config(MODEL)
from vllm.models.deepseek_v4.nvidia import model
answer({
    "platform": platform_facts(),
    "config": config_facts(config),
    "worker": worker_facts(config),
    "wrapped": hasattr(model._select_dsv4_attn_cls, "__wrapped__"),
})
"""


@pytest.fixture(scope="module", params=ACTIVE)
def active(request, host):
    return host(SITUATION, **ACTIVE[request.param])


@pytest.fixture(scope="module", params=INERT)
def inert(request, host):
    return host(SITUATION, **INERT[request.param])


def test_active_platform_is_a_cuda_platform(active):
    platform = active.answer["platform"]
    assert platform["class"] == f"{OURS}.platform.Sm12xPlatform"
    assert STOCK_PLATFORM in platform["bases"]
    assert platform["is_cuda"] is True


def test_vllm_itself_sees_the_gpu_that_is_there(active, request):
    """VLLM_SM12X_ASSUME is for the plugin's policy only."""
    expected = [12, 1] if "SM121" in request.node.name else [9, 0]
    assert active.answer["platform"]["capability"] == expected


def test_active_worker_builds_our_attention(active):
    assert active.answer["config"]["worker_cls"] == f"{OURS}.worker.Sm12xWorker"
    assert active.answer["worker"] == {
        "class": f"{OURS}.worker.Sm12xWorker",
        "attention": f"{OURS}.sparse_mla.TritonMlaSparseAttention",
    }


def test_active_plugin_says_so_once_in_the_front_end(active):
    lines = re.findall(r"vllm-sm12x \S+ on vLLM .*", active.output)
    assert len(lines) == 1, lines
    assert "failed" not in lines[0] and "drifted" not in lines[0]


def test_nothing_warns_about_unknown_variables(active):
    assert "Unknown vLLM environment variable" not in active.output


def test_inert_vllm_is_stock(inert, vllm_version):
    on_sm90 = inert.answer["platform"]["capability"] == [9, 0]
    stock_attention = (
        "flashinfer_sparse.DeepseekV4FlashInferSM120Attention"
        if vllm_version >= (0, 24) and not on_sm90
        else "flashmla.DeepseekV4FlashMLAAttention"
    )
    assert inert.answer["platform"]["class"] == STOCK_PLATFORM
    assert inert.answer["config"]["worker_cls"] == STOCK_WORKER
    assert inert.answer["worker"] == {
        "class": STOCK_WORKER,
        "attention": f"vllm.models.deepseek_v4.nvidia.{stock_attention}",
    }
    assert inert.answer["wrapped"] is False


def test_inert_plugin_leaves_the_settings_alone(inert):
    names = inert.answer["platform"]["environment_variables"]
    assert not [name for name in names if "SM12X" in name or "TRITON_MLA_SPARSE" in name]
    assert "vllm-sm12x" not in inert.output


def test_with_every_gpu_hidden_the_plugin_is_inert(host):
    run = host("answer(platform_facts()['class'])", env={"CUDA_VISIBLE_DEVICES": ""})
    assert run.answer == STOCK_PLATFORM
    assert "vllm-sm12x" not in run.output


def test_without_any_gpu_the_plugin_is_inert(host):
    run = host("answer(platform_facts()['class'])", count=0)
    assert run.answer == "vllm.platforms.interface.UnspecifiedPlatform"
    assert "vllm-sm12x" not in run.output


def test_a_backend_of_that_name_in_vllm_itself_is_left_alone(host):
    """A later vLLM, by a member that stands in the enum before the plugin is loaded."""
    facts = host(
        """
from vllm.v1.attention.backends.registry import AttentionBackendEnum as Enum

member = object.__new__(Enum)
member._name_, member._value_ = "TRITON_MLA_SPARSE", "vllm.theirs.Backend"
Enum._member_map_["TRITON_MLA_SPARSE"] = Enum._value2member_map_["vllm.theirs.Backend"] = member
Enum._member_names_.append("TRITON_MLA_SPARSE")
lookup = type(Enum).__getitem__
config = engine_config(MODEL)

from vllm_sm12x import changes
states = {row.change.name: [row.state.value, row.detail] for row in changes.report()}
answer({
    "row": states["attention.name"],
    "lookup": type(Enum).__getitem__ is lookup,
    "path": Enum["TRITON_MLA_SPARSE"].get_path(),
    "custom": Enum.CUSTOM.is_overridden(),
    "worker": worker_facts(config),
})
"""
    ).answer
    assert facts["row"][0] == "not needed" and "TRITON_MLA_SPARSE" in facts["row"][1]
    assert facts["lookup"] and not facts["custom"]
    assert facts["path"] == "vllm.theirs.Backend"
    assert facts["worker"]["attention"].endswith("TritonMlaSparseAttention"), (
        "by default, as before"
    )

# SPDX-License-Identifier: Apache-2.0
"""Which kernels vLLM's own code picks on SM12x: by default, by the user, and with rows undone."""

import os

import pytest
from gpu_code import flashinfer_package
from test_config import MXFP4_EXPERTS
from toolkits import cuda_toolkit

from vllm_sm12x.integration import nvfp4_linear
from vllm_sm12x.vllm_api import extensions

pytestmark = pytest.mark.contract

FLAG = '"-DCUTLASS_ENABLE_GDC_FOR_SM100=1",'
CUDNN, CUTLASS = (f"FlashInfer{name}NvFp4LinearKernel" for name in ("Cudnn", "Cutlass"))
GATE, TOP_K, NVFP4, MARLIN = ROWS = (
    "deep_gemm.gate", "indexer.top_k", "nvfp4.cudnn", "moe.marlin",
)  # fmt: skip
# A message that every vLLM has, in place of the one that only some have.
ALWAYS_THERE = b"persistent_topk failed: "
CHOICES = f"""{MXFP4_EXPERTS}
from vllm.model_executor.kernels import linear
from vllm.model_executor.layers.fused_moe.oracle import mxfp4 as oracle
from vllm.platforms import current_platform
from vllm_sm12x import changes
from vllm_sm12x.changes import host, kernels
from vllm_sm12x.changes.change import Applied, Context, Phase
from vllm_sm12x.device import Device
from vllm_sm12x.integration import top_k
from vllm_sm12x.vllm_api import extensions

table = Applied((*host.ROWS, *kernels.ROWS))

def settled(context=None, **environment):
    table.undo_all()
    os.environ.update(environment)
    try:
        for phase in Phase:
            table.apply_all(phase, context)
    finally:
        for name in environment:
            del os.environ[name]
    return {{
        outcome.change.name: [outcome.state.value, outcome.detail]
        for outcome in table.report() if outcome.change in kernels.ROWS
    }}

def nvfp4(backend="auto"):
    config.kernel_config.linear_backend = backend
    try:
        return type(linear.init_nvfp4_linear_kernel()).__name__
    finally:
        config.kernel_config.linear_backend = "auto"

def experts(select, backend="auto"):
    config.kernel_config.moe_backend = backend
    try:
        return select(experts_of(config))[0].name
    except ValueError as error:
        return f"ValueError: {{error}}"
    finally:
        config.kernel_config.moe_backend = "auto"

def top_k_of(backend="auto"):
    if not hasattr(config.kernel_config, "sparse_indexer_topk_backend"):
        return None
    config.kernel_config.sparse_indexer_topk_backend = backend
    current_platform.apply_config_platform_defaults(config)
    return config.kernel_config.sparse_indexer_topk_backend

def other_tables():
    tables = {{name: value for name, value in vars(linear).items() if name.startswith("_POSSIBLE")}}
    del tables["_POSSIBLE_NVFP4_KERNELS"]
    return str(tables)

def picked():
    return {{
        "nvfp4": nvfp4(),
        "deepseek_v4": experts(oracle.select_deepseek_v4_mxfp4_moe_backend),
        "others": experts(oracle.select_mxfp4_moe_backend),
        "other linears": other_tables(),
        "deep_gemm": current_platform.support_deep_gemm(),
        "top_k": top_k_of(),
    }}
"""


@pytest.fixture(scope="module")
def choices(host, tmp_path_factory):
    """Choices of one process with a FlashInfer without the flags, nvcc, and MTP.

    VLLM_TRITON_MLA_SPARSE=0, so that stock vLLM takes DeepGEMM for DeepSeek V4's experts.
    """
    machine = tmp_path_factory.mktemp("machine")
    flashinfer_package(machine / "site", left_out=FLAG)
    toolkit = cuda_toolkit(machine / "cuda", "12.9")
    (toolkit / "bin" / "ninja").symlink_to("nvcc")
    return host(
        f"""{CHOICES}
config = served_config(
    MODEL, "--kv-cache-dtype", "fp8", "--block-size", "256",
    "--speculative-config", '{{"method": "mtp", "num_speculative_tokens": 2}}',
)
changes.undo_all()
facts = {{}}
with set_current_vllm_config(config):
    facts["stock"] = picked()
    facts["states"] = settled()
    facts["picked"] = picked()
    facts["by flag"] = {{
        "nvfp4": nvfp4("flashinfer_cutlass"),
        "deepseek_v4": experts(oracle.select_deepseek_v4_mxfp4_moe_backend, "deep_gemm"),
    }}
    table.undo_all()
    facts["undone"] = picked()
    facts["off"] = settled(VLLM_SM12X_OFF={",".join(ROWS)!r})
    facts["picked when off"] = picked()
facts["disabled"] = settled(VLLM_DISABLED_KERNELS={CUDNN!r})
facts["batch invariant"] = settled(VLLM_BATCH_INVARIANT="1")
facts["old variables"] = settled(
    VLLM_NVFP4_GEMM_BACKEND="flashinfer-cutlass", VLLM_MXFP4_USE_MARLIN="0"
)
facts["no DeepGEMM"] = settled(VLLM_USE_DEEP_GEMM="0")
sys.modules["cudnn"] = None
facts["no cuDNN"] = settled()
settled()
del sys.modules["cudnn"]
forced = Context.detect().__class__(
    device=Device("NVIDIA H200", (9, 0), 2**37, "580"), capability=(9, 0), switch=True,
    assumed=False, vllm=Context.detect().vllm,
)
facts["SM90"] = settled(forced)
extensions.moe_extension = lambda: None
top_k._ABORT = {ALWAYS_THERE!r}
facts["others"] = settled()
facts["top_k"] = [top_k_of(), top_k_of("persistent")]
table.undo_all()
facts["top_k undone"] = top_k_of()
answer(facts)
""",
        env={
            "PATH": f"{toolkit / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "CUDA_HOME": str(toolkit),
            "VLLM_TRITON_MLA_SPARSE": "0",
        },
        first_on_path=[machine / "site"],
    )


@pytest.fixture(scope="module")
def facts(choices):
    return choices.answer


def test_stock_vllm_picks_what_the_rows_change(facts, vllm_version):
    stock = facts["stock"]
    assert stock["nvfp4"] == CUTLASS
    assert stock["deepseek_v4"] == ("DEEPGEMM_MXFP4" if vllm_version >= (0, 24) else "MARLIN")
    assert stock["top_k"] == ("auto" if vllm_version >= (0, 30) else None)


def test_nvfp4_linears_are_on_cudnn_and_no_others_change(facts):
    assert facts["picked"]["nvfp4"] == CUDNN
    assert facts["picked"]["other linears"] == facts["stock"]["other linears"]
    state, detail = facts["states"][NVFP4]
    assert state == "active"
    assert "without -DCUTLASS_ENABLE_GDC_FOR_SM100" in detail and "--linear-backend" in detail


def test_mxfp4_experts_are_on_marlin_with_speculative_tokens(facts):
    """Also for the one model for which the gate lets DeepGEMM through: vLLM's own layer."""
    assert facts["picked"]["deepseek_v4"] == facts["picked"]["others"] == "MARLIN"
    state, detail = facts["states"][MARLIN]
    assert state == "active"
    assert "MARLIN first" in detail and "sm_120f code for SM 12.0" in detail


def test_deep_gemm_gate(facts, vllm_version):
    state, detail = facts["states"][GATE]
    if vllm_version < (0, 24):
        assert (state, detail) == (
            "not needed", f"vLLM {vllm_text(vllm_version)} takes no DeepGEMM on SM 12.x either",
        )  # fmt: skip
        return
    assert state == "active"
    assert detail.startswith("vLLM alone says yes; for DeepSeek V4 with our attention it hears no")
    assert "sm120_fp8_fp4_gemm_1d1d.cuh" in detail
    assert facts["no DeepGEMM"][GATE][0] == "not needed"
    assert "VLLM_USE_DEEP_GEMM=0" in facts["no DeepGEMM"][GATE][1]


def vllm_text(version):
    from vllm_sm12x.vllm_api.version import installed

    found = installed()
    assert found.release[:2] == version
    return found


def test_undone_and_off_are_stock(facts):
    assert facts["undone"] == facts["picked when off"] == facts["stock"]
    for state, detail in facts["off"].values():
        assert state == "not for this vLLM" or (state, detail) == ("off", "VLLM_SM12X_OFF names it")


def test_the_users_flags_stand(facts, vllm_version):
    assert facts["by flag"]["nvfp4"] == CUTLASS
    asked = facts["by flag"]["deepseek_v4"]
    assert "DEEPGEMM_MXFP4" in asked
    assert asked.startswith("ValueError: ") is (vllm_version < (0, 24))


def test_the_users_variables_stand(facts, vllm_version):
    assert facts["disabled"][NVFP4] == ["off", f"VLLM_DISABLED_KERNELS={CUDNN} is set"]
    assert facts["batch invariant"][NVFP4] == ["off", "VLLM_BATCH_INVARIANT is set"]
    old = facts["old variables"]
    if vllm_version < (0, 24):
        assert old[NVFP4] == ["off", "VLLM_NVFP4_GEMM_BACKEND is set"]
        assert old[MARLIN] == ["off", "VLLM_MXFP4_USE_MARLIN=0 is set"]
    else:
        assert old[NVFP4][0] == old[MARLIN][0] == "active"


def test_a_missing_cudnn_frontend_is_said_once_and_changes_nothing(choices):
    state, detail = choices.answer["no cuDNN"][NVFP4]
    assert state == "off" and "nvidia-cudnn-frontend is not installed" in detail
    warnings = [line for line in choices.output.splitlines() if "may compute NaN" in line]
    assert len(warnings) == 1
    assert "WARNING" in warnings[0]
    assert "pip install --upgrade nvidia-cudnn-frontend" in warnings[0]


def test_other_gpus_keep_vllms_choice(facts):
    for state, detail in facts["SM90"].values():
        assert state == "not for this vLLM" or ("SM 9.0" in detail and state != "active")


def test_a_build_without_marlin_keeps_vllms_choice(facts):
    assert facts["others"][MARLIN] == [
        "off", "vLLM was built without the extension _moe_C, which has Marlin",
    ]  # fmt: skip


def test_top_k_is_per_row_where_persistent_may_abort_and_the_user_left_it(facts, vllm_version):
    if vllm_version < (0, 30):
        assert facts["states"][TOP_K][0] == "not for this vLLM"
        assert facts["top_k"] == [None, None]
        return
    assert facts["states"][TOP_K][0] == "not needed"
    assert "falls back to per_row by itself" in facts["states"][TOP_K][1]
    assert facts["others"][TOP_K][0] == "active"
    assert facts["top_k"] == ["per_row", "persistent"]
    assert facts["top_k undone"] == "auto"


def test_which_vllm_may_abort(vllm_version):
    """Those that let the user choose have the fallback of #54110; the others have the message."""
    from vllm_sm12x.integration import top_k

    assert top_k.persistent_may_abort().yes is (vllm_version < (0, 30))
    assert top_k.has_constant(extensions.top_k_extension(), ALWAYS_THERE)


@pytest.mark.parametrize("capability", [(12, 0), (12, 1)])
def test_the_installed_flashinfer_has_its_flags(capability):
    finding = nvfp4_linear.cutlass_is_sound(capability)
    assert finding.yes is True
    assert finding.reason.endswith("with -DCUTLASS_ENABLE_GDC_FOR_SM100")
    assert nvfp4_linear.cudnn_serves_fp4().yes


@pytest.mark.parametrize(
    "files, yes, words",
    [
        ({"left_out": FLAG}, False, "without -DCUTLASS_ENABLE_GDC_FOR_SM100"),
        ({"of_header": "__CUDA_ARCH__ == 1200"}, False, "has no grid waits for SM 12.0"),
        ({"left_out": "_sm120_module_cutlass_fp4"}, None, "has no gen_gemm_sm120"),
        ({}, True, "with -DCUTLASS_ENABLE_GDC_FOR_SM100"),
    ],
    ids=["flag missing", "old CUTLASS", "moved", "as installed"],
)
def test_what_flashinfers_source_says(tmp_path, monkeypatch, files, yes, words):
    package = flashinfer_package(tmp_path, **files)
    monkeypatch.setattr(nvfp4_linear, "_folder", lambda name: package)
    finding = nvfp4_linear.cutlass_is_sound((12, 0))
    assert finding.yes is yes and words in finding.reason


def test_a_flag_that_every_module_has_counts(tmp_path, monkeypatch):
    package = flashinfer_package(tmp_path, left_out=FLAG)
    common = package / "jit" / "core.py"
    common.write_text(common.read_text().replace('"-DNDEBUG", "-O3"', f'{FLAG} "-O3"'))
    monkeypatch.setattr(nvfp4_linear, "_folder", lambda name: package)
    assert nvfp4_linear.cutlass_is_sound((12, 0)).yes

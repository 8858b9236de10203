# SPDX-License-Identifier: Apache-2.0
"""Which kernels vLLM's own code picks on SM12x: by default, by the user, and with rows undone."""

import os

import pytest
from gpu_code import flashinfer_package
from test_config import MXFP4_EXPERTS
from toolkits import cuda_toolkit

from vllm_sm12x.integration import nvfp4_linear

pytestmark = pytest.mark.contract

FLAG = '"-DCUTLASS_ENABLE_GDC_FOR_SM100=1",'
CUDNN, CUTLASS = (f"FlashInfer{name}NvFp4LinearKernel" for name in ("Cudnn", "Cutlass"))
ROWS = ("deep_gemm.gate", "indexer.top_k", "nvfp4.cudnn", "moe.marlin")
CHOICES = f"""{MXFP4_EXPERTS}
from dataclasses import replace
from vllm.model_executor.kernels import linear
from vllm.model_executor.layers.fused_moe.oracle import mxfp4 as oracle
from vllm.platforms import current_platform
from vllm.utils import deep_gemm
from vllm_sm12x import changes
from vllm_sm12x.changes import host, kernels
from vllm_sm12x.changes.change import Applied, Context, Phase
from vllm_sm12x.device import Device
from vllm_sm12x.integration import nvfp4_linear, top_k
from vllm_sm12x.vllm_api import extensions

table = Applied((*host.ROWS, *kernels.ROWS))
FP8 = ["--kv-cache-dtype", "fp8", "--block-size", "256"]
MTP = ["--speculative-config", '{{"method": "mtp", "num_speculative_tokens": 2}}']
DSV4 = oracle.select_deepseek_v4_mxfp4_moe_backend

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

def said(function, *flags):
    try:
        return function(*flags)
    except ValueError as error:
        return f"ValueError: {{error}}"

def nvfp4(*flags):
    with set_current_vllm_config(served_config(MODEL, *FP8, *flags)):
        return type(linear.init_nvfp4_linear_kernel()).__name__

def experts(select, *flags):
    # What backend_of asks.
    globals()["select_deepseek_v4_mxfp4_moe_backend"] = select
    return said(backend_of, *flags)

def other_tables():
    return {{
        name: str(value) for name, value in vars(linear).items()
        if name.startswith("_POSSIBLE_") and "NVFP4" not in name
    }}

def top_k_backend(*flags):
    return getattr(
        served_config(MODEL, *FP8, *flags).kernel_config, "sparse_indexer_topk_backend", None
    )

def gate():
    with set_current_vllm_config(served_config(MODEL, *FP8)):
        return current_platform.support_deep_gemm()

def picked():
    return {{
        "nvfp4": nvfp4(),
        "deepseek_v4": experts(DSV4),
        "others": experts(oracle.select_mxfp4_moe_backend),
        "other linears": other_tables(),
        "deep_gemm": gate(),
        "top_k": top_k_backend(),
    }}
"""


@pytest.fixture(scope="module")
def choices(host, tmp_path_factory):
    """One process with a FlashInfer whose flags are missing, and nvcc, which it wants to be used.

    DeepSeek V4 is served by vLLM's own attention, so that DeepGEMM is vLLM's choice for experts.
    """
    machine = tmp_path_factory.mktemp("machine")
    flashinfer_package(machine / "site", left_out=FLAG)
    toolkit = cuda_toolkit(machine / "cuda", "12.9") / "bin"
    ninja = toolkit / "ninja"
    ninja.symlink_to("nvcc")
    return host(
        f"""{CHOICES}
facts = {{}}
platform_facts()
served_config(MODEL, *FP8)
changes.undo_all()
facts["stock"] = picked()
facts["states"] = settled()
facts["picked"] = picked()
facts["with MTP"] = experts(DSV4, *MTP)
facts["by flag"] = {{
    "nvfp4": nvfp4("--linear-backend", "flashinfer_cutlass"),
    "experts": experts(DSV4, "--moe-backend", "deep_gemm"),
}}
facts["names"] = [row.__name__ for row in linear._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CUDA]]
facts["off"] = settled(VLLM_SM12X_OFF={",".join(ROWS)!r})
facts["picked when off"] = picked()
facts["disabled"] = settled(VLLM_DISABLED_KERNELS={CUDNN!r})
facts["by variable"] = settled(VLLM_BATCH_INVARIANT="1")
facts["old variables"] = settled(
    VLLM_NVFP4_GEMM_BACKEND="flashinfer-cutlass", VLLM_MXFP4_USE_MARLIN="0"
)
facts["without DeepGEMM"] = settled(VLLM_USE_DEEP_GEMM="0")
sys.modules["cudnn"] = None
facts["no cuDNN"] = settled()
facts["no cuDNN again"] = settled()
del sys.modules["cudnn"]
h200 = Device("NVIDIA H200", (9, 0), 2**37, "580")
forced = replace(Context.detect(), device=h200, capability=(9, 0), switch=True)
facts["SM90"] = settled(forced)
extensions.moe_extension = lambda: None
facts["no Marlin"] = settled()["moe.marlin"]
top_k._ABORT = b"persistent_topk failed: "
facts["abort"] = settled()["indexer.top_k"]
facts["top_k when it aborts"] = top_k_backend(), said(
    top_k_backend, "--sparse-indexer-topk-backend", "persistent"
) if facts["abort"][0] == "active" else None
table.undo_all()
facts["undone"] = picked()
answer(facts)
""".replace("from dataclasses import replace\n", "from dataclasses import replace\n"
            "from vllm.platforms.interface import PlatformEnum\n"),
        env={
            "PATH": f"{toolkit}{os.pathsep}{os.environ['PATH']}",
            "CUDA_HOME": str(toolkit.parent),
            "VLLM_TRITON_MLA_SPARSE": "0",
        },
        first_on_path=[machine / "site"],
    )  # fmt: skip


def states(settled):
    return {name: state for name, (state, _) in settled.items()}


def test_debug(choices):
    import json
    print(json.dumps(choices.answer, indent=1))
    print([l for l in choices.output.splitlines() if "NVFP4 linear" in l])

# SPDX-License-Identifier: Apache-2.0
"""Changes to which kernel vLLM picks on SM12x where the user leaves it to vLLM."""

import logging
from contextlib import ExitStack
from types import SimpleNamespace

from vllm_sm12x.changes.change import Change, Context, Kind, Phase, Verdict, wrap
from vllm_sm12x.changes.host import on_sm12x_path
from vllm_sm12x.log import get_logger, once

NVFP4_ROW = "nvfp4.cudnn"
MARLIN_ROW = "moe.marlin"
DEEP_GEMM_ROW = "deep_gemm.gate"
TOP_K_ROW = "indexer.top_k"
_ORACLE = "vllm.model_executor.layers.fused_moe.oracle.mxfp4"
_LINEAR = "vllm.model_executor.kernels.linear"

logger = get_logger(__name__)


def _capability(context: Context) -> tuple[int, int]:
    if context.capability is None:
        raise ValueError("there is no GPU")
    return context.capability


def _nvfp4_is_left_to_us(context: Context) -> Verdict:
    """No where the user chose, and where cuDNN, which would be needed, is not there."""
    from vllm_sm12x.integration import nvfp4_linear
    from vllm_sm12x.vllm_api import envs

    on_path = on_sm12x_path(context)
    if not on_path.yes:
        return on_path
    for name in envs.NVFP4_CHOICES:
        if envs.value_of(name):
            return Verdict(False, f"{name} is set")
    disabled = envs.value_of(envs.DISABLED_KERNELS) or []
    if nvfp4_linear.CUDNN_KERNEL in disabled:
        return Verdict(False, f"{envs.DISABLED_KERNELS}={','.join(disabled)} is set")
    cutlass = nvfp4_linear.cutlass_is_sound(_capability(context))
    if cutlass.yes is None:
        return Verdict(False, cutlass.reason)
    cudnn = nvfp4_linear.cudnn_serves_fp4()
    if not (cutlass.yes or cudnn.yes):
        message = (
            f"NVFP4 linear layers may compute NaN at many concurrent requests: {cutlass.reason}, "
            f"and {cudnn.reason}; pip install --upgrade {nvfp4_linear.FRONTEND}."
        )
        once(logger, logging.WARNING, message)
        return Verdict(False, f"{cutlass.reason}, and {cudnn.reason}")
    return Verdict(True, "")


def _cutlass_is_not_sound(context: Context) -> Verdict:
    from vllm_sm12x.integration.nvfp4_linear import cutlass_is_sound

    cutlass = cutlass_is_sound(_capability(context))
    return Verdict(not cutlass.yes, cutlass.reason)


def _prefer_cudnn(context: Context, undo: ExitStack) -> None:
    from vllm_sm12x.integration.nvfp4_linear import prefer_cudnn

    prefer_cudnn(undo)


def _cudnn_comes_before_cutlass(context: Context) -> Verdict:
    from vllm_sm12x.integration.nvfp4_linear import cutlass_is_sound
    from vllm_sm12x.vllm_api import nvfp4_linear as stock

    tried = stock.kernels()
    cudnn = tried.index(stock.FlashInferCudnnNvFp4LinearKernel)
    first = cudnn < tried.index(stock.FlashInferCutlassNvFp4LinearKernel)
    order = "before" if first else "after"
    return Verdict(
        first,
        f"vLLM tries cuDNN {order} CUTLASS, where no --linear-backend names one: "
        f"{cutlass_is_sound(_capability(context)).reason}",
    )


def _marlin_is_native(context: Context) -> Verdict:
    """No where the user refuses Marlin, and where its build would be wrong or is not there."""
    from vllm_sm12x.integration.mxfp4_experts import marlin_build
    from vllm_sm12x.vllm_api import envs

    on_path = on_sm12x_path(context)
    if not on_path.yes:
        return on_path
    if envs.value_of(envs.MXFP4_USE_MARLIN) is False:
        return Verdict(False, f"{envs.MXFP4_USE_MARLIN}=0 is set")
    build = marlin_build(_capability(context))
    if build.remedy:
        message = (
            f"Experts on Marlin may compute wrong outputs: {build.reason} (vLLM #40923); "
            f"{build.remedy}."
        )
        once(logger, logging.WARNING, message)
    return Verdict(build.native, build.reason)


def _put_marlin_first(context: Context, undo: ExitStack) -> None:
    from vllm_sm12x.integration.mxfp4_experts import marlin_first
    from vllm_sm12x.vllm_api import mxfp4_experts as stock

    for name in stock.PRIORITIES:
        wrap(undo, stock.oracle, name, MARLIN_ROW, marlin_first)


def _marlin_is_tried_first(context: Context) -> Verdict:
    from vllm_sm12x.integration.mxfp4_experts import marlin_build
    from vllm_sm12x.vllm_api import mxfp4_experts as stock

    first = [backends[0] for backends in stock.priorities()]
    return Verdict(
        all(backend in stock.MARLIN for backend in first),
        f"vLLM tries {' and '.join(sorted({backend.name for backend in first}))} first, where no "
        f"--moe-backend names one: {marlin_build(_capability(context)).reason}",
    )


def _vllm_says_yes(context: Context) -> Verdict:
    """Whether vLLM alone would take DeepGEMM on this GPU; below 0.24 it does not on SM12x."""
    from vllm_sm12x.vllm_api import envs
    from vllm_sm12x.vllm_api.platform import CudaPlatform

    on_path = on_sm12x_path(context)
    if not on_path.yes:
        return on_path
    if not envs.value_of(envs.USE_DEEP_GEMM):
        return Verdict(False, f"{envs.USE_DEEP_GEMM}=0: vLLM takes no DeepGEMM")
    says_yes = bool(CudaPlatform.support_deep_gemm())
    return Verdict(says_yes, f"vLLM {context.vllm} takes no DeepGEMM on SM 12.x either")


def _close_the_gate(context: Context, undo: ExitStack) -> None:
    from vllm_sm12x.integration.platform import Sm12xPlatform

    Sm12xPlatform.gates_deep_gemm = True
    undo.callback(setattr, Sm12xPlatform, "gates_deep_gemm", False)


def _vllm_hears_us(context: Context) -> Verdict:
    """Outside of a model the answer is no, where vLLM alone says yes."""
    from vllm_sm12x.integration import providers
    from vllm_sm12x.vllm_api.config import current_config
    from vllm_sm12x.vllm_api.platform import current_platform_class

    answer = current_platform_class().support_deep_gemm()
    probe = providers.probe_deep_gemm("fp8_einsum")
    return Verdict(
        current_config() is not None or not answer,
        f"vLLM alone says yes; for DeepSeek V4 with our attention it hears no, for other models "
        f"{'yes' if probe.yes else 'no'}: {probe.reason}",
    )


def _persistent_may_abort(context: Context) -> Verdict:
    from vllm_sm12x.integration.top_k import persistent_may_abort

    on_path = on_sm12x_path(context)
    if not on_path.yes:
        return on_path
    return Verdict(*persistent_may_abort())


def _fill_in_per_row(context: Context, undo: ExitStack) -> None:
    from vllm_sm12x.integration import startup
    from vllm_sm12x.integration.top_k import prefer_per_row

    startup.config_defaults.append(prefer_per_row)
    undo.callback(startup.config_defaults.remove, prefer_per_row)


def _per_row_is_filled_in(context: Context) -> Verdict:
    from vllm_sm12x.integration import startup, top_k
    from vllm_sm12x.vllm_api.config import new_kernel_config

    config = SimpleNamespace(kernel_config=new_kernel_config())
    for fill_in in startup.config_defaults:
        fill_in(config)
    found = config.kernel_config.sparse_indexer_topk_backend
    why = top_k.persistent_may_abort().reason
    return Verdict(found == top_k.CHOICE, f"sparse_indexer_topk_backend becomes {found}: {why}")


ROWS = (
    Change(
        name=DEEP_GEMM_ROW,
        kind=Kind.SUBCLASS,
        phase=Phase.REGISTER,
        what="vLLM takes DeepGEMM for linear layers and experts only where the one that it would "
        "load has SM120 kernels and there is an nvcc for them, and not for DeepSeek V4 with our "
        "attention.",
        why="From 0.24 on vLLM counts SM12x among DeepGEMM's GPUs, in 0.24.0 and 0.27.1 without "
        "having its kernels: `Unknown SF transformation` when the weights are loaded.",
        upstream="https://github.com/vllm-project/vllm/issues/47436",
        touches=(
            "vllm.platforms.cuda.CudaPlatform.support_deep_gemm",
            "vllm.utils.deep_gemm.is_deep_gemm_supported",
        ),
        requires=("platform",),
        needed=_vllm_says_yes,
        apply=_close_the_gate,
        check=_vllm_hears_us,
        retire="vLLM looks for SM120 kernels and a compiler before it takes DeepGEMM",
    ),
    Change(
        name=TOP_K_ROW,
        kind=Kind.SUBCLASS,
        phase=Phase.REGISTER,
        vllm=">=0.30",
        what="`--sparse-indexer-topk-backend` is `per_row` where you leave it at `auto` and this "
        "vLLM's `persistent` may abort.",
        why="Long contexts end the engine: `persistent_topk would oversubscribe and the "
        "FilteredTopK fallback requires >=128KB smem per block`. (Our own indexer never takes it.)",
        upstream="https://github.com/vllm-project/vllm/pull/54110",
        touches=("vllm.config.kernel.KernelConfig.sparse_indexer_topk_backend",),
        requires=("platform",),
        needed=_persistent_may_abort,
        apply=_fill_in_per_row,
        check=_per_row_is_filled_in,
        retire="every supported vLLM has #54110; the releases from 0.30 on that were looked at do",
    ),
    Change(
        name=NVFP4_ROW,
        kind=Kind.REGISTER,
        phase=Phase.WORKER,
        what="NVFP4 linear layers use FlashInfer's cuDNN kernel instead of its CUTLASS one where "
        "that is compiled without grid dependencies, unless you choose.",
        why="Output tiles are not written at 64 and more concurrent requests: NaN.",
        upstream="https://github.com/flashinfer-ai/flashinfer/pull/2716",
        touches=(
            f"{_LINEAR}._POSSIBLE_NVFP4_KERNELS",
            f"{_LINEAR}.FlashInferCudnnNvFp4LinearKernel",
            f"{_LINEAR}.FlashInferCutlassNvFp4LinearKernel",
            f"{_LINEAR}.init_nvfp4_linear_kernel",
        ),
        requires=("worker",),
        wanted=_nvfp4_is_left_to_us,
        needed=_cutlass_is_not_sound,
        apply=_prefer_cudnn,
        check=_cudnn_comes_before_cutlass,
        retire="every supported vLLM asks for a FlashInfer with #2716 (0.6.8.post1 and later)",
    ),
    Change(
        name=MARLIN_ROW,
        kind=Kind.WRAP,
        phase=Phase.WORKER,
        what="MXFP4 experts run on Marlin where vLLM's build of it has SM12x code, unless you give "
        "`--moe-backend`.",
        why="Other backends need DeepGEMM or nvcc at run time, and FlashInfer's CUTLASS lowered "
        "the acceptance of speculative tokens from 1.84 to 1.22.",
        upstream="https://github.com/vllm-project/vllm/pull/40923 made the build native; the order "
        "is ours",
        touches=(
            f"{_ORACLE}._get_priority_backends",
            f"{_ORACLE}._get_priority_backends_for_gpt_oss",
            f"{_ORACLE}.select_deepseek_v4_mxfp4_moe_backend",
            f"{_ORACLE}.select_mxfp4_moe_backend",
        ),
        requires=("worker",),
        wanted=_marlin_is_native,
        apply=_put_marlin_first,
        check=_marlin_is_tried_first,
        retire="vLLM itself prefers Marlin for MXFP4 experts on SM12x",
    ),
)

# SPDX-License-Identifier: Apache-2.0
"""Changes that let the rest of DeepSeek V4 run without DeepGEMM on SM12x."""

from contextlib import ExitStack

from vllm_sm12x.changes.change import Change, Context, Kind, Phase, Verdict, wrap, wrapped_by
from vllm_sm12x.changes.host import on_sm12x_path

INDEXER_ROW = "indexer"
LINEAR_ROW = "fp8_linear.scales"


def _wrap_the_question(context: Context, undo: ExitStack) -> None:
    from vllm_sm12x.integration import indexer
    from vllm_sm12x.vllm_api import indexer as stock

    for module in stock.ASKING_MODULES:
        wrap(undo, module, stock.HAS_DEEP_GEMM, INDEXER_ROW, indexer.has_deep_gemm)


def _indexer_hears_us(context: Context) -> Verdict:
    from vllm_sm12x.integration import indexer
    from vllm_sm12x.vllm_api import indexer as stock

    asked = [
        stock.layer_module.SparseAttnIndexer.__init__.__globals__[stock.HAS_DEEP_GEMM],
        stock.DeepseekV32IndexerMetadataBuilder.build.__globals__[stock.HAS_DEEP_GEMM],
    ]
    heard = set()
    for there in (True, False):
        with indexer.as_if_deep_gemm(there):
            heard.add(all(question() is there for question in asked))
    return Verdict(heard == {True}, "the indexer's layer and builder ask us about DeepGEMM")


def _wrap_process_weights(context: Context, undo: ExitStack) -> None:
    from vllm_sm12x.integration import fp8_linear as ours
    from vllm_sm12x.vllm_api import fp8_linear as stock

    kernel = stock.Fp8BlockScaledMMLinearKernel
    wrap(undo, kernel, stock.PROCESS_WEIGHTS, LINEAR_ROW, ours.process_weights)


def _kernels_inherit_it(context: Context) -> Verdict:
    from vllm_sm12x.vllm_api import fp8_linear as stock

    inheriting = [
        kernel.__name__
        for kernel in stock.Fp8BlockScaledMMLinearKernel.__subclasses__()
        if wrapped_by(getattr(kernel, stock.PROCESS_WEIGHTS)) == LINEAR_ROW
    ]
    return Verdict(bool(inheriting), f"in force for {', '.join(sorted(inheriting)) or 'no kernel'}")


ROWS = (
    Change(
        name=INDEXER_ROW,
        kind=Kind.WRAP,
        phase=Phase.WORKER,
        what="DeepSeek V4's indexer is built, and its metadata prepared, without DeepGEMM.",
        why="`Sparse Attention Indexer CUDA op requires DeepGEMM support`, or a schedule for "
        "kernels that do not run.",
        upstream="https://github.com/vllm-project/vllm/issues/43477",
        touches=(
            "vllm.model_executor.layers.sparse_attn_indexer.has_deep_gemm",
            "vllm.model_executor.layers.sparse_attn_indexer.SparseAttnIndexer",
            "vllm.v1.attention.backends.mla.indexer.has_deep_gemm",
            "vllm.v1.attention.backends.mla.indexer.DeepseekV32IndexerMetadataBuilder",
        ),
        requires=("worker",),
        wanted=on_sm12x_path,
        apply=_wrap_the_question,
        check=_indexer_hears_us,
        retire="vLLM's indexer can be built without DeepGEMM",
    ),
    Change(
        name=LINEAR_ROW,
        kind=Kind.WRAP,
        phase=Phase.WORKER,
        what="UE8M0 weight scales of FP8 linear layers become fp32 when the weights are loaded.",
        why="vLLM hands them to CUTLASS as they are, and ends in the profile run: `Expected "
        "b_scales.scalar_type() == Float`.",
        upstream="https://github.com/vllm-project/vllm/issues/47818",
        touches=(
            "vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel."
            "Fp8BlockScaledMMLinearKernel.process_weights_after_loading",
        ),
        requires=("worker",),
        wanted=on_sm12x_path,
        apply=_wrap_process_weights,
        check=_kernels_inherit_it,
        retire="vLLM converts UE8M0 scales for every kernel that reads fp32",
    ),
)

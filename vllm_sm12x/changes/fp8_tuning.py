# SPDX-License-Identifier: Apache-2.0
"""The change that brings tuned, or at least fitting, configurations to FP8 linear layers."""

from contextlib import ExitStack

from vllm_sm12x.changes.change import Change, Context, Kind, Phase, Verdict, wrap, wrapped_by
from vllm_sm12x.changes.host import on_sm12x_path

NAME = "fp8_linear.configs"


def _unless_batch_invariant(context: Context) -> Verdict:
    on_path = on_sm12x_path(context)
    if not on_path.yes:
        return on_path
    from vllm_sm12x.vllm_api.envs import batch_invariant

    return Verdict(not batch_invariant(), "VLLM_BATCH_INVARIANT asks for one configuration")


def _default_is_for_large_m(context: Context) -> Verdict:
    from vllm_sm12x.integration.fp8_config_files import SMALL_M_CHANGES
    from vllm_sm12x.vllm_api import fp8_configs as stock

    rows = stock.launched_config(1, 128, 128, (128, 128), lambda *shape: None)["BLOCK_SIZE_M"]
    large = rows > SMALL_M_CHANGES["BLOCK_SIZE_M"]
    return Verdict(large, f"vLLM's own default for one row is BLOCK_SIZE_M {rows}")


def _wrap_look_up(context: Context, undo: ExitStack) -> None:
    from vllm_sm12x.integration import fp8_configs as ours
    from vllm_sm12x.vllm_api import fp8_configs as stock

    ours.forget()
    undo.callback(ours.forget)
    wrap(undo, stock.fp8_utils, stock.LOOK_UP, NAME, ours.look_up)


def _gemm_asks_us(context: Context) -> Verdict:
    from vllm_sm12x.integration import fp8_configs as ours
    from vllm_sm12x.integration.fp8_config_files import SMALL_M, SMALL_M_CHANGES
    from vllm_sm12x.vllm_api import fp8_configs as stock

    by = wrapped_by(stock.look_up_of_vllm())
    if by != NAME:
        return Verdict(False, f"vLLM's GEMM asks {by or 'its own look-up'}")
    small, large = ours.default_launches((SMALL_M, SMALL_M + 1)).values()
    default = stock.launched_config(SMALL_M + 1, 128, 128, (128, 128), lambda *shape: None)
    right = small == {**default, **SMALL_M_CHANGES} and large == default
    where = ", ".join(map(str, ours.user_folders()))
    return Verdict(
        right,
        f"without a file M <= {SMALL_M} launches BLOCK_SIZE_M {small['BLOCK_SIZE_M']}, larger M "
        f"{large['BLOCK_SIZE_M']}; your files are looked for in {where}",
    )


ROWS = (
    Change(
        name=NAME,
        kind=Kind.WRAP,
        phase=Phase.WORKER,
        what="FP8 linear layers on vLLM's Triton GEMM take your tuned files (`vllm-sm12x tune`), "
        "files for another name of the same GPU, and without a file BLOCK_SIZE_M 16 for M <= 8.",
        why="`Using default W8A8 Block FP8 kernel config`: tiles of 64 rows, of which decode uses "
        "one (measured upstream on GB10: 5.45 tokens/s instead of 6.73).",
        upstream="https://github.com/vllm-project/vllm/pull/40925",
        touches=(
            "vllm.model_executor.layers.quantization.utils.fp8_utils.get_w8a8_block_fp8_configs",
            "vllm.model_executor.layers.quantization.utils.fp8_utils.w8a8_triton_block_scaled_mm",
            "vllm.model_executor.layers.quantization.utils.fp8_utils._w8a8_triton_block_scaled_mm",
        ),
        requires=("worker",),
        optional=True,
        wanted=_unless_batch_invariant,
        needed=_default_is_for_large_m,
        apply=_wrap_look_up,
        check=_gemm_asks_us,
        retire="vLLM's default for M <= 8 has small tiles, and VLLM_TUNED_CONFIG_FOLDER holds for "
        "FP8 linear layers",
    ),
)

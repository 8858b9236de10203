# SPDX-License-Identifier: Apache-2.0
"""Changes that bring DeepSeek V4's attention to TRITON_MLA_SPARSE."""

from contextlib import ExitStack
from typing import Any

from vllm_sm12x.changes.change import (
    Change,
    Context,
    Kind,
    Phase,
    State,
    Verdict,
    wrap,
    wrapped_by,
)
from vllm_sm12x.changes.host import on_sm12x_path

NAME_ROW = "attention.name"
SELECT_ROW = "attention.select"
REQUESTS_ROW = "attention.token_to_request"


def settle_before_model(vllm_config: Any) -> None:
    """In a worker, before the model is built: apply the rows that touch the model's module.

    Raises RuntimeError when a row without which the model cannot run could not be put in.
    """
    from vllm_sm12x import changes
    from vllm_sm12x.integration import selection

    outcomes = changes.apply_all(Phase.WORKER)
    choice = selection.choose(vllm_config)
    if not (choice.ours and selection.serves(vllm_config)):
        return
    for outcome in outcomes:
        row = outcome.change
        broken = outcome.state in (State.DRIFTED, State.FAILED)
        if row.name == SELECT_ROW:
            broken = choice.explicit and outcome.state is not State.ACTIVE
        if broken and row.phase is Phase.WORKER and not row.optional:
            raise RuntimeError(
                f"{selection.NAME} is chosen ({choice.why}), but the change {row.name} is "
                f"{outcome.state.value}: {outcome.detail}."
            )


def _upstream_has_the_name(context: Context) -> Verdict:
    from vllm_sm12x.integration.selection import NAME
    from vllm_sm12x.vllm_api import registry

    if NAME in registry.members():
        return Verdict(False, f"this vLLM has its own {NAME}")
    return Verdict(True, "")


def _make_the_name_parse(context: Context, undo: ExitStack) -> None:
    from vllm_sm12x.integration import selection
    from vllm_sm12x.vllm_api import registry

    if registry.path_of(registry.CUSTOM) is None:
        registry.claim_custom(selection.BACKEND_PATH)
        undo.callback(registry.release_custom)
    wrap(undo, registry.Lookup, "__getitem__", NAME_ROW, selection.look_up)


def _the_name_parses(context: Context) -> Verdict:
    from vllm_sm12x.integration import selection
    from vllm_sm12x.vllm_api import registry

    try:
        backend = registry.lookup(selection.NAME)
    except selection.NameRefused as refusal:
        return Verdict(True, f"refused with a reason: {refusal}")
    path = registry.path_of(backend)
    return Verdict(
        path == selection.BACKEND_PATH, f"{selection.NAME} parses as {backend.name}, {path}"
    )


def _not_switched_off(context: Context) -> Verdict:
    return Verdict(context.switch is not False, "VLLM_TRITON_MLA_SPARSE=0")


def _wrap_selection(context: Context, undo: ExitStack) -> None:
    from vllm_sm12x.integration import selection
    from vllm_sm12x.vllm_api import deepseek_v4

    wrap(
        undo,
        deepseek_v4.model_module,
        deepseek_v4.SELECT_ATTENTION_CLASS,
        SELECT_ROW,
        selection.select_attention_class,
    )


def _decoder_layer_asks_us(context: Context) -> Verdict:
    from vllm_sm12x.vllm_api import deepseek_v4

    asked = deepseek_v4.function_that_the_decoder_layer_calls()
    by = wrapped_by(asked)
    return Verdict(by == SELECT_ROW, f"DeepseekV4DecoderLayer calls {asked.__name__} of {by}")


def _wrap_token_to_request(context: Context, undo: ExitStack) -> None:
    from vllm_sm12x.integration.step_metadata import token_to_request
    from vllm_sm12x.vllm_api import step_metadata as stock

    wrap(
        undo,
        stock.CommonAttentionMetadata,
        stock.TOKEN_TO_REQUEST,
        REQUESTS_ROW,
        token_to_request,
    )


def _builders_ask_us(context: Context) -> Verdict:
    from vllm_sm12x.vllm_api import step_metadata as stock

    by = wrapped_by(getattr(stock.CommonAttentionMetadata, stock.TOKEN_TO_REQUEST))
    return Verdict(
        by == REQUESTS_ROW, f"CommonAttentionMetadata.{stock.TOKEN_TO_REQUEST} is of {by}"
    )


ROWS = (
    Change(
        name=NAME_ROW,
        kind=Kind.WRAP,
        phase=Phase.REGISTER,
        what="`--attention-backend TRITON_MLA_SPARSE` parses, as vLLM's `CUSTOM` backend.",
        why="`Unknown attention backend: 'TRITON_MLA_SPARSE'`.",
        upstream="ours: members that later releases let a plugin add do not unpickle in a spawned "
        "engine, CUSTOM does",
        touches=(
            "vllm.v1.attention.backends.registry._AttentionBackendEnumMeta.__getitem__",
            "vllm.v1.attention.backends.registry.AttentionBackendEnum.CUSTOM",
            "vllm.v1.attention.backends.registry.register_backend",
        ),
        requires=("platform",),
        needed=_upstream_has_the_name,
        apply=_make_the_name_parse,
        check=_the_name_parses,
        retire="vLLM has a member TRITON_MLA_SPARSE, or registered members that unpickle",
    ),
    Change(
        name=SELECT_ROW,
        kind=Kind.WRAP,
        phase=Phase.WORKER,
        what="DeepSeek V4's decoder layers build `TritonMlaSparseAttention`, unless "
        "`--attention-backend` names another backend.",
        why="vLLM builds its FlashMLA class, which has no SM12x kernels, or FlashInfer's, which "
        "compiles with nvcc at run time.",
        upstream="https://github.com/vllm-project/vllm/issues/38006",
        touches=(
            "vllm.models.deepseek_v4.nvidia.model._select_dsv4_attn_cls",
            "vllm.models.deepseek_v4.nvidia.model.DeepseekV4DecoderLayer",
        ),
        requires=("worker",),
        wanted=_not_switched_off,
        apply=_wrap_selection,
        check=_decoder_layer_asks_us,
        retire="vLLM lets a plugin choose the attention class of a DeepSeek V4 layer",
    ),
    Change(
        name=REQUESTS_ROW,
        kind=Kind.WRAP,
        phase=Phase.WORKER,
        vllm=">=0.25",
        what="Which request each token belongs to is worked out once a step, not once for each "
        "group of KV caches, and again for each draft.",
        why="Six copies to the GPU in a decode step, 15 % of its time on the host; from the second "
        "draft on, the V1 runner's requests but the first draft from another request's window.",
        upstream="ours: vLLM's V2 model runner shares it from 0.31 on",
        touches=(
            "vllm.v1.attention.backend.CommonAttentionMetadata.token_to_req_indices",
            "vllm.v1.attention.backend.CommonAttentionMetadata._token_to_req_indices_cache",
        ),
        requires=("worker",),
        wanted=on_sm12x_path,
        apply=_wrap_token_to_request,
        check=_builders_ask_us,
        retire="the oldest vLLM supported serves DeepSeek V4 by its V2 model runner alone",
        optional=True,
    ),
)

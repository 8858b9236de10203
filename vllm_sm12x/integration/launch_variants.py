# SPDX-License-Identifier: Apache-2.0
"""At which numbers of tokens the kernels of ours are launched in another compiled variant."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from vllm_sm12x import knobs
from vllm_sm12x.ops.fp8_ds_mla import HEAD_DIM
from vllm_sm12x.ops.fp8_einsum import config as fp8_einsum
from vllm_sm12x.ops.hc_post import config as hc_post
from vllm_sm12x.ops.hc_post_prenorm_gemm import config as hc_post_prenorm_gemm
from vllm_sm12x.ops.hc_pre import config as hc_pre
from vllm_sm12x.ops.hc_prenorm_gemm import config as hc_prenorm_gemm
from vllm_sm12x.ops.sparse_mla import config as sparse_mla
from vllm_sm12x.vllm_api.envs import batch_invariant


def launch_policy() -> sparse_mla.LaunchPolicy:
    """The limits of sparse_mla's launches that the user's settings and vLLM's give."""
    return sparse_mla.LaunchPolicy(
        head_block=knobs.get("VLLM_TRITON_MLA_SPARSE_HEAD_BLOCK_SIZE"),
        topk_chunk=knobs.get("VLLM_TRITON_MLA_SPARSE_TOPK_CHUNK_SIZE"),
        query_chunk=knobs.get("VLLM_TRITON_MLA_SPARSE_QUERY_CHUNK_SIZE"),
        batch_invariant=batch_invariant(),
        # An engine that is taken for SM12x runs what SM12x would run.
        wgmma=knobs.get("VLLM_SM12X_ASSUME") is None,
    )


@dataclass(frozen=True)
class Widths:
    """What of a DeepSeek V4 the launch configurations depend on; heads and groups of one rank.

    Attributes:
        candidates: widths of the candidate lists that layers attend to.
    """

    heads: int
    groups: int
    output_rank: int
    hidden: int
    streams: int
    candidates: tuple[int, ...]

    @classmethod
    def of(cls, vllm_config: Any) -> "Widths":
        model = vllm_config.model_config.hf_text_config
        ranks = vllm_config.parallel_config.tensor_parallel_size
        window = model.sliding_window
        compressed = -(-vllm_config.model_config.max_model_len // 128)
        return cls(
            heads=model.num_attention_heads // ranks,
            groups=max(1, model.o_groups // ranks),
            output_rank=model.o_lora_rank,
            hidden=model.hidden_size,
            streams=model.hc_mult,
            # Layers of ratio 128 pad their lists to multiples of 128.
            candidates=(window, window + model.index_topk, window - -compressed // 128 * -128),
        )


@dataclass(frozen=True)
class Target:
    """What of an engine and its GPU the launch configurations depend on.

    Attributes:
        sms: multiprocessors.
        mma, wgmma: whether Gluon kernels of mma.sync and of wgmma run.
        attention_only: of our ops, only the attention is used: off the SM12x path.
    """

    sms: int
    policy: sparse_mla.LaunchPolicy
    mma: bool = False
    wgmma: bool = False
    attention_only: bool = False


def variants(widths: Widths, tokens: int, target: Target) -> set[Hashable]:
    """Names of the compiled variants that a call with this many tokens launches."""
    found: set[Hashable] = set()
    sms, policy = target.sms, target.policy
    invariant = policy.batch_invariant
    for candidates in widths.candidates:
        attend = sparse_mla.choose(
            tokens, widths.heads, candidates,
            sms=sms, policy=policy, mma=target.mma, wgmma=target.wgmma,
        )  # fmt: skip
        splits = attend.num_splits
        # A stride of the partial results is splits * heads.
        merged = (_power_of_two(splits), splits * widths.heads % 16) if splits > 1 else None
        # Layers with lists of other widths launch it with other constants.
        found.add(("sparse_mla", candidates, attend.config, merged))
    if tokens >= sparse_mla.UNPACK_TOKENS and not invariant:
        # Such a prefill unpacks its rows, or has too many and reads them as they are.
        found.add("sparse_mla, unpacked")
    if target.attention_only:
        return found
    steps = widths.heads // widths.groups * HEAD_DIM // fp8_einsum.SCALE_BLOCK
    project = fp8_einsum.choose(
        tokens, widths.groups, widths.output_rank, steps, sms=sms, batch_invariant=invariant
    )
    scales = _power_of_two(project.steps_per_split) if project.config.scales_first else 0
    found.add(("fp8_einsum", project.config, project.num_splits > 1, scales))
    found.add(("hc_post", hc_post.choose(tokens, widths.hidden, sms=sms)))
    # The first layer's streams are one, the others' are apart.
    for depth in (widths.hidden, widths.hidden * widths.streams):
        splits = hc_prenorm_gemm.splits_of(tokens, depth, sms=sms, batch_invariant=invariant)
        config = hc_prenorm_gemm.choose(tokens, batch_invariant=invariant)
        found.add(("hc_prenorm_gemm", depth, config))
        found.add(("hc_pre", depth, hc_pre.choose(splits)))
    if tokens <= hc_post_prenorm_gemm.MOST_TOKENS and not invariant:
        splits = hc_post_prenorm_gemm.splits_of(tokens, widths.hidden, sms=sms)
        found.add("hc_post_prenorm_gemm")
        # Of another number of parts than hc_prenorm_gemm's at this depth.
        found.add(("hc_pre after hc_post_prenorm_gemm", hc_pre.choose(splits)))
    return found


def representatives(widths: Widths, counts: Iterable[int], target: Target) -> list[int]:
    """Of `counts`, ascending, those that are the first to launch some variant."""
    seen: set[Hashable] = set()
    chosen = []
    for tokens in sorted(set(counts)):
        found = variants(widths, tokens, target)
        if not found <= seen:
            chosen.append(tokens)
            seen |= found
    return chosen


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()

# SPDX-License-Identifier: Apache-2.0
"""Steps of a worker as the scheduler orders them, for requests that nobody made. Workers only.

Both model runners take the scheduler's output, and vLLM warms its V2 runner up in the same way
(v1/worker/gpu/warmup.py); the private `_dummy_run` of the V1 runner has another signature in each
release, and does not reach sampler and drafts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from vllm import SamplingParams
from vllm.distributed.parallel_state import get_pp_group, is_global_first_rank
from vllm.v1.attention.backends.mla import sparse_swa
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import Request

# By name, so that who plans batches need not import vLLM.
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "random": {"temperature": 0.8},
    "top_k": {"temperature": 0.8, "top_k": 20},
    "top_p": {"temperature": 0.8, "top_p": 0.9},
    "top_k and top_p": {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "logprobs": {"temperature": 0.0, "logprobs": 5},
    "everything": {
        "temperature": 0.9,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.1,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.5,
        "repetition_penalty": 1.2,
        "logprobs": 5,
    },
}


def obstacle(worker: Any) -> str | None:
    """Why requests of our own cannot run through this worker, as a predicate; None if they can."""
    config = worker.vllm_config
    if worker.model_runner.is_pooling_model or config.model_config.is_encoder_decoder:
        return "does not generate from text alone"
    if config.kv_transfer_config is not None:
        return "moves its KV cache to other engines"
    if config.parallel_config.data_parallel_size > 1 or config.parallel_config.enable_eplb:
        return "shares its steps, or its statistics, with other data-parallel ranks"
    if config.lora_config is not None:
        return "takes its adapters from requests"
    if getattr(worker.model_runner, "adaptive_verification", None) is not None:
        return "chooses drafts by costs that it has yet to measure"
    return None


def state_block(worker: Any) -> int | None:
    """Tokens after which a state moves on to another block, for prefix caching; None: it stays."""
    for group in worker.model_runner.kv_cache_config.kv_cache_groups:
        if getattr(group.kv_cache_spec, "mamba_cache_mode", None) == "align":
            tokens: int = group.kv_cache_spec.block_size
            return tokens
    return None


@contextmanager
def without_graphs(worker: Any) -> Iterator[None]:
    """Meanwhile the V1 runner runs everything eagerly, as the V2 runner does before it captures.

    Its dispatchers, else, send batches to graphs that are not there yet.
    """
    runner = worker.model_runner
    owners = [runner, getattr(runner, "drafter", None)]
    dispatchers: list[Any] = [getattr(owner, "cudagraph_dispatcher", None) for owner in owners]
    ready = [each for each in dispatchers if getattr(each, "keys_initialized", False)]
    for dispatcher in ready:
        dispatcher.keys_initialized = False
    try:
        yield
    finally:
        for dispatcher in ready:
            dispatcher.keys_initialized = True


def launch_prefill_metadata(vllm_config: Any, device: torch.device) -> None:
    """vLLM's kernel for the prefills of a batch, for all numbers that Triton tells apart in it.

    Those are the numbers of prefills and of decodes together, of which batches reach too many.
    """
    # until: vllm>=0.32, whose kernel is not specialised on them.
    kernel = getattr(sparse_swa, "_compute_prefill_metadata_kernel", None)
    if kernel is None:
        return
    window = vllm_config.model_config.hf_text_config.sliding_window
    # Powers of two are the kernel's block; from 16 on Triton knows that they are multiples of 16.
    blocks = [
        1 << exponent
        for exponent in range(vllm_config.scheduler_config.max_num_seqs.bit_length() + 1)
    ]
    numbers = torch.zeros(16 + blocks[-1] + 1, dtype=torch.int32, device=device)
    for block in blocks:
        for prefills in (block, block - 1) if block >= 16 else (block,):
            for decodes in (1, 2, 16):
                kernel[(1,)](
                    torch.empty_like(numbers),
                    numbers,
                    numbers,
                    prefills,
                    decodes,
                    window,
                    BLOCK_SIZE=block,
                )


class Engine:
    """Runs batches through a worker, one after the other.

    Args:
        reserve: tokens past its prompt that a request has blocks for.
    """

    def __init__(self, worker: Any, reserve: int) -> None:
        self._worker = worker
        self._reserve = reserve
        config = worker.model_runner.kv_cache_config
        self._groups = config.kv_cache_groups
        self._blocks = config.num_blocks
        # Where layers with a state share blocks with attention, which must find no NaN in them.
        self._zeroes = getattr(config, "needs_kv_cache_zeroing", False)
        self._next_block = 0
        self._next_request = 0

    def run(
        self,
        prompts: Sequence[int],
        *,
        sampling: str = "greedy",
        first_chunk: int | None = None,
        drafts: Sequence[int] | None = None,
        joining: int = 0,
        staying: int = 0,
    ) -> None:
        """Prefill some requests, let them decode one step, and end them.

        Args:
            prompts: tokens of each request's prompt.
            sampling: a key of SAMPLING.
            first_chunk: tokens of each prompt that come in a step before the rest.
            drafts: draft tokens of each request in the decode step; None: there is no such step.
            joining: tokens of one more prompt, which joins the decode step.
            staying: requests that decode once more, without drafts, after the others have ended.
        """
        names = [self._name() for _ in prompts]
        new = [
            self._new(name, tokens, sampling) for name, tokens in zip(names, prompts, strict=True)
        ]
        starting = dict(zip(names, prompts, strict=True))
        if first_chunk is None:
            self._step(new, starting)
        else:
            first = {name: min(first_chunk, tokens - 1) for name, tokens in starting.items()}
            self._step(new, first)
            rest = {name: tokens - first[name] for name, tokens in starting.items()}
            self._step([], rest, cached=self._cached(names, list(first.values()), outputs=0))
        if drafts is not None:
            scheduled = {name: 1 + count for name, count in zip(names, drafts, strict=True)}
            drafted = {
                name: [0] * count for name, count in zip(names, drafts, strict=True) if count
            }
            cached = self._cached(names, list(prompts), outputs=1)
            more = []
            if joining:
                names.append(self._name())
                more.append(self._new(names[-1], joining, sampling))
                scheduled[names[-1]] = joining
            self._step(more, scheduled, cached=cached, drafted=drafted)
            if staying:
                ended, names = names[staying:], names[:staying]
                computed = [tokens + 1 for tokens in prompts[:staying]]
                cached = self._cached(names, computed, outputs=2)
                self._step([], dict.fromkeys(names, 1), cached=cached, ended=ended)
        self._finish(names)

    def zero_blocks(self, counts: Sequence[int]) -> None:
        """Zero so many blocks at a time, in models whose scheduler asks for it."""
        for count in counts if self._zeroes else ():
            output = self._output()
            output.new_block_ids_to_zero = list(range(1, 1 + min(count, self._blocks - 1)))
            self._worker.execute_model(output)

    def _name(self) -> str:
        self._next_request += 1
        return f"_sm12x_warm_up_{self._next_request}_"

    def _new(self, name: str, tokens: int, sampling: str) -> NewRequestData:
        prompt = [token % 128 for token in range(tokens)]
        # The V2 runner takes the longest that a request can get from it.
        params = SamplingParams(**SAMPLING[sampling], max_tokens=self._reserve)
        request = Request(name, prompt, params, None)
        # Blocks may be those of another request: what is read from them was written there, and
        # nobody reads the result.
        room = tokens + self._reserve
        blocks = tuple(self._take(group.kv_cache_spec, room) for group in self._groups)
        return NewRequestData.from_request(request, blocks, prefill_token_ids=prompt)

    def _take(self, spec: Any, tokens: int) -> list[int]:
        count = -(-tokens // spec.block_size) + getattr(spec, "num_speculative_blocks", 0)
        # Block 0 is vLLM's null block.
        usable = self._blocks - 1
        first, self._next_block = self._next_block, self._next_block + count
        return [1 + (first + place) % usable for place in range(count)]

    def _cached(self, names: list[str], computed: list[int], *, outputs: int) -> CachedRequestData:
        data = CachedRequestData.make_empty()
        data.req_ids = list(names)
        data.num_computed_tokens = computed
        data.num_output_tokens = [outputs] * len(names)
        data.new_block_ids = [None] * len(names)
        if not get_pp_group().is_last_rank:
            # The V1 runner of an earlier pipeline rank has the last one from the scheduler.
            data.new_token_ids = [[0] * min(outputs, 1) for _ in names]
        return data

    def _step(
        self,
        new: list[NewRequestData],
        scheduled: dict[str, int],
        *,
        cached: CachedRequestData | None = None,
        drafted: dict[str, list[int]] | None = None,
        ended: Sequence[str] = (),
    ) -> None:
        output = self._output()
        output.finished_req_ids = set(ended)
        output.scheduled_new_reqs = new
        if new and self._zeroes:
            output.new_block_ids_to_zero = self._attention_blocks(new)
        if cached is not None:
            output.scheduled_cached_reqs = cached
        output.num_scheduled_tokens = scheduled
        output.total_num_scheduled_tokens = sum(scheduled.values())
        output.scheduled_spec_decode_tokens = drafted or {}
        self._worker.execute_model(output)
        sampled = self._worker.sample_tokens(None)
        if hasattr(sampled, "get_output"):
            sampled.get_output()

    def _attention_blocks(self, new: list[NewRequestData]) -> list[int]:
        attention = [isinstance(group.kv_cache_spec, FullAttentionSpec) for group in self._groups]
        return [
            block
            for request in new
            for ids, zeroed in zip(request.block_ids, attention, strict=True)
            if zeroed
            for block in ids
        ]

    def _finish(self, names: list[str]) -> None:
        output = self._output()
        output.finished_req_ids = set(names)
        self._worker.execute_model(output)

    def _output(self) -> SchedulerOutput:
        output = SchedulerOutput.make_empty()
        output.num_common_prefix_blocks = [0] * len(self._groups)
        speculative = self._worker.vllm_config.speculative_config
        if speculative is not None and hasattr(output, "num_spec_tokens_to_schedule"):
            output.num_spec_tokens_to_schedule = speculative.num_speculative_tokens
        return output


def finish() -> None:
    """Wait for what was launched, and give its scratch memory back."""
    torch.accelerator.synchronize()
    torch.accelerator.empty_cache()


__all__ = [
    "SAMPLING",
    "Engine",
    "finish",
    "is_global_first_rank",
    "launch_prefill_metadata",
    "obstacle",
    "state_block",
    "without_graphs",
]

# SPDX-License-Identifier: Apache-2.0
"""Around the V1 model runner's warm-up of a batch that it is about to capture."""

from collections.abc import Callable
from typing import Any

from vllm_sm12x.vllm_api.graph_capture import CUDAGraphMode


def warm_up_as_captured(
    original: Callable[..., Any],
    runner: Any,
    batch: Any,
    cudagraph_runtime_mode: Any,
    **kwargs: Any,
) -> Any:
    """Give the dummy runs before a FULL capture the attention metadata that the capture gets.

    vLLM builds it in another way, by which the kernels of speculative tokens are not launched, and
    compile inside the capture, which CUDA forbids.
    """
    if cudagraph_runtime_mode != CUDAGraphMode.FULL:
        return original(runner, batch, cudagraph_runtime_mode, **kwargs)
    plain, own = runner._dummy_run, vars(runner).get("_dummy_run")

    def dummy_run(*run_args: Any, **run_kwargs: Any) -> Any:
        if run_kwargs.get("force_attention"):
            run_kwargs.setdefault("is_graph_capturing", True)
        return plain(*run_args, **run_kwargs)

    runner._dummy_run = dummy_run
    try:
        return original(runner, batch, cudagraph_runtime_mode, **kwargs)
    finally:
        if own is None:
            del runner._dummy_run
        else:
            runner._dummy_run = own

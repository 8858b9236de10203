# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` lines for SM12x machines: what others have run, and the line for the one at hand."""

import shlex
from dataclasses import dataclass

_PR = "https://github.com/vllm-project/vllm/pull/40899"
_FLASH, _PRO = "deepseek-ai/DeepSeek-V4-Flash", "deepseek-ai/DeepSeek-V4-Pro"
_CHAT = (
    "--tokenizer-mode deepseek_v4 --tool-call-parser deepseek_v4 --enable-auto-tool-choice "
    "--reasoning-parser deepseek_v4"
)
_CACHE = "--kv-cache-dtype fp8 --block-size 256"
# Weights of V4-Flash: 2 x 74.8 GiB, as loaded on two ranks in that pull request.
_FLASH_GIB = 149.6


@dataclass(frozen=True)
class Recipe:
    """A machine, the command that somebody served with there (None: nobody known), and from where.

    All ran on forks of vLLM, not with this plugin. The note says where a command is put together
    from published flags; environment variables, host and port are in the source.
    """

    machine: str
    command: str | None
    source: str
    note: str


RECIPES = (
    Recipe(
        "1x RTX PRO 6000",
        None,
        _PR,
        f"No working command: V4-Flash's weights take some {_FLASH_GIB} GiB, the GPU has 95 GiB.",
    ),
    Recipe(
        "2x RTX PRO 6000",
        f"vllm serve {_FLASH} --trust-remote-code {_CACHE} --max-model-len 1048576 "
        "--gpu-memory-utilization 0.985 --tensor-parallel-size 2 --compilation-config "
        f'\'{{"cudagraph_mode":"FULL_AND_PIECEWISE", "custom_ops":["all"]}}\' {_CHAT}',
        _PR,
        "74.8 GiB of weights a GPU; 0.985 held 1.32 requests of 1,048,576 tokens, and is too high "
        'with --speculative-config \'{"method":"mtp","num_speculative_tokens":2}\', which ran at '
        "0.92. A Max-Q pair ran out of memory in long prompts at 0.92 with 65,536 tokens, on an "
        "indexer that this plugin replaces.",
    ),
    Recipe(
        "4x RTX PRO 6000",
        None,
        "https://github.com/vllm-project/recipes/issues/967",
        "V4-Flash-0731 was served so with DSpark, 3 draft tokens measured ahead of 7; no whole "
        "command is known here. Nobody is known to have run the line above with "
        "--tensor-parallel-size 4.",
    ),
    Recipe(
        "1x RTX 5090",
        None,
        _PR,
        f"No working command: V4-Flash's weights take some {_FLASH_GIB} GiB, the GPU has 32 GiB.",
    ),
    Recipe(
        "1x DGX Spark",
        None,
        _PR,
        f"No working command: V4-Flash's weights take some {_FLASH_GIB} GiB, the machine has 120 "
        "GiB for CPU and GPU together.",
    ),
    Recipe(
        "2x DGX Spark",
        f"vllm serve {_FLASH} --kv-cache-dtype fp8_ds_mla --block-size 256 --moe-backend marlin "
        "--enforce-eager --gpu-memory-utilization 0.80 --load-format instanttensor "
        f"--tensor-parallel-size 2 {_CHAT}",
        f"{_PR} (tonyliu312, 2026-04-27)",
        "Published are TP=2 and the flags from --moe-backend to --load-format, under a 24 h soak; "
        "model, block size and parsers are those of the line for 2x RTX PRO 6000. Two machines "
        "also need an executor: ray, as there, or --nnodes 2.",
    ),
    Recipe(
        "8x DGX Spark",
        f"vllm serve {_PRO} --trust-remote-code {_CACHE} --tensor-parallel-size 8 "
        "--pipeline-parallel-size 1 --max-model-len 1024 --gpu-memory-utilization 0.88 "
        "--safetensors-load-strategy prefetch "
        f"{_CHAT} --distributed-executor-backend ray --enforce-eager",
        f"{_PR} (idonati, 2026-04-27)",
        "V4-Pro, 102.4 GiB of weights a machine. V4-Flash ran there with --moe-backend marlin "
        "--kv-cache-dtype fp8_ds_mla --gpu-memory-utilization 0.80, and RAY_CGRAPH_get_timeout=900 "
        "for 8 concurrent requests.",
    ),
)


def serve_line(
    model: str,
    *,
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    max_model_len: int,
    gpu_memory_utilization: float,
    machines: int,
) -> str:
    """The command for this machine; with several `machines`, RANK and ADDRESS are to be filled."""
    words = ["vllm serve", shlex.quote(model), _CACHE]
    words.append(f"--tensor-parallel-size {tensor_parallel_size}")
    if pipeline_parallel_size > 1:
        words.append(f"--pipeline-parallel-size {pipeline_parallel_size}")
    words.append(f"--max-model-len {max_model_len}")
    words.append(f"--gpu-memory-utilization {gpu_memory_utilization:g}")
    if machines > 1:
        words.append(f"--nnodes {machines} --node-rank RANK --master-addr ADDRESS")
    return " ".join([*words, _CHAT])

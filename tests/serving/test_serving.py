# SPDX-License-Identifier: Apache-2.0
"""Real `vllm serve` of the tiny DeepSeek V4 answers through TRITON_MLA_SPARSE."""

import sys
from importlib import metadata
from pathlib import Path

import pytest

from vllm_sm12x.tiny_checkpoint import write_tiny_deepseek_v4

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from server import Attention, attention_env, check_startup, vllm_server  # noqa: E402
from serving import ask_all, mixed_requests, token_range  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_deepseek_v4(tmp_path_factory.mktemp("checkpoint") / "tiny-dsv4")


@pytest.mark.parametrize(
    ("mode", "args"),
    [
        ("eager", ("--enforce-eager",)),
        ("cudagraph", ()),
        ("mtp", ("--speculative-config", '{"method": "mtp", "num_speculative_tokens": 2}')),
    ],
)
def test_eight_requests_are_answered(checkpoint, tmp_path, mode, args):
    groups = {point.group for point in metadata.distribution("vllm-sm12x").entry_points}
    assert "vllm.general_plugins" in groups, "install the plugin: vLLM finds it by entry points"
    env = attention_env(Attention.OURS)
    with vllm_server(checkpoint, log=tmp_path / "log", args=args, env=env) as server:
        wrong = check_startup(
            server.startup_log, attention=Attention.OURS, cudagraphs=mode != "eager"
        )
        answers, _ = ask_all(server.port, mixed_requests(8, token_range(checkpoint)), 8)
        wrong += server.problems()
    wrong += [problem for answer in answers for problem in answer.problems]
    assert wrong == []

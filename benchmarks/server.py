# SPDX-License-Identifier: Apache-2.0
"""A real `vllm serve` in a process group of its own, and what its log says."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any


class Attention(str, Enum):
    """Whose attention serves the model.

    OURS: ours, forced on any GPU; the rest is what that GPU gets. PROXY: all that an SM12x GPU
    gets, as the plugin chooses by itself there.
    """

    OURS = "ours"
    STOCK = "stock"
    PROXY = "proxy"


OUR_BACKEND = "TRITON_MLA_SPARSE"
MODEL_NAME = "model"

# How every engine here is configured, unless its command line says otherwise.
ENGINE_ARGS: dict[str, Any] = {
    "kv_cache_dtype": "fp8",
    "block_size": 256,
    "max_model_len": 8192,
    "max_num_seqs": 8,
    "gpu_memory_utilization": 0.6,
}
DEEPSEEK_V4_ARGS = ("kv_cache_dtype", "block_size")  # other models choose their own

_CHOSEN = re.compile(r"DeepSeek V4 attention: (.+?), because (.+)\.\s*$", re.MULTILINE)
_CAPTURED = "Graph capturing finished in"
_DEFECTS = ("CUDA error", "illegal memory access", "EngineDeadError", "Traceback (most recent")


class ServerError(RuntimeError):
    """The server did not start, died, or runs something else than it was asked to."""


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        startup_seconds: from the start of the process to a healthy answer.
        startup_log: what it had printed by then.
    """

    port: int
    log: Path
    process: subprocess.Popen[bytes]
    startup_seconds: float
    startup_log: str

    def problems(self) -> list[str]:
        """Whether it died, and what it has printed about errors since it was healthy."""
        serving_log = _read(self.log)[len(self.startup_log) :]
        problems = [f"the log has {defect!r}" for defect in _DEFECTS if defect in serving_log]
        if self.process.poll() is not None:
            problems.append(f"the server ended with status {self.process.returncode}")
        return problems

    def counters(self, *prefixes: str) -> dict[str, float]:
        """The counters of /metrics whose names begin so, summed over their labels."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        finally:
            connection.close()
        sums: dict[str, float] = {}
        for line in text.splitlines():
            name = re.split(r"[{ ]", line, maxsplit=1)[0]
            if name.startswith(prefixes) and name.endswith("_total"):
                sums[name] = sums.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
        return sums


@contextmanager
def vllm_server(
    model: Path | str,
    *,
    log: Path,
    args: Sequence[str] = (),
    env: dict[str, str] | None = None,
    limit_seconds: float = 600,
) -> Iterator[Server]:
    """Run `vllm serve MODEL` with its `engine_args` and `args`, until the block ends.

    `env` is added to this process' environment. All the server prints goes to the file `log`.
    Raises ServerError if the server is not healthy within `limit_seconds`.
    """
    port = _free_port()
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL_NAME),
        *(part for name, value in engine_args(model).items() for part in (_flag(name), str(value))),
        *args,
    ]
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **offline(model), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_healthy(process, port, log, started + limit_seconds)
        yield Server(port, log, process, time.monotonic() - started, _read(log))
    finally:
        _stop(process)


def offline(model: Path | str) -> dict[str, str]:
    """Variables that keep vLLM from asking a network for what a local model has already."""
    return {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"} if Path(model).is_dir() else {}


def is_deepseek_v4(model: Path | str) -> bool:
    """Whether MODEL is a DeepSeek V4: all are but a directory whose config.json names another."""
    file = Path(model) / "config.json"
    if not file.is_file():
        return True
    config = json.loads(file.read_text(encoding="utf-8"))
    return config.get("model_type", "deepseek_v4") == "deepseek_v4"


def engine_args(model: Path | str) -> dict[str, Any]:
    """ENGINE_ARGS as MODEL takes them."""
    left_out = () if is_deepseek_v4(model) else DEEPSEEK_V4_ARGS
    return {name: value for name, value in ENGINE_ARGS.items() if name not in left_out}


def attention_env(attention: Attention, *, deepseek_v4: bool = True) -> dict[str, str]:
    """The variables that ask for our attention or all of the SM12x path, or forbid ours.

    Other models than DeepSeek V4 have vLLM's attention in any case: STOCK is then vLLM without
    plugins.
    """
    if attention is Attention.PROXY:
        return {"VLLM_TRITON_MLA_SPARSE": "auto", "VLLM_SM12X_ASSUME": "12.0"}
    switch = {"VLLM_TRITON_MLA_SPARSE": "1" if attention is Attention.OURS else "0"}
    if attention is Attention.STOCK and not deepseek_v4:
        switch["VLLM_PLUGINS"] = ""
    return switch


def parallel_args(tensor: int, pipeline: int) -> list[str]:
    """Options of `vllm serve` for that many GPUs; none for one."""
    sizes = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}
    return [part for name, size in sizes.items() if size > 1 for part in (_flag(name), str(size))]


def chosen_attention(log_text: str) -> set[str]:
    """The attention classes that the plugin says it built; empty if it says nothing."""
    return {match[1] for match in _CHOSEN.finditer(log_text)}


def check_startup(
    log_text: str, *, attention: Attention, cudagraphs: bool, deepseek_v4: bool = True
) -> list[str]:
    """What the log contradicts, in words: the attention class and the CUDA graphs asked for.

    The attention class is that of a DeepSeek V4; the log names none for other models.
    """
    problems = []
    chosen = chosen_attention(log_text)
    ours = {name for name in chosen if f"({OUR_BACKEND})" in name}
    if deepseek_v4 and attention is not Attention.STOCK and (not ours or chosen != ours):
        problems.append(f"asked for {OUR_BACKEND}, but the log names {sorted(chosen) or 'nothing'}")
    if attention is Attention.STOCK and ours:
        problems.append(f"asked for stock attention, but the log names {sorted(ours)}")
    if cudagraphs and _CAPTURED not in log_text:
        problems.append("asked for CUDA graphs, but the log does not say that they were captured")
    if not cudagraphs and _CAPTURED in log_text:
        problems.append("asked for eager execution, but CUDA graphs were captured")
    return problems


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _wait_until_healthy(
    process: subprocess.Popen[bytes], port: int, log: Path, deadline: float
) -> None:
    while not _healthy(port):
        if process.poll() is not None:
            raise ServerError(f"vllm serve ended with status {process.returncode}.\n{_tail(log)}")
        if time.monotonic() > deadline:
            raise ServerError(f"vllm serve is not healthy within its limit.\n{_tail(log)}")
        time.sleep(0.5)


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _read(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def _tail(log: Path, lines: int = 60) -> str:
    return "\n".join([f"The end of {log}:", *_read(log).splitlines()[-lines:]])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the front end to stop, then kill what is left of its group: engine and workers."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(30)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for _ in range(50):  # orphans are not ours to wait for; they hold GPU memory until gone
            os.killpg(process.pid, 0)
            time.sleep(0.2)

# SPDX-License-Identifier: Apache-2.0
"""The tiny model behind a real `vllm serve`: one question over HTTP, and a server that stops."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from vllm_sm12x import knobs
from vllm_sm12x.device import Device

BACKEND = "TRITON_MLA_SPARSE"
# What integration/selection.py logs when the model is built.
CHOICE = re.compile(r"DeepSeek V4 attention: (?P<what>.+?), because (?P<why>.+)\.\s*$")
SERVED_NAME = "tiny-deepseek-v4"
QUESTION = "Which attention kernel answers this?"
LOG_LINES = 30

# The first start compiles the model and its kernels.
START_LIMIT_S = 900.0
ANSWER_LIMIT_S = 300.0
STOP_LIMIT_S = 30.0

# The server is on this host; http_proxy is for others.
_local = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class DemoError(RuntimeError):
    """The server, or its answer, is not what it should be; the message says what is wrong."""


def run_serving(device: Device, *, console: Console, cache: Path | None = None) -> int:
    """Write the tiny checkpoint, serve it, ask it; return the exit status."""
    if knobs.get("VLLM_TRITON_MLA_SPARSE") is False:
        console.print("VLLM_TRITON_MLA_SPARSE=0 switches off what the demo shows: unset it.")
        return 1
    cache = cache or Path.home() / ".cache" / "vllm-sm12x"
    model = _write_checkpoint(cache / SERVED_NAME, console)
    port = _free_port()
    variables = ["HF_HUB_OFFLINE=1"]  # the model is on this disk
    if device.capability[0] != 12:
        console.print(
            f"{device.name} is no SM12x GPU: VLLM_TRITON_MLA_SPARSE=1 forces the backend."
        )
        variables.append("VLLM_TRITON_MLA_SPARSE=1")
    return serve_and_ask(["env", *variables, *serve_command(model, port)], port, console=console)


def serve_command(model: Path, port: int) -> list[str]:
    """`vllm serve` of the interpreter that runs the demo."""
    return [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)),
        *("--served-model-name", SERVED_NAME),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--kv-cache-dtype", "fp8", "--block-size", "256"),
        *("--max-model-len", "8192", "--max-num-seqs", "8"),
        *("--gpu-memory-utilization", "0.5"),
    ]


def serve_and_ask(
    command: Sequence[str],
    port: int,
    *,
    console: Console,
    start_limit_s: float = START_LIMIT_S,
    answer_limit_s: float = ANSWER_LIMIT_S,
) -> int:
    """Start a server, wait until it is healthy, ask it once, stop it.

    Returns 0 if TRITON_MLA_SPARSE was chosen and an answer came, else 1 after printing what went
    wrong and the end of the server's log. The server is stopped whatever happens.
    """
    handle, name = tempfile.mkstemp(prefix="vllm-sm12x-demo-", suffix=".log")
    os.close(handle)
    log = Path(name)
    url = f"http://127.0.0.1:{port}"
    console.print(f"$ {' '.join(command)}", markup=False, highlight=False, soft_wrap=True)
    try:
        with _server(command, log) as server:
            _wait_until_healthy(server, url, log, start_limit_s, console)
            what, why = _chosen_attention(log)
            console.print(f"Attention: {what}, because {why}.", markup=False)
            if BACKEND not in what:
                raise DemoError(f"vLLM chose {what}, and not {BACKEND}.")
            answer = _ask(url, answer_limit_s)
            console.print(f"Question:  {QUESTION}", markup=False)
            console.print(f"Answer:    {answer!r}", markup=False)
            console.print("(The weights are random, so the text is noise.)", style="dim")
    except DemoError as error:
        console.print(f"FAILED: {error}", markup=False)
        console.print(f"The last lines of the server's log, {log}:", markup=False, soft_wrap=True)
        for line in _last_lines(log, LOG_LINES):
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
        return 1
    console.print(f"Served by {BACKEND}; the server is stopped. Its log: {log}", soft_wrap=True)
    return 0


@contextlib.contextmanager
def _server(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen]:
    """A process in a group of its own: Ctrl-C reaches only us, and we stop the whole group."""
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with log.open("wb") as output:
            server = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield server
        finally:
            _stop(server)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _stop(server: subprocess.Popen) -> None:
    """Ask the server to end, then end what is left of its group."""
    try:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(STOP_LIMIT_S)
    finally:
        # The engine is a child of the server and can outlive it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _wait_until_healthy(
    server: subprocess.Popen, url: str, log: Path, limit_s: float, console: Console
) -> None:
    deadline = time.monotonic() + limit_s
    with console.status("Starting vllm serve") as status:
        while True:
            if server.poll() is not None:
                raise DemoError(f"the server ended with status {server.returncode} at its start.")
            with (
                contextlib.suppress(OSError, http.client.HTTPException),
                _local.open(f"{url}/health", timeout=5),
            ):
                return
            if time.monotonic() > deadline:
                raise DemoError(f"the server was not healthy after {limit_s:.0f} s.")
            last = "".join(_last_lines(log, 1))[: max(console.width - 25, 20)]
            status.update(f"Starting vllm serve: [dim]{escape(last)}[/dim]")
            time.sleep(0.5)


def _chosen_attention(log: Path) -> tuple[str, str]:
    """The attention class and the reason, from the server's log."""
    with log.open(errors="replace") as lines:
        for line in lines:
            if found := CHOICE.search(line):
                return found["what"], found["why"]
    raise DemoError(
        "the server's log does not say which attention it chose: the plugin was not loaded "
        "(`vllm-sm12x doctor` says why)."
    )


def _ask(url: str, limit_s: float) -> str:
    # Random weights could choose the end token first.
    sampling = {"max_tokens": 16, "temperature": 0, "ignore_eos": True}
    body = {"model": SERVED_NAME, "prompt": QUESTION, **sampling}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with _local.open(request, timeout=limit_s) as response:
            answer = json.load(response)
        text, tokens = answer["choices"][0]["text"], answer["usage"]["completion_tokens"]
    except urllib.error.HTTPError as error:
        detail = error.read().decode(errors="replace")[:500]
        raise DemoError(f"the request failed with status {error.code}: {detail}") from error
    except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
        raise DemoError(f"the request failed: {type(error).__name__}: {error}") from error
    if not tokens:
        raise DemoError(f"the answer has no tokens: {answer}")
    return text


def _last_lines(log: Path, count: int) -> list[str]:
    with log.open(errors="replace") as lines:
        # A progress bar is one line of the file: its last state stands after the last \r.
        return [line.rstrip().rpartition("\r")[2] for line in deque(lines, maxlen=count)]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _write_checkpoint(path: Path, console: Console) -> Path:
    from vllm_sm12x.tiny_checkpoint import write_tiny_deepseek_v4

    columns = (TextColumn("Writing a tiny DeepSeek V4"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=None)
        model = write_tiny_deepseek_v4(
            path,
            progress=lambda done, total, label: progress.update(task, completed=done, total=total),
        )
    console.print(f"Checkpoint: {model}", markup=False, soft_wrap=True)
    return model

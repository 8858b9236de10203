# SPDX-License-Identifier: Apache-2.0
"""`vllm-sm12x demo`: its exit status is right, and it never leaves a server behind."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from vllm_sm12x import demo, device
from vllm_sm12x.demo import serving

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
H200 = device.Device("NVIDIA H200", (9, 0), 141 << 30, "570.0")
OLD = device.Device("Tesla T4", (7, 5), 16 << 30, "570.0")

STAND_IN = """
import json, os, signal, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

fault, port, pids = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
engine = subprocess.Popen(["sleep", "600"])
pids.with_suffix(".new").write_text(json.dumps([os.getpid(), engine.pid]))
pids.with_suffix(".new").rename(pids)
for i in range(50):
    print("INFO line", i)
if fault == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if fault == "dies":
    sys.exit("ValueError: no [red]kernel image[/red]")
what = "DeepseekV4FlashMLAAttention" if fault == "stock" else \\
    "TritonMlaSparseAttention (TRITON_MLA_SPARSE)"
if fault != "silent":
    print(f"(EngineCore pid=7) INFO 11-20 [selection.py:86] DeepSeek V4 attention: {what}, "
          "because the GPU is SM12x.")
sys.stdout.flush()

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if fault == "deaf" else 200)
        self.end_headers()
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/completions" and body["prompt"]
        if fault == "dies_asked":
            os._exit(3)
        self.send_response(500 if fault == "http_500" else 200)
        self.end_headers()
        tokens = 0 if fault == "empty" else body["max_tokens"]
        answer = {"choices": [{"text": "lo rem"}], "usage": {"completion_tokens": tokens}}
        self.wfile.write(b"the engine is on fire" if fault == "http_500" else
                         json.dumps(answer).encode())
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie that nobody has reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def all_end(pids: list[int]) -> bool:
    """Whether every process is gone at once, give or take what SIGKILL needs to arrive."""
    deadline = time.monotonic() + 5
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(alive, pids))


@pytest.fixture
def stand_in(tmp_path):
    """`stand_in(fault)` gives the command and port of a server that has this fault."""
    script = tmp_path / "server.py"
    script.write_text(STAND_IN)
    port = serving._free_port()
    return lambda fault: (
        [sys.executable, str(script), fault, str(port), str(tmp_path / "pids.json")],
        port,
    )


def serve_and_ask(stand_in, fault, start_limit_s=60.0):
    output = io.StringIO()
    command, port = stand_in(fault)
    status = serving.serve_and_ask(
        command, port, console=Console(file=output, width=100), start_limit_s=start_limit_s
    )
    pids = json.loads(Path(command[-1]).read_text())
    return status, output.getvalue(), pids


def test_a_good_server_answers_and_is_stopped(stand_in, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a proxy would get no answer
    status, output, pids = serve_and_ask(stand_in, "")
    assert status == 0
    assert "Attention: TritonMlaSparseAttention (TRITON_MLA_SPARSE), because" in output
    assert serving.QUESTION in output and "'lo rem'" in output and "noise" in output
    assert "FAILED" not in output
    assert all_end(pids)


@pytest.mark.parametrize(
    "fault, message",
    [
        ("dies", "the server ended with status 1 at its start"),
        ("deaf", "the server was not healthy after 3 s"),
        ("stock", "vLLM chose DeepseekV4FlashMLAAttention, and not TRITON_MLA_SPARSE"),
        ("silent", "does not say which attention it chose"),
        ("http_500", "status 500: the engine is on fire"),
        ("dies_asked", "the request failed: "),
        ("empty", "the answer has no tokens"),
    ],
)
def test_a_bad_server_fails_shows_its_log_and_is_stopped(stand_in, fault, message):
    limit = 3.0 if fault == "deaf" else 60.0
    status, output, pids = serve_and_ask(stand_in, fault, limit)
    assert status == 1
    assert "FAILED: " in output and message in output
    log = Path(re.search(r"The last lines of the server's log, (\S+):", output)[1])
    assert log.is_file()
    shown = output.partition(str(log))[2].splitlines()[1:]
    assert shown == [f"  {line}" for line in log.read_text().splitlines()[-30:]]
    if fault == "dies":
        assert shown[-1] == "  ValueError: no [red]kernel image[/red]"
    assert all_end(pids)


def test_a_server_that_ignores_sigterm_is_killed(stand_in, monkeypatch):
    monkeypatch.setattr(serving, "STOP_LIMIT_S", 0.5)
    status, _, pids = serve_and_ask(stand_in, "stubborn")
    assert status == 0
    assert all_end(pids)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_no_server(stand_in, number):
    command, port = stand_in("deaf")
    # A shell ignores SIGINT for what it runs in the background, tests too, and children inherit it.
    snippet = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from rich.console import Console; from vllm_sm12x.demo import serving\n"
        f"serving.serve_and_ask({command!r}, {port}, console=Console())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", snippet], cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True
    )
    pid_file = Path(command[-1])
    deadline = time.monotonic() + 60
    while not pid_file.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    pids = json.loads(pid_file.read_text())
    assert all(map(alive, pids))
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert b"KeyboardInterrupt" in errors if number == signal.SIGINT else not errors
    assert all_end(pids)


def test_the_served_command_is_for_this_model_and_forces_the_backend_elsewhere(
    monkeypatch, tmp_path
):
    commands = []
    monkeypatch.delenv("VLLM_TRITON_MLA_SPARSE", raising=False)
    monkeypatch.setattr(serving, "_write_checkpoint", lambda path, console: path)
    monkeypatch.setattr(
        serving, "serve_and_ask", lambda command, port, console: commands.append(command) or 0
    )
    rtx = device.Device("NVIDIA RTX PRO 6000", (12, 0), 96 << 30, "570.0")
    for gpu in (H200, rtx):
        assert serving.run_serving(gpu, console=Console(file=io.StringIO()), cache=tmp_path) == 0
    forced, plain = commands
    assert "VLLM_TRITON_MLA_SPARSE=1" in forced and "VLLM_TRITON_MLA_SPARSE=1" not in plain
    line = " ".join(plain)
    assert f"serve {tmp_path}/tiny-deepseek-v4 " in line
    assert "--kv-cache-dtype fp8 --block-size 256" in line and "--max-model-len 8192" in line


def test_a_switched_off_backend_is_said_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_TRITON_MLA_SPARSE", "0")
    output = io.StringIO()
    assert serving.run_serving(H200, console=Console(file=output), cache=tmp_path) == 1
    assert "VLLM_TRITON_MLA_SPARSE=0 switches off" in output.getvalue()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("found", [device.NoDevice("NVML finds no NVIDIA GPU"), OLD])
def test_a_demanded_gpu_is_never_replaced_by_the_cpu(found, monkeypatch, capsys):
    monkeypatch.setattr(device, "first_visible_device", lambda: found)
    assert demo.run_demo(gpu=True) == 1
    reason = found.reason if isinstance(found, device.NoDevice) else "Tesla T4 is SM 7.5"
    assert reason in " ".join(capsys.readouterr().out.split())


def test_without_a_gpu_the_command_checks_the_attention_path():
    """The whole command, as a user runs it: nine comparisons and exit status 0."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "vllm_sm12x", "demo"],
        cwd=ROOT,
        env={**environment, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "100"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    rows = [line.split() for line in run.stdout.splitlines() if line.rstrip().endswith(" yes")]
    kinds = [" ".join(row[:2]) for row in rows]
    assert kinds == ["window only"] * 3 + ["ratio 4,"] * 3 + ["ratio 128"] * 3
    for row in rows:
        kernel, oracle = float(row[-3]), float(row[-2])
        assert 0 < kernel <= 4e-3 and 0 < oracle <= 1e-5
    assert "All 9 comparisons are within tolerance." in run.stdout
    assert "No GPU to serve on:" in run.stdout


CORRUPT = """
import json, sys
import torch
from vllm_sm12x.demo import attention
from rich.console import Console

kernel, slots = attention.sparse_mla, attention.PagedCache.slots

def status():
    decode = attention.PHASES[1]
    with open("/dev/null", "w") as null:
        return attention.run_attention(ratios=(0,), phases=(decode,), console=Console(file=null))

def shifted(*, swa_indices, **arguments):
    return kernel(swa_indices=(swa_indices - 1).clamp_min(-1), **arguments)

statuses = {"untouched": status()}
attention.sparse_mla = shifted
statuses["kernel reads one slot further"] = status()
attention.sparse_mla = lambda **arguments: kernel(**arguments) * float("nan")
statuses["kernel gives NaN"] = status()
attention.sparse_mla = kernel
attention.PagedCache.slots = lambda self, i, p: slots(self, i, (p - 1).clamp_min(0))
statuses["kernel and oracle get wrong slots"] = status()
print(json.dumps(statuses))
"""


def test_the_cpu_demo_fails_when_kernel_or_indices_are_wrong():
    run = subprocess.run(
        [sys.executable, "-c", CORRUPT],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(run.stdout) == {
        "untouched": 0,
        "kernel reads one slot further": 1,
        "kernel gives NaN": 1,
        "kernel and oracle get wrong slots": 1,
    }

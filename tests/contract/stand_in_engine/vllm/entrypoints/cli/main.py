# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` without a model that takes time like one: a step, a prefill token, a prefix cache.

Without our attention (VLLM_TRITON_MLA_SPARSE=0) steps take twice as long. STAND_IN_FAULT names one
thing that it does wrong.
"""

import contextlib
import gzip
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULT = os.environ.get("STAND_IN_FAULT", "")
STOCK = os.environ["VLLM_TRITON_MLA_SPARSE"] == "0"
STEP_SECONDS = 0.008 if STOCK else 0.004
PREFILL_SECONDS = 20e-6  # a token
DRAFTED = "--speculative-config" in sys.argv
TOKENS_PER_STEP = 2 if DRAFTED else 1

lock = threading.Lock()
one_at_a_time = threading.Lock()
cached: set[tuple[int, ...]] = set()
counters = {
    "vllm:request_prefill_time_seconds_sum": 0.0,
    "vllm:request_prefill_time_seconds_count": 0.0,
    "vllm:prefix_cache_hits_total": 0.0,
    "vllm:num_preemptions_total": 0.0,
    "vllm:spec_decode_num_drafts_total": 0.0,
    "vllm:spec_decode_num_draft_tokens_total": 0.0,
    "vllm:spec_decode_num_accepted_tokens_total": 0.0,
    "vllm:num_requests_running": 0.0,
    "vllm:num_requests_waiting": 0.0,
}
CHUNK = 32
profiled_batch = 0
prefilled = 0  # tokens, since the profiler started


def count(name: str, by: float) -> None:
    with lock:
        counters[f"vllm:{name}"] += by


def option(name: str) -> str:
    last = max(i for i, argument in enumerate(sys.argv) if argument == name)
    return sys.argv[last + 1]


def steps() -> list[str]:
    """Four of those that decode, or the chunks of a prompt."""
    if profiled_batch:
        waiting = 1 if FAULT == "mixed_profile" else 0
        return [f"execute_context_{waiting}(0)_generation_{profiled_batch}({profiled_batch})"] * 4
    lost = CHUNK if FAULT == "cut_profile" else 0
    return ["execute_context_1(32)_generation_0(0)"] * ((prefilled - lost) // CHUNK)


def trace() -> dict:
    """Steps of the engine, as torch's profiler writes them; after a prefill, one that is empty."""
    kernels = {"sparse_mla_kernel": 30.0, "nvjet_sm90_tst": 50.0, "sparse_mla_merge_kernel": 5.0}
    events: list[dict] = [{"ph": "M", "name": "process_name"}]
    if not profiled_batch:
        empty = "execute_context_0(0)_generation_0(0)"
        events.append({"ph": "X", "cat": "user_annotation", "name": empty, "dur": 30.0})
    for step in steps():
        events.append({"ph": "X", "cat": "user_annotation", "name": step, "dur": 3000.0})
        events.append({"ph": "X", "cat": "gpu_user_annotation", "name": step, "dur": 90.0})
        events.append({"ph": "X", "cat": "cpu_op", "name": "aten::mm", "dur": 70.0})
        events += [{"ph": "X", "cat": "kernel", "name": k, "dur": us} for k, us in kernels.items()]
        events.append({"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD", "dur": 15.0})
    return {"traceEvents": events}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """No access log."""

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        with lock:
            lines = [f'{name}{{engine="0"}} {value}' for name, value in counters.items()]
        self.answer(200, "\n".join(lines) if self.path == "/metrics" else "")

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def event(self, value: object) -> None:
        data = value if isinstance(value, str) else json.dumps(value)
        payload = f"data: {data}\n\n".encode()
        self.wfile.write(f"{len(payload):x}\r\n".encode() + payload + b"\r\n")
        self.wfile.flush()

    def do_POST(self) -> None:
        global profiled_batch, prefilled
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/start_profile":
            profiled_batch = int(counters["vllm:num_requests_running"])
            prefilled = 0
            self.answer(200, "")
        elif self.path == "/stop_profile":
            config = json.loads(option("--profiler-config"))
            folder = Path(config["torch_profiler_dir"])
            name = f"rank0.{time.time_ns()}.pt.trace.json.gz"
            with gzip.open(folder / name, "wt") as file:
                json.dump(trace(), file)
            self.answer(200, "")
        else:
            request = json.loads(body)
            with one_at_a_time if FAULT == "no_overlap" else contextlib.nullcontext():
                count("num_requests_running", 1)
                self.complete(tuple(request["prompt"]), request["max_tokens"])
                count("num_requests_running", -1)

    def complete(self, prompt: tuple[int, ...], tokens: int) -> None:
        global prefilled
        if FAULT == "http_500" and len(prompt) == 96:
            self.answer(500, "the engine is on fire")
            return
        if FAULT == "death" and len(prompt) == 96:
            os._exit(7)
        with lock:
            new = prompt not in cached
            cached.add(prompt)
            prefilled += len(prompt) if new else 0
        prefill = len(prompt) * PREFILL_SECONDS if new else 0.0
        if not new or FAULT == "cached":
            count("prefix_cache_hits_total", len(prompt))
        time.sleep(prefill)
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        tokens -= FAULT == "short" and tokens > 1
        sent, interval = 0, int(option("--stream-interval"))
        while sent < tokens:
            if sent:
                time.sleep(STEP_SECONDS * interval / TOKENS_PER_STEP)
            sent = min(sent + (interval if sent else 1), tokens)
            reason = "length" if sent == tokens else None
            self.event({"choices": [{"index": 0, "text": "x", "finish_reason": reason}]})
        usage = {"prompt_tokens": len(prompt), "completion_tokens": tokens}
        self.event({"choices": [], "usage": usage})
        self.event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")
        count("request_prefill_time_seconds_sum", prefill)
        count("request_prefill_time_seconds_count", 1)
        count("num_preemptions_total", FAULT == "preemption")
        if DRAFTED:
            count("spec_decode_num_drafts_total", (tokens - 1) / 2)
            count("spec_decode_num_draft_tokens_total", (tokens - 1) / 2)
            count("spec_decode_num_accepted_tokens_total", (tokens - 1) / 2)


def main() -> None:
    if not STOCK:
        print("INFO DeepSeek V4 attention: Ours (TRITON_MLA_SPARSE), because it is.", flush=True)
    if "--enforce-eager" not in sys.argv:
        print("INFO Graph capturing finished in 3 secs, took 0.20 GiB", flush=True)
    print(f"arguments {json.dumps(sys.argv[1:])}", flush=True)
    ThreadingHTTPServer(("127.0.0.1", int(option("--port"))), Handler).serve_forever()


main()

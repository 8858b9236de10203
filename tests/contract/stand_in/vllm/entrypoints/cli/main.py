# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` without a model: /health, /metrics and streamed /v1/completions.

STAND_IN_FAULT names one thing that it does wrong: to one request, to all that ask for
log-probabilities, or as a whole.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULT = os.environ.get("STAND_IN_FAULT", "")
FAULTY_REQUEST = 3
lock = threading.Lock()
served = active = most_active = 0


def say(text: str) -> None:
    print(f"(EngineCore pid={os.getpid()}) INFO 11-20 22:00:00 [core.py:1] {text}", flush=True)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """No access log."""

    def handle(self) -> None:
        # A client that has its answer may drop the connection; vLLM's server is silent then too.
        with contextlib.suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        text = "# HELP\n"
        if self.path == "/metrics":
            text += 'vllm:prefix_cache_hits_total{engine="0"} 512.0\n'
            text += 'vllm:prefix_cache_hits_total{engine="1"} 256.0\n'
            text += 'vllm:prefix_cache_hits_created{engine="0"} 1.7e9\n'
            text += f"vllm:num_preemptions_total {most_active}\n"
        self.answer(200, text)

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
        global served, active, most_active
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with lock:
            served, active = served + 1, active + 1
            most_active = max(most_active, active)
            fault = FAULT if served == FAULTY_REQUEST else ""
        time.sleep(0.02)  # long enough for requests to overlap, however they are scheduled
        with lock:
            # Before the answer: a client that has its last byte may already send the next request.
            active -= 1
        self.complete(body, fault)

    def complete(self, body: dict, fault: str) -> None:
        if fault == "http_500":
            self.answer(500, '{"error": {"message": "the engine is on fire"}}')
            return
        if fault == "traceback":
            say("Traceback (most recent call last):")
        if fault == "death":
            os._exit(7)
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        count = body["max_tokens"] - (fault == "token_count")
        value = {"nan": float("nan"), "null": None, "positive": 0.5}.get(FAULT, -8.5)
        for i in range(count):
            last = i == count - 1
            reason = ("stop" if fault == "finish_reason" else "length") if last else None
            choice = {"index": 0, "text": "x", "token_ids": [9], "finish_reason": reason}
            if body["logprobs"] is not None and not (FAULT == "missing" and last):
                choice["logprobs"] = {"token_logprobs": [value]}
            self.event({"choices": [choice]})
        if fault == "error_event":
            self.event({"error": {"message": "out of pages", "code": 500}})
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        usage["prompt_tokens"] -= fault == "prompt_count"
        self.event({"choices": [], "usage": usage})
        if fault != "cut":
            self.event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")


def main() -> None:
    if FAULT == "no_start":
        sys.exit("no kernel image is available")
    switch = os.environ["VLLM_TRITON_MLA_SPARSE"]
    assumed = os.environ.get("VLLM_SM12X_ASSUME", "").startswith("12.")
    if (switch == "1" or (switch == "auto" and assumed)) != (FAULT == "other_attention"):
        say("DeepSeek V4 attention: TritonMlaSparseAttention (TRITON_MLA_SPARSE), because it is.")
    if ("--enforce-eager" not in sys.argv) != (FAULT == "other_mode"):
        say("Graph capturing finished in 3 secs, took 0.20 GiB")
    worker = subprocess.Popen(["sleep", "600"])  # as engine processes: only a group kill ends it
    say(f"worker {worker.pid}")
    say(f"arguments {json.dumps(sys.argv[1:])}")
    time.sleep(0.2)
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


main()

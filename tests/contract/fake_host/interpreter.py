# SPDX-License-Identifier: Apache-2.0
"""A Python that has imported what vLLM imports and no test changes, and forks for each request.

An interpreter that starts from nothing takes 20 s to build vLLM's config, 15 of them in imports of
torch, transformers and their like. What the tests are about (vLLM, the plugin, kernel libraries) is
not among them: each fork finds and imports those itself, by its own environment.

It reads requests from stdin, one JSON object a line: `arguments` (what follows `python` on a
command line), `env` (the whole environment), `cwd`, `python_path`, `stdout` and `stderr` (files).
It answers each with a line, the exit status, once that process has ended.
"""

import importlib
import importlib.util
import json
import os
import runpy
import sys
from types import ModuleType
from typing import Any

# Each brings what it builds upon. None reads a variable that a test sets, or looks for CUDA.
IMPORTED = (
    "compressed_tensors",  # torch with its compiler, transformers, torchvision
    "transformers.processing_utils",
    "torch._inductor.compile_fx",
    "torchaudio",
    "openai.types.responses",
    "openai_harmony",
    "xgrammar",
    "fastapi",
    "aiohttp",
    "opentelemetry.sdk.trace",
)
# What a fork must find by itself.
LEFT = {"vllm", "vllm_sm12x", "flashinfer", "deep_gemm", "tilelang", "torch.utils.cpp_extension"}


def serve() -> dict[str, Any]:
    """Answer requests until they end; returns, in a child, the request that it is to run."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    for line in sys.stdin:
        child = os.fork()
        if not child:
            answers.close()
            return json.loads(line)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
    os._exit(0)


def become(request: dict[str, Any]) -> None:
    """Take on what a new process would have been given."""
    null = os.open(os.devnull, os.O_RDONLY)
    stdout, stderr = (os.open(request[name], os.O_WRONLY) for name in ("stdout", "stderr"))
    for target, source in enumerate((null, stdout, stderr)):
        os.dup2(source, target)
        os.close(source)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    # This file's folder is the first, as a script's is; a command or module has the current one.
    sys.path[0] = ""
    sys.path[1:1] = request["python_path"]
    importlib.invalidate_caches()


def run(arguments: list[str]) -> None:
    """What `python ARGUMENTS` does: `-c CODE`, `-m MODULE` or a script's path, then its own."""
    if arguments[0] == "-B":
        sys.dont_write_bytecode = True
        arguments = arguments[1:]
    kind, *rest = arguments
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(os.path.abspath(kind))
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    for name in IMPORTED:
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    if came_along := LEFT & sys.modules.keys():
        sys.exit(f"{', '.join(sorted(came_along))} came along with {', '.join(IMPORTED)}")
    request = serve()
    become(request)
    run(request["arguments"])

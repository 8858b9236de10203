# SPDX-License-Identifier: Apache-2.0
"""Counts what a worker compiles after it is ready: requests wait for each of them.

Triton tells of a compile by its own listener, an autotuner by the benchmark that it runs,
torch.compile and CuTe-DSL as they begin. Nothing here is called when a compiled kernel is launched.
What is seen is logged once per kernel, and written to VLLM_SM12X_COMPILE_LOG, one JSON object per
line, each time. A failure to record is dropped: a request is waiting.
"""

import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import triton
from triton.runtime.autotuner import Autotuner

from vllm_sm12x import knobs
from vllm_sm12x.log import get_logger

COMPILED, LOADED, TUNED = "compiled", "loaded from disk", "autotuned"

logger = get_logger(__name__)


class CompileWatch:
    """The hooks, and what they have seen since `arm`."""

    def __init__(self) -> None:
        self._hooks: ExitStack | None = None
        self._lock = threading.Lock()
        self._seen: Counter[tuple[str, str]] = Counter()

    @property
    def counts(self) -> dict[str, int]:
        """Events by what happened: compiled, loaded from disk, autotuned."""
        totals: Counter[str] = Counter()
        for (what, _), count in self._seen.items():
            totals[what] += count
        return dict(totals)

    def arm(self) -> None:
        """Begin to count. A second call begins at zero."""
        self.disarm()
        self._seen.clear()
        with ExitStack() as hooks:
            self._listen_to_triton(hooks)
            self._listen_to_the_autotuner(hooks)
            self._listen_to_torch(hooks)
            self._listen_to_cute(hooks)
            self._hooks = hooks.pop_all()
        _write({"what": "ready"})

    def disarm(self) -> None:
        """Take the hooks off, and leave in force what was there before."""
        if self._hooks is not None:
            self._hooks.close()
            self._hooks = None

    def record(
        self, what: str, kernel: str, detail: str, milliseconds: float | None = None
    ) -> None:
        """Count one event."""
        with self._lock:
            self._seen[what, kernel] += 1
            first = self._seen[what, kernel] == 1
        if first:
            took = "" if milliseconds is None else f" in {milliseconds:.0f} ms"
            logger.log(
                logging.INFO if what == LOADED else logging.WARNING,
                "%s was %s%s while requests waited: the warm-up has missed it. %s",
                kernel, what, took, detail,
            )  # fmt: skip
        _write({"what": what, "kernel": kernel, "ms": milliseconds, "detail": detail})

    def _listen_to_triton(self, hooks: ExitStack) -> None:
        earlier = triton.knobs.compilation.listener

        def listener(*, src: Any, times: Any, cache_hit: bool, **more: Any) -> None:
            what = LOADED if cache_hit else COMPILED
            with suppress(Exception):
                self.record(what, src.name, specialisation(src), times.total / 1000)
            if earlier is not None:
                earlier(src=src, times=times, cache_hit=cache_hit, **more)

        _put(hooks, triton.knobs.compilation, "listener", listener)

    def _listen_to_the_autotuner(self, hooks: ExitStack) -> None:
        original = Autotuner._bench
        tuned: set[tuple[Any, ...]] = set()

        def bench(tuner: Any, *args: Any, **kwargs: Any) -> Any:
            # Called once for each configuration that an autotuner tries for one key.
            with suppress(Exception):
                values = {**tuner.nargs, **kwargs}
                key = tuple((name, str(values[name])) for name in tuner.keys if name in values)
                if (id(tuner), key) not in tuned:
                    tuned.add((id(tuner), key))
                    detail = " ".join(f"{name}={value}" for name, value in key)
                    self.record(TUNED, tuner.base_fn.__name__, detail)
            return original(tuner, *args, **kwargs)

        _put(hooks, Autotuner, "_bench", bench)

    def _listen_to_torch(self, hooks: ExitStack) -> None:
        from torch._dynamo.callback import callback_handler

        def start(args: Any) -> None:
            with suppress(Exception):
                self.record(COMPILED, "torch.compile", f"frame {args.compile_id}")

        callback_handler.register_start_callback(start)
        hooks.callback(callback_handler.remove_start_callback, start)

    def _listen_to_cute(self, hooks: ExitStack) -> None:
        try:
            from cutlass import cute
        except Exception:  # it is there, and does not import, beside some releases of cuda-bindings
            return
        _put(hooks, cute, "compile", _CuteCompile(cute.compile, self.record))


class _CuteCompile:
    """`cute.compile`, which is called, and subscripted with options."""

    def __init__(self, inner: Any, record: Callable[..., None]) -> None:
        self._inner = inner
        self._record = record

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __getitem__(self, options: Any) -> "_CuteCompile":
        return _CuteCompile(self._inner[options], self._record)

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        compiled = self._inner(function, *args, **kwargs)
        with suppress(Exception):
            name = getattr(function, "__name__", type(function).__name__)
            self._record(COMPILED, name, "CuTe-DSL", (time.perf_counter() - start) * 1000)
        return compiled


def _put(hooks: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until `hooks` closes, unless somebody has set it again by then."""
    earlier = getattr(owner, name)
    setattr(owner, name, value)

    def take_off() -> None:
        if getattr(owner, name) is value:
            setattr(owner, name, earlier)

    hooks.callback(take_off)


def specialisation(src: Any) -> str:
    """What tells this compile of a Triton kernel from another one of the same kernel.

    Constants are `name=value`; other arguments `name:type`, with `/16` where the compiler was told
    that pointer or number are multiples of 16.
    """
    constants = {path[0]: value for path, value in src.constants.items() if len(path) == 1}
    divisible = {
        path[0]
        for path, attributes in src.attrs.items()
        if any(name == "tt.divisibility" for name, _ in attributes)
    }
    parts = []
    for place, (name, kind) in enumerate(src.signature.items()):
        if place in constants:
            parts.append(f"{name}={constants[place]}")
        else:
            parts.append(f"{name}:{kind}{'/16' if place in divisible else ''}")
    return " ".join(parts)


def recorded() -> str:
    """What VLLM_SM12X_COMPILE_LOG holds of each process's last start, in words; "" if nothing."""
    path = knobs.get("VLLM_SM12X_COMPILE_LOG")
    if path is None or not Path(path).exists():
        return ""
    since_ready: dict[int, list[str]] = {}
    for line in Path(path).read_text().splitlines():
        event = json.loads(line)
        if event["what"] == "ready":
            since_ready[event["pid"]] = []
        else:
            since_ready.setdefault(event["pid"], []).append(event["kernel"])
    kernels = [kernel for events in since_ready.values() for kernel in events]
    return (
        f"{path} holds {len(kernels)} events of {len(set(kernels))} kernels in "
        f"{len(since_ready)} workers"
    )


def _write(event: dict[str, Any]) -> None:
    path = knobs.get("VLLM_SM12X_COMPILE_LOG")
    if path is not None:
        line = json.dumps({"time": time.time(), "pid": os.getpid(), **event})
        with Path(path).open("a") as file:
            file.write(f"{line}\n")


watch = CompileWatch()

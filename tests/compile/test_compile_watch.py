# SPDX-License-Identifier: Apache-2.0
"""The compile watch on this Triton: what it counts, says, writes down, and leaves in force."""

import json
import logging
import sys
from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl
from cross_compile import _AbsentGpu
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from vllm_sm12x.integration.compile_watch import COMPILED, LOADED, TUNED, CompileWatch, recorded


def scale(x_ptr, factor, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(x_ptr + place, tl.load(x_ptr + place) * factor)


def scale_in_gluon(x_ptr, factor, BLOCK: gl.constexpr):
    place = gl.arange(0, BLOCK, layout=gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(x_ptr + place, gl.load(x_ptr + place) * factor)


# The interpreter of Triton 3.6 puts back what a kernel's own module sees of the language, not what
# the functions that it calls see. No test has run yet when this module is read.
LANGUAGE = {
    space: dict(vars(space))
    for space in (tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base)
}


@pytest.fixture
def language(monkeypatch):
    """triton.language as it is where no kernel was interpreted."""
    for space, members in LANGUAGE.items():
        for name in vars(space).keys() - members.keys():
            monkeypatch.delattr(space, name)
        for name, member in members.items():
            if vars(space)[name] is not member:
                monkeypatch.setattr(space, name, member)


@pytest.fixture
def kernel(language, monkeypatch, tmp_path):
    """A function that compiles `scale`, or another, as a launch does, for a GPU that is not there.

    Each call of it is a process that has compiled nothing yet; they share a disk cache.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(driver, "_active", _AbsentGpu(120))

    def launch(*arguments, function=None, **options):
        # By its class: the decorator gives an interpreted function where there is no GPU.
        function = function or JITFunction(scale)
        function.run(*arguments, grid=(1,), warmup=True, **options)

    return launch


@pytest.fixture
def watch():
    watch = CompileWatch()
    yield watch
    watch.disarm()


X = torch.zeros(64)


def test_counts_after_it_is_armed_and_tells_the_disk_cache_apart(kernel, watch):
    kernel(X, 2, BLOCK=16)
    assert watch.counts == {}
    watch.arm()
    kernel(X, 2, BLOCK=16)
    assert watch.counts == {LOADED: 1}
    kernel(X, 2, BLOCK=32)
    assert watch.counts == {LOADED: 1, COMPILED: 1}
    watch.arm()
    assert watch.counts == {}
    watch.disarm()
    kernel(X, 2, BLOCK=64)
    assert watch.counts == {}


def test_says_once_what_was_new(kernel, watch, caplog):
    watch.arm()
    with caplog.at_level(logging.INFO, "vllm.sm12x.integration.compile_watch"):
        kernel(X, 32, BLOCK=16)
        kernel(X[1:], 3, BLOCK=16)
    (line,) = caplog.messages
    assert line.startswith("scale was compiled in ")
    assert line.endswith("x_ptr:*fp32/16 factor:i32/16 BLOCK=16")
    assert watch.counts == {COMPILED: 2}


def test_a_gluon_kernel_is_seen(kernel, watch, caplog):
    watch.arm()
    with caplog.at_level(logging.INFO, "vllm.sm12x.integration.compile_watch"):
        kernel(X, 3, BLOCK=128, function=GluonJITFunction(scale_in_gluon))
    (line,) = caplog.messages
    assert line.startswith("scale_in_gluon was compiled in ")
    assert line.endswith("x_ptr:*fp32/16 factor:i32 BLOCK=128")


def test_writes_every_event_down(kernel, watch, monkeypatch, tmp_path):
    path = tmp_path / "compiles.jsonl"
    monkeypatch.setenv("VLLM_SM12X_COMPILE_LOG", str(path))
    assert recorded() == ""
    watch.arm()
    kernel(X[1:], 3, BLOCK=16)
    kernel(X, 1, BLOCK=16)
    ready, first, second = map(json.loads, path.read_text().splitlines())
    assert ready["what"] == "ready"
    assert (first["kernel"], first["what"]) == ("scale", COMPILED)
    assert first["detail"] == "x_ptr:*fp32 factor:i32 BLOCK=16" and first["ms"] > 0
    assert second["detail"] == "x_ptr:*fp32/16 factor=1 BLOCK=16"
    assert recorded() == f"{path} holds 2 events of 1 kernels in 1 workers"
    watch.arm()
    assert recorded() == f"{path} holds 0 events of 0 kernels in 1 workers"


def test_a_listener_that_was_there_still_hears(kernel, watch, monkeypatch):
    heard = []
    monkeypatch.setattr(
        triton.knobs.compilation, "listener", lambda **event: heard.append(event["src"].name)
    )
    watch.arm()
    kernel(X, 2, BLOCK=16)
    assert heard == ["scale"] and watch.counts == {COMPILED: 1}


def test_an_unwritable_log_does_not_reach_the_request(kernel, watch, monkeypatch, tmp_path):
    watch.arm()
    monkeypatch.setenv("VLLM_SM12X_COMPILE_LOG", str(tmp_path))
    kernel(X, 2, BLOCK=16)
    assert watch.counts == {COMPILED: 1}


def test_autotuning_is_counted_once_for_a_key(watch, monkeypatch):
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: None)
    configs = [triton.Config({"BLOCK": block}) for block in (16, 32)]
    tuner = Autotuner(
        JITFunction(scale), ["x_ptr", "factor", "BLOCK"], configs, ["factor"], None, None,
        do_bench=lambda call, quantiles: [1.0, 1.0, 1.0],
    )  # fmt: skip
    watch.arm()
    for factor in (2, 2, 3):
        tuner.run(X, factor, grid=(1,), warmup=False)
    assert watch.counts == {TUNED: 2}
    watch.disarm()
    tuner.run(X, 4, grid=(1,), warmup=False)
    assert watch.counts == {TUNED: 2}


def test_torch_compile_is_counted(watch):
    def double(x):
        return x * 2

    compiled = torch.compile(double, backend="eager")
    watch.arm()
    compiled(X)
    compiled(X)
    assert watch.counts == {COMPILED: 1}


def test_cute_dsl_compiles_are_counted_through_its_options(watch, monkeypatch):
    class Compile:
        def __getitem__(self, options):
            return self

        def __call__(self, function, *arguments):
            return (function, *arguments)

    cute = ModuleType("cutlass.cute")
    cute.compile = stock = Compile()
    package = ModuleType("cutlass")
    package.cute = cute
    monkeypatch.setitem(sys.modules, "cutlass", package)
    monkeypatch.setitem(sys.modules, "cutlass.cute", cute)
    watch.arm()
    assert cute.compile["options"](scale, 1) == (scale, 1)
    assert cute.compile(scale) == (scale,)
    assert watch.counts == {COMPILED: 2}
    watch.disarm()
    assert cute.compile is stock

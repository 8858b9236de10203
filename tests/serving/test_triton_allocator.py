# SPDX-License-Identifier: Apache-2.0
"""A kernel that needs global scratch, launched in a thread that has set no allocator."""

import threading
from contextlib import ExitStack

import pytest
import torch
import triton
import triton.language as tl

from vllm_sm12x.integration import triton_allocator

pytestmark = pytest.mark.gpu

ROWS = COLUMNS = 256
BLOCK = 64


@triton.jit
def copy_by_descriptor(source, target, ROWS: tl.constexpr, COLUMNS: tl.constexpr, B: tl.constexpr):
    """A descriptor that is made in a kernel lives in global scratch."""
    shape = [ROWS, COLUMNS]
    reading = tl.make_tensor_descriptor(source, shape, [COLUMNS, 1], [B, B])
    writing = tl.make_tensor_descriptor(target, shape, [COLUMNS, 1], [B, B])
    row, column = tl.program_id(0) * B, tl.program_id(1) * B
    writing.store([row, column], reading.load([row, column]))


def in_new_thread(function):
    """What `function` returns in a thread of its own, or the exception that it raises."""
    results = []

    def run():
        try:
            results.append(function())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]


def launch(source, target):
    grid = (ROWS // BLOCK, COLUMNS // BLOCK)
    copy_by_descriptor[grid](source, target, ROWS, COLUMNS, BLOCK)


@pytest.fixture
def tensors():
    source = torch.arange(ROWS * COLUMNS, dtype=torch.float32, device="cuda").view(ROWS, COLUMNS)
    return source, torch.full_like(source, float("nan"))


def test_without_the_default_the_launch_fails(tensors):
    error = in_new_thread(lambda: launch(*tensors))
    assert isinstance(error, RuntimeError) and "no allocator was set" in str(error)


def test_with_it_the_kernel_runs_on_any_stream(tensors):
    source, target = tensors

    def on_side_stream():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            launch(source, target)
        stream.synchronize()

    with ExitStack() as undo:
        triton_allocator.install(undo)
        for function in (lambda: launch(source, target), on_side_stream):
            target.fill_(float("nan"))
            torch.cuda.synchronize()
            assert in_new_thread(function) is None
            torch.cuda.synchronize()
            assert torch.equal(source, target)


def test_a_graph_replays_with_its_own_scratch(tensors):
    """What is allocated between replays must not get the bytes that the graph writes."""
    source, target = tensors

    def captured():
        launch(source, target)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch(source, target)
        return graph

    with ExitStack() as undo:
        triton_allocator.install(undo)
        graph = in_new_thread(captured)
    assert isinstance(graph, torch.cuda.CUDAGraph), graph
    for replay in range(3):
        source.fill_(replay)
        other = [torch.full((4096,), 7, dtype=torch.uint8, device="cuda") for _ in range(64)]
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(source, target)
        assert all((tensor == 7).all() for tensor in other)

# SPDX-License-Identifier: Apache-2.0
"""Reading ahead of the loader, Ray's timeout, and Triton's allocator in new threads."""

import contextlib
import importlib
import os
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

pytestmark = pytest.mark.contract

GIB = 2**30


@pytest.fixture(scope="module")
def loading():
    return importlib.import_module("vllm_sm12x.integration.loading")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Two shards whose tensors lie in the file in another order than that of their names."""
    folder = tmp_path_factory.mktemp("checkpoint")
    for shard in (1, 2):
        tensors = {
            f"layers.{shard}.experts.{expert}.{part}": torch.full(shape, expert + 1, dtype=dtype)
            for expert in range(3)
            for part, shape, dtype in (
                ("scale", (4, 8), torch.float32),
                ("weight", (64, 50), torch.uint8),
            )
        }
        save_file(tensors, folder / f"model-{shard:05d}-of-00002.safetensors", {"format": "pt"})
    return sorted(map(str, folder.glob("*.safetensors")))


class TestChoice:
    @pytest.mark.parametrize("explicit", ["lazy", "eager", "prefetch", "torchao"])
    def test_what_the_user_says_wins(self, loading, explicit):
        choice = loading.choose(explicit, 200 * GIB, 100 * GIB, "ext4")
        assert (choice.strategy, choice.explicit, choice.bounded) == (explicit, True, False)
        assert choice.why == f"--safetensors-load-strategy {explicit}"

    @pytest.mark.parametrize(
        ("size", "file_system", "strategy", "bounded"),
        [
            (90 * GIB, "ext4", "lazy", False),
            (90 * GIB + 1, "ext4", "prefetch", True),
            (200 * GIB, "xfs", "prefetch", True),
            (200 * GIB, "", "prefetch", True),
            (200 * GIB, "tmpfs", "lazy", False),
            # vLLM's own rule for these is the other way round.
            (80 * GIB, "nfs4", "prefetch", False),
            (200 * GIB, "nfs4", "lazy", False),
        ],
    )
    def test_by_size_and_file_system(self, loading, size, file_system, strategy, bounded):
        choice = loading.choose(None, size, 100 * GIB, file_system)
        assert (choice.strategy, choice.explicit, choice.bounded) == (strategy, False, bounded)

    def test_the_reason_has_the_numbers(self, loading):
        why = loading.choose(None, 150 * GIB, 110 * GIB, "ext4").why
        assert "150.00 GiB do not fit into 90% of 110.00 GiB" in why and "ext4" in why

    def test_of_a_folder(self, loading, checkpoint, tmp_path, monkeypatch):
        folder = loading.Path(checkpoint[0]).parent
        monkeypatch.setattr(loading.stock, "file_system_of", lambda files: "ext4")
        monkeypatch.setattr(loading.stock, "available_ram_bytes", lambda: 10_000)
        assert loading.for_checkpoint(folder, None).bounded
        assert loading.for_checkpoint(folder, "lazy").explicit
        with pytest.raises(FileNotFoundError, match=r"has no \*.safetensors file"):
            loading.for_checkpoint(tmp_path, None)


@pytest.fixture
def disk(monkeypatch):
    """What is read and released, without a page cache that would make it depend on the machine."""
    seen = SimpleNamespace(read=[], released=[], changed=threading.Condition())
    names = {}
    open_file, read = os.open, os.preadv

    def opened(path, flags, *args):
        descriptor = open_file(path, flags, *args)
        names[descriptor] = str(path)
        return descriptor

    def preadv(descriptor, buffers, offset, flags=0):
        if flags:
            raise BlockingIOError("not cached")
        got = read(descriptor, buffers, offset)
        with seen.changed:
            seen.read.append((names[descriptor], offset, bytes(buffers[0])))
            seen.changed.notify_all()
        return got

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *rest: seen.released.append(names[fd]))

    def wait_for(count):
        with seen.changed:
            assert seen.changed.wait_for(lambda: len(seen.read) >= count, timeout=60)

    seen.wait_for = wait_for
    return seen


def tensors_of(files, wanted=lambda name: True):
    """File, name and bytes of each tensor as safetensors' own reader gives them."""
    for file in files:
        with safe_open(file, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118
                if wanted(name):
                    tensor = stream.get_tensor(name)
                    yield file, name, tensor.view(torch.uint8).numpy().tobytes()


def read_ahead(loading, files, wanted=lambda name: True, **options):
    given = {"window": 2**20, "threads": 1, "block": 2**20, "release": False, **options}
    return loading.ReadAhead(files, wanted, **given)


class TestReadAhead:
    def test_the_readers_bytes_in_the_readers_order(self, loading, checkpoint, disk):
        expected = list(tensors_of(checkpoint))
        with read_ahead(loading, checkpoint):
            disk.wait_for(len(expected))
        assert [(file, data) for file, _, data in expected] == [
            (file, data) for file, _, data in disk.read
        ]

    def test_tensors_of_other_ranks_are_not_read(self, loading, checkpoint, disk):
        def wanted(name):
            return ".experts.1." in name

        expected = [data for _, _, data in tensors_of(checkpoint, wanted)]
        with read_ahead(loading, checkpoint, wanted):
            disk.wait_for(len(expected))
        assert [data for _, _, data in disk.read] == expected

    def test_blocks_cover_a_tensor_without_overlap(self, loading, checkpoint, disk):
        expected = b"".join(data for _, _, data in tensors_of(checkpoint))
        count = sum(-(-len(data) // 1000) for _, _, data in tensors_of(checkpoint))
        with read_ahead(loading, checkpoint, block=1000):
            disk.wait_for(count)
        assert b"".join(data for _, _, data in disk.read) == expected

    def test_never_further_than_the_window(self, loading, checkpoint, disk):
        sizes = [len(data) for _, _, data in tensors_of(checkpoint)]
        window = 4000
        with read_ahead(loading, checkpoint, window=window) as ahead:
            position = 0
            for size in sizes:
                begins = [sum(sizes[:index]) for index in range(len(sizes))]
                allowed = sum(begin < position + window for begin in begins)
                disk.wait_for(allowed)
                threading.Event().wait(0.02)
                assert len(disk.read) == allowed
                ahead.reached(size)
                position += size

    def test_what_the_reader_has_passed_is_not_read(self, loading, checkpoint, disk):
        sizes = [len(data) for _, _, data in tensors_of(checkpoint)]
        ahead = read_ahead(loading, checkpoint)
        for size in sizes[:6]:
            ahead.reached(size)
        with ahead:
            disk.wait_for(6)
        assert {file for file, _, _ in disk.read} == {checkpoint[1]}

    @pytest.mark.parametrize("release", [True, False])
    def test_files_leave_the_cache_behind_the_reader(self, loading, checkpoint, disk, release):
        sizes = [len(data) for _, _, data in tensors_of(checkpoint)]
        first = [checkpoint[0]] if release else []
        with read_ahead(loading, checkpoint, release=release) as ahead:
            disk.wait_for(len(sizes))
            for size in sizes[:7]:
                # The seventh tensor is the second file's: the reader may still hold the sixth.
                ahead.reached(size)
                assert disk.released == []
            ahead.reached(sizes[7])
            assert disk.released == first
            for size in sizes[8:]:
                ahead.reached(size)
        assert disk.released == (checkpoint if release else [])

    def test_a_reader_that_fails_ends_the_threads(self, loading, checkpoint, disk):
        before = threading.active_count()
        with (
            pytest.raises(KeyError),
            read_ahead(loading, checkpoint, window=1, threads=4),
        ):
            raise KeyError("a weight that the model does not have")
        assert threading.active_count() == before

    def test_a_drive_that_fails_is_left_to_the_reader(
        self, loading, checkpoint, monkeypatch, caplog
    ):
        def broken(*args):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "preadv", broken)
        with caplog.at_level("WARNING", "vllm.sm12x"):
            ahead = read_ahead(loading, checkpoint)
            with ahead:
                ahead._threads[0].join(timeout=60)
        assert "Prefetch ends early: [Errno 5] Input/output error." in caplog.text

    def test_cached_blocks_are_not_read_again(self, loading, checkpoint, monkeypatch):
        """By the kernel's word: the tensors were just read. Where it gives none, all are read."""
        for file in checkpoint:
            loading.Path(file).read_bytes()
        read, copied = os.preadv, []

        def preadv(descriptor, buffers, offset, flags=0):
            if not flags:
                copied.append(offset)
            return read(descriptor, buffers, offset, flags)

        descriptor = os.open(checkpoint[0], os.O_RDONLY)
        with contextlib.closing(os.fdopen(descriptor, "rb")):
            try:
                os.preadv(descriptor, [bytearray(1)], 0, os.RWF_NOWAIT)
            except OSError as error:
                pytest.skip(f"this file system does not say what is cached: {error}")
        monkeypatch.setattr(os, "preadv", preadv)
        with read_ahead(loading, checkpoint) as ahead:
            ahead._threads[0].join(timeout=60)
        assert copied == []


class TestAllocator:
    """As Triton's launchers do it: get the context variable's value and call it."""

    @pytest.fixture
    def allocation(self):
        return importlib.import_module("triton.runtime._allocation")

    @pytest.fixture
    def ours(self):
        return importlib.import_module("vllm_sm12x.integration.triton_allocator")

    @pytest.fixture
    def cuda(self, monkeypatch):
        """torch.cuda on a machine without a GPU: buffers are the host's, streams are recorded."""
        empty, entered = torch.empty, []

        @contextlib.contextmanager
        def stream(which):
            entered.append(which)
            yield

        def on_host(*args, device, **keywords):
            assert device == "cuda"
            return empty(*args, **keywords)

        monkeypatch.setattr(torch, "empty", on_host)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
        monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle: handle)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        return entered

    def launch(self, allocation, *, size=1000, alignment=128, stream=7, prepare=lambda: None):
        """In a new thread, which begins with an empty context."""
        results = []

        def run():
            prepare()
            try:
                results.append(allocation._allocator.get()(size, alignment, stream))
            except RuntimeError as error:
                results.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return results[0]

    def test_without_it_a_new_thread_has_none(self, allocation):
        """Set here, unknown there. The day that this fails, the row can retire."""
        import contextvars

        def set_here_launch_there():
            allocation.set_allocator(lambda size, alignment, stream: "ours")
            return self.launch(allocation)

        found = contextvars.copy_context().run(set_here_launch_there)
        assert "no allocator was set" in found

    @pytest.mark.parametrize("stream", [7, 0, None, 11])
    @pytest.mark.parametrize("alignment", [1, 16, 128, 4096])
    def test_with_it_every_thread_has_one(self, allocation, ours, cuda, stream, alignment):
        with contextlib.ExitStack() as undo:
            ours.install(undo)
            buffer = self.launch(allocation, alignment=alignment, stream=stream)
            assert buffer.dtype == torch.uint8 and buffer.numel() == 1000
            assert buffer.data_ptr() % alignment == 0
            assert cuda == ([] if stream in (7, None) else [stream])
        assert "no allocator was set" in self.launch(allocation)

    @pytest.mark.parametrize("first", ["theirs", "ours"])
    def test_what_somebody_set_stays(self, allocation, ours, cuda, first):
        import contextvars

        def theirs(size, alignment, stream):
            return "theirs"

        def in_their_context():
            with contextlib.ExitStack() as undo:
                for name in sorted(["theirs", "ours"], key=lambda name: name != first):
                    if name == "theirs":
                        allocation.set_allocator(theirs)
                    else:
                        ours.install(undo)
                return allocation._allocator.get()(1, 1, 7)

        assert contextvars.copy_context().run(in_their_context) == "theirs"
        with contextlib.ExitStack() as undo:
            ours.install(undo)
            prepared = self.launch(allocation, prepare=lambda: allocation.set_allocator(theirs))
        assert prepared == "theirs"

    def test_triton_still_takes_it_for_no_choice(self, allocation, ours):
        with contextlib.ExitStack() as undo:
            ours.install(undo)
            assert isinstance(ours.default_allocator(), allocation.NullAllocator)


ON_THE_HOST = """
import dataclasses
import logging
import psutil
from types import SimpleNamespace
from pathlib import Path
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import default_loader, weight_utils
from vllm_sm12x import knobs, log
from vllm_sm12x.changes import loading
from vllm_sm12x.changes.change import Applied, Context, Phase
from vllm_sm12x.device import Device

weight_utils._get_fs_type = lambda files: "ext4"  # before vllm_api takes it by name
folder = FOLDER
messages = []
handler = logging.Handler()
handler.emit = lambda record: messages.append(record.getMessage())
logging.getLogger("vllm.sm12x").addHandler(handler)
logging.getLogger("vllm.sm12x").setLevel(logging.INFO)

def load(available, **options):
    psutil.virtual_memory = lambda: SimpleNamespace(available=available, total=2 * available)
    messages.clear()
    log.once.cache_clear()
    loader = default_loader.DefaultModelLoader(LoadConfig(use_tqdm_on_load=False, **options))
    source = default_loader.DefaultModelLoader.Source(folder, None)
    read = [
        [name, str(tensor.dtype), tensor.float().sum().item()]
        for name, tensor in loader._get_weights_iterator(source)
    ]
    return {"read": read, "said": [text for text in messages if "prefetch" in text]}

def states(context, *names):
    rows = [dataclasses.replace(row, requires=()) for row in loading.ROWS if row.name in names]
    applied = Applied(rows)
    applied.apply_all(Phase.REGISTER, context)
    applied.apply_all(Phase.WORKER, context)
    return applied, {each.change.name: [each.state.value, each.detail] for each in applied.report()}

NAMES = [row.name for row in loading.ROWS]
sm120 = Context.detect()
gb10 = dataclasses.replace(sm120, device=Device("NVIDIA GB10", (12, 1), None, "580"))
h200 = dataclasses.replace(
    sm120, device=Device("NVIDIA H200", (9, 0), 2**37, "580"), capability=(9, 0), switch=True
)
facts = {"stock": load(1000)}
applied, facts["states"] = states(sm120, *NAMES)
facts["timeout"] = os.environ.get("RAY_CGRAPH_get_timeout")
facts["small"] = load(2**40)
facts["large"] = load(1000)
facts["lazy"] = load(1000, safetensors_load_strategy="lazy")
facts["eager"] = load(1000, safetensors_load_strategy="eager")
facts["threads"] = load(1000, model_loader_extra_config={"enable_multithread_load": True})
applied.undo_all()
facts["undone"] = load(1000)
facts["timeout_undone"] = os.environ.get("RAY_CGRAPH_get_timeout")
applied, _ = states(gb10, "loading.prefetch")
facts["shared"] = load(1000)
applied.undo_all()
_, facts["forced"] = states(h200, *NAMES)
os.environ["VLLM_SM12X_OFF"] = ",".join(NAMES)
_, facts["off"] = states(sm120, *NAMES)
del os.environ["VLLM_SM12X_OFF"]
os.environ["RAY_CGRAPH_get_timeout"] = "600"
_, facts["theirs"] = states(sm120, "ray.timeout")
answer(facts)
"""


@pytest.fixture(scope="module")
def facts(host, checkpoint):
    folder = os.path.dirname(checkpoint[0])
    return host(ON_THE_HOST.replace("FOLDER", repr(folder))).answer


def test_rows_are_active_where_vllm_needs_them(facts, vllm_version):
    ray = "not needed" if vllm_version >= (0, 33) else "active"
    assert {name: state for name, (state, _) in facts["states"].items()} == {
        "loading.prefetch": "active",
        "ray.timeout": ray,
        "triton.allocator": "active",
    }
    assert facts["timeout"] == ("900" if ray == "active" else None)
    assert facts["timeout_undone"] is None


def test_rows_are_off_by_name_and_not_for_a_forced_h200(facts):
    assert {state for state, _ in facts["off"].values()} == {"off"}
    assert {name: state for name, (state, _) in facts["forced"].items()} == {
        "loading.prefetch": "off",
        "ray.timeout": "not needed",
        "triton.allocator": "not needed",
    }


def test_the_users_ray_timeout_wins(facts):
    assert facts["theirs"]["ray.timeout"] == ["off", "RAY_CGRAPH_get_timeout=600 is set"]


def test_a_large_checkpoint_is_prefetched_and_says_so_once(facts):
    (said,) = facts["large"]["said"]
    assert said.startswith("Weights are prefetched, at most ")
    assert "do not fit into 90% of" in said and "on ext4" in said
    assert said.endswith("--safetensors-load-strategy lazy opts out.")
    assert "page cache" not in said


def test_shared_memory_is_given_back(facts):
    (said,) = facts["shared"]["said"]
    assert "leave the page cache, as the GPU shares the memory" in said


@pytest.mark.parametrize("case", ["stock", "small", "lazy", "eager", "threads", "undone"])
def test_everything_else_is_vllms(facts, case):
    assert facts[case]["said"] == []


@pytest.mark.parametrize("case", ["large", "shared", "small", "lazy"])
def test_the_weights_are_the_same_in_the_same_order(facts, case):
    assert facts[case]["read"] == facts["stock"]["read"]
    assert len(facts["stock"]["read"]) == 12

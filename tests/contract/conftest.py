# SPDX-License-Identifier: Apache-2.0
"""A host with a made-up NVIDIA GPU, on which processes run the installed, unmodified vLLM.

Two stub libraries, compiled here, come first on LD_LIBRARY_PATH of those processes: a libcuda
without a device and an NVML that reports whatever GPU a test asks for. The plugin is built as a
wheel and installed where only those processes find it, so that vLLM discovers it by entry points.
A process costs some 5 s, forked as it is from one that has imported torch and its like: tests share
one per situation, through module-scoped fixtures.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import venv
from base64 import urlsafe_b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FAKE_HOST = Path(__file__).parent / "fake_host"
TIMEOUT_S = 300
RTX_PRO_6000 = "NVIDIA RTX PRO 6000 Blackwell Workstation Edition"


@dataclass(frozen=True)
class Run:
    """A finished process: what it handed to `probes.answer`, and everything it printed."""

    answer: Any
    returncode: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


@dataclass(frozen=True)
class Host:
    """Starts processes on the made-up host. `stubs`, `plugin` and so on are folders."""

    stubs: Path
    plugin: Path
    scratch: Path
    model: Path
    interpreter: "Interpreter"

    def __call__(
        self,
        snippet: str,
        *,
        capability: str = "12.0",
        name: str = RTX_PRO_6000,
        count: int = 1,
        plugin: bool = True,
        env: Mapping[str, str] | None = None,
        first_on_path: Sequence[Path] = (),
        check: bool = True,
        fresh: bool = False,
    ) -> Run:
        """Run Python code, with `probes` and MODEL (a DeepSeek V4's folder) in its namespace."""
        python = sys.executable if plugin else self.python_without("vllm-sm12x")
        return self.command(
            [python, "-c", f"from probes import *\nMODEL = {str(self.model)!r}\n{snippet}"],
            gpu={
                "FAKE_NVML_CAPABILITY": capability,
                "FAKE_NVML_NAME": name,
                "FAKE_NVML_COUNT": str(count),
                # QuACK asks CUDA where this is not set, as soon as it is imported.
                "QUACK_ARCH": capability.replace(".", ""),
            },
            plugin=plugin,
            env=env,
            first_on_path=first_on_path,
            check=check,
            fresh=fresh,
        )

    def command(
        self,
        arguments: Sequence[str | Path],
        *,
        gpu: Mapping[str, str] | None = None,
        plugin: bool = True,
        env: Mapping[str, str] | None = None,
        first_on_path: Sequence[Path] = (),
        check: bool = True,
        fresh: bool = False,
    ) -> Run:
        """Run any command there; `check` makes a failing exit status the test's failure.

        `fresh`: a Python that has imported nothing yet, for tests that change what torch or Triton
        is when it is imported.
        """
        answer_file = self.scratch / "answer.json"
        answer_file.unlink(missing_ok=True)
        python_path = [*first_on_path, *([self.plugin] if plugin else []), FAKE_HOST]
        environment = {
            **_outside_environment(),
            "PYTHONPATH": _joined(*python_path, *_outside_python_path()),
            "LD_LIBRARY_PATH": _joined(self.stubs, os.environ.get("LD_LIBRARY_PATH")),
            "VLLM_CACHE_ROOT": str(self.scratch / "vllm_cache"),
            "VLLM_CONFIG_ROOT": str(self.scratch / "vllm_config"),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "FAKE_HOST_ANSWER": str(answer_file),
            **(gpu or {}),
            **(env or {}),
        }
        program, *rest = map(str, arguments)
        if program == sys.executable and not fresh:
            completed = self.interpreter(rest, cwd=self.scratch, env=environment)
        else:
            completed = subprocess.run(
                arguments,
                cwd=self.scratch,
                env=environment,
                text=True,
                capture_output=True,
                timeout=TIMEOUT_S,
            )
        output = completed.stdout + completed.stderr
        if check:
            assert completed.returncode == 0, f"exit {completed.returncode}\n{output[-6000:]}"
        answer = json.loads(answer_file.read_text()) if answer_file.exists() else None
        return Run(answer, completed.returncode, completed.stdout, completed.stderr)

    def python_without(self, project: str) -> Path:
        """An interpreter with links to everything that is installed here, but `project`."""
        folder = self.scratch / f"without_{project.replace('-', '_')}"
        if not folder.exists():
            try:
                left_out = {file.parts[0] for file in metadata.files(project) or ()}
            except metadata.PackageNotFoundError:
                left_out = set()
            venv.create(folder, symlinks=True)
            site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
            for installed in {Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")}:
                for entry in installed.iterdir():
                    if entry.name not in left_out:
                        (site / entry.name).symlink_to(entry)
        return folder / "bin" / "python"


class Interpreter:
    """`interpreter(arguments, cwd=..., env=...)`: `python ARGUMENTS`, forked from a warm one.

    Its libraries are looked for where `ld_library_path` says, whatever `env` says.
    """

    def __init__(self, folder: Path, ld_library_path: str) -> None:
        self._files = {name: folder / f"{name}.txt" for name in ("stdout", "stderr")}
        self._ld_library_path = ld_library_path
        self._process: subprocess.Popen[str] | None = None

    def __call__(
        self, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str]
    ) -> "subprocess.CompletedProcess[str]":
        for file in self._files.values():
            file.write_text("")
        request = {
            "arguments": arguments,
            "cwd": str(cwd),
            "env": dict(env),
            "python_path": env["PYTHONPATH"].split(os.pathsep),
            **{name: str(file) for name, file in self._files.items()},
        }
        process = self._process = self._process or self._start()
        assert process.stdin and process.stdout
        print(json.dumps(request), file=process.stdin, flush=True)
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(TIMEOUT_S):
                self.stop()
                raise subprocess.TimeoutExpired(arguments, TIMEOUT_S, *self._output())
        status = process.stdout.readline()
        if not status:
            self.stop()
            raise RuntimeError("interpreter.py ended, see stderr")
        return subprocess.CompletedProcess(arguments, int(status), *self._output())

    def stop(self) -> None:
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _start(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, FAKE_HOST / "interpreter.py"],
            env={
                **_outside_environment(),
                "PYTHONPATH": _joined(*_outside_python_path()),
                "LD_LIBRARY_PATH": self._ld_library_path,
                "HF_HUB_OFFLINE": "1",
            },
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def _output(self) -> tuple[str, str]:
        return self._files["stdout"].read_text(), self._files["stderr"].read_text()


def _joined(*parts: Path | str | None) -> str:
    return os.pathsep.join(str(part) for part in parts if part)


def _outside_environment() -> dict[str, str]:
    """This process's variables without those that would change what a test sees."""
    prefixes = ("VLLM_", "FAKE_", "DG_", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "PYTEST_")
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}


def _outside_python_path() -> list[str]:
    """PYTHONPATH without this source tree, which would shadow the installed plugin."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [entry for entry in entries if entry and Path(entry).resolve() != ROOT]


def _tool(*arguments: Path | str) -> None:
    completed = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert completed.returncode == 0, f"{arguments}\n{completed.stdout}{completed.stderr}"


def _compile(source: Path, library: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler, "the fake host needs a C compiler (gcc or cc) on PATH"
    warnings = ["-Wall", "-Wextra", "-Werror"]
    _tool(compiler, "-shared", "-fPIC", *warnings, f"-Wl,-soname,{library.name}", "-o", library,
          source)  # fmt: skip


def _install_plugin(build: Path, target: Path) -> None:
    """Build the wheel and install it, without dependencies, into a folder of its own."""
    _tool(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", build)
    (wheel,) = build.glob("*.whl")
    if uv := shutil.which("uv"):
        installer = [uv, "pip", "install", "--offline", "--python", sys.executable]
    else:
        installer = [sys.executable, "-m", "pip", "install", "--no-index"]
    _tool(*installer, "--no-deps", "--target", target, wheel)


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory, vllm_files: "VllmFiles") -> Iterator[Host]:
    """`host(snippet, capability="12.0", plugin=True, env={...})` runs code on the fake host.

    It asks for `vllm_files` so that vLLM's files are on record before anything runs.
    """
    scratch = tmp_path_factory.mktemp("fake_host")
    stubs, plugin, model = scratch / "stubs", scratch / "site", scratch / "deepseek_v4"
    stubs.mkdir()
    _compile(FAKE_HOST / "libcuda_stub.c", stubs / "libcuda.so.1")
    _compile(FAKE_HOST / "libnvidia_ml_stub.c", stubs / "libnvidia-ml.so.1")
    _install_plugin(scratch / "wheel", plugin)

    from vllm_sm12x.tiny_checkpoint.deepseek_v4 import CONFIG

    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    interpreter = Interpreter(scratch, _joined(stubs, os.environ.get("LD_LIBRARY_PATH")))
    yield Host(stubs, plugin, scratch, model, interpreter)
    interpreter.stop()


@dataclass(frozen=True)
class VllmFiles:
    """vLLM's installed Python files: as its wheel recorded them, and as they were at the start."""

    recorded: dict[str, str]
    at_start: dict[str, str]

    def now(self) -> dict[str, str]:
        return _hashes(_vllm_folder())


def _vllm_folder() -> Path:
    spec = importlib.util.find_spec("vllm")
    assert spec and spec.origin, "the contract tests need an installed vLLM"
    return Path(spec.origin).parent


def _hashes(folder: Path) -> dict[str, str]:
    """sha256 in RECORD's notation of each .py file, by its path as RECORD writes it."""
    return {
        file.relative_to(folder.parent).as_posix(): _record_hash(file.read_bytes())
        for file in sorted(folder.rglob("*.py"))
    }


def _record_hash(content: bytes) -> str:
    return urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


@pytest.fixture(scope="session")
def vllm_files() -> VllmFiles:
    recorded = {
        str(file): file.hash.value
        for file in metadata.files("vllm") or ()
        if file.suffix == ".py" and file.parts[0] == "vllm" and file.hash
    }
    return VllmFiles(recorded, _hashes(_vllm_folder()))


@pytest.fixture(scope="session")
def vllm_version() -> tuple[int, ...]:
    return tuple(int(part) for part in metadata.version("vllm").split(".")[:2])


@pytest.fixture(scope="session")
def settled(vllm_version: tuple[int, ...]) -> dict[str, str]:
    """The state of every change on the made-up SM12x host without nvcc."""
    from vllm_sm12x.changes import CHANGES

    states = {change.name: "active" for change in CHANGES}
    states["nvfp4.cudnn"] = "not needed"  # every pin's FlashInfer has the flags
    # Where the user can choose, persistent_topk does not abort any more.
    states["indexer.top_k"] = "not needed" if vllm_version >= (0, 30) else "not for this vLLM"
    if vllm_version < (0, 24):
        states["deep_gemm.gate"] = "not needed"  # it takes none on SM12x anyway
    if vllm_version < (0, 25):
        states["attention.token_to_request"] = "not for this vLLM"  # each builder has its own
    if vllm_version >= (0, 33):
        states["ray.timeout"] = "not needed"  # its Ray executor compiles no graph
    return states

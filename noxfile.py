# SPDX-License-Identifier: Apache-2.0
"""The project's checks: `nox -l` lists them, `./scripts/test` runs those marked * there.

Each vLLM release that the tests run on has one environment, made from uv.lock and shared by its
sessions: .venv for the default release, .nox/<extra> for the others. What follows `--` on nox's
command line goes to pytest.
"""

import shutil
import sys
from pathlib import Path

import nox

sys.path.insert(0, str(Path(__file__).parent / "scripts"))
from pins import Pin, pins  # noqa: E402

PINS = pins()
(DEFAULT,) = (pin for pin in PINS if pin.is_default)

# One file's tests share processes that took long to start. On a GPU, servers want it whole.
PARALLEL = () if shutil.which("nvidia-smi") else ("-n", "2", "--dist", "loadfile")
CONTRACT = ("tests/contract", "-m", "contract or not once", *PARALLEL)

nox.options.default_venv_backend = "none"
nox.options.error_on_external_run = False


def sync(session: nox.Session, pin: Pin) -> str:
    """Make the pin's environment what uv.lock says; the path of its Python."""
    folder = ".venv" if pin.is_default else f".nox/{pin.extra}"
    session.run_install(
        "uv", "sync", "--quiet", "--locked", "--inexact", "--extra", pin.extra, "--group", "test",
        "--python", sys.executable,
        env={"UV_PROJECT_ENVIRONMENT": folder, "VIRTUAL_ENV": None},
    )  # fmt: skip
    return f"{folder}/bin/python"


@nox.session
def lint(session: nox.Session) -> None:
    """ruff's rules and format."""
    python = sync(session, DEFAULT)
    session.run(python, "-m", "ruff", "check")
    session.run(python, "-m", "ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """mypy."""
    session.run(sync(session, DEFAULT), "-m", "mypy")


@nox.session
def drift(session: nox.Session) -> None:
    """What moved between the pins in vLLM, of what the plugin touches."""
    session.run(sync(session, DEFAULT), "scripts/drift", "--no-unchanged", *session.posargs)


@nox.session(default=False)
def newest(session: nox.Session) -> None:
    """Contract tests on vLLM's newest release; build/newest/drift.txt is what moved in it."""
    folder, reports = Path(".nox/newest"), Path("build/newest")
    python = str(folder / "bin/python")
    session.run_install("uv", "venv", "--quiet", "--clear", "--python", sys.executable, str(folder))
    session.run_install(
        "uv", "pip", "install", "--quiet", "--python", python,
        "--editable", ".", "--group", "test", "vllm",
    )  # fmt: skip
    version = "from importlib import metadata; print(metadata.version('vllm'))"
    vllm = session.run(python, "-c", version, silent=True).strip()
    reports.mkdir(parents=True, exist_ok=True)
    with (reports / "drift.txt").open("w") as file:
        # Drift is 1 where a symbol is missing: the contract tests say so too, and go on.
        session.run(python, "scripts/drift", vllm, stdout=file, success_codes=[0, 1])
    junit = f"--junitxml={reports / 'contract.xml'}"
    session.run(python, "-m", "pytest", *CONTRACT, junit, *session.posargs)


def pytest_session(name: str, what: str, pin: Pin, *arguments: str, default: bool = True) -> None:
    """Add a session that runs pytest in the environment of `pin`."""

    def run(session: nox.Session) -> None:
        session.run(sync(session, pin), "-m", "pytest", *arguments, *session.posargs)

    run.__doc__ = what
    nox.session(name=name, default=default)(run)


for pin in PINS:
    pytest_session(
        f"contract-{pin.vllm}",
        f"Contract tests on vLLM {pin.vllm}.",
        pin,
        *CONTRACT,
        default=not pin.is_default,
    )

for triton, pin in {pin.triton: pin for pin in (*PINS, DEFAULT)}.items():
    pytest_session(
        f"compile-{triton}",
        f"Compile gate on Triton {triton}, which vLLM {pin.vllm} brings.",
        pin,
        "tests/compile",
        default=not pin.is_default,
    )

pytest_session(
    f"tests-{DEFAULT.vllm}",
    f"Every test on vLLM {DEFAULT.vllm}: contract, compile gate, kernels in the interpreter.",
    DEFAULT,
    *PARALLEL,
)

# SPDX-License-Identifier: Apache-2.0
"""Runs a command as on a machine with neither DeepGEMM, FlashMLA nor TileLang, and no nvcc on PATH.

Every Python process below the command is reached through a sitecustomize module on PYTHONPATH,
except those started with -S, -E or -I; a sitecustomize of the environment itself does not run.
Package metadata stays, and so does what lies off PATH: toolkits in other places are named, not
hidden.
"""

import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

MODULES = (
    "deep_gemm",
    "vllm.third_party.deep_gemm",
    "flash_mla",
    "vllm._flashmla_C",
    "vllm._flashmla_extension_C",
    "tilelang",
)
TOOLKIT_VARIABLES = ("CUDA_HOME", "CUDA_PATH")
# Where libraries look for a toolkit when no variable and no PATH names one.
DEFAULT_TOOLKIT = Path("/usr/local/cuda/bin/nvcc")


class NotHiddenError(RuntimeError):
    """Something can still be imported or found."""


def hide(modules: Sequence[str], broken: bool) -> None:
    """Make imports of `modules` and what is in them fail in this process.

    Args:
        broken: False: they are not installed, and `importlib.util.find_spec` gives None. True:
            they are there, and importing them raises ImportError.

    Its source is the sitecustomize module, so it needs nothing around it.
    """
    import sys
    from importlib.machinery import ModuleSpec, PathFinder

    def hidden(name):
        return any(f"{name}.".startswith(f"{module}.") for module in modules)

    class Broken:
        @staticmethod
        def find_spec(name, path=None, target=None):
            return ModuleSpec(name, Broken) if hidden(name) else None

        @staticmethod
        def create_module(spec):
            return None

        @staticmethod
        def exec_module(module):
            raise ImportError(f"{module.__name__} is made to fail by no_toolkit.py")

    if broken:
        sys.meta_path.insert(0, Broken)
    else:
        find = PathFinder.find_spec
        PathFinder.find_spec = staticmethod(
            lambda name, path=None, target=None: None if hidden(name) else find(name, path, target)
        )


def probe(modules: Sequence[str]) -> None:
    """Print as JSON which modules have a spec, which cannot be imported, and where nvcc is.

    Packages around a module are not executed, and a module only if it is hidden. Its source is
    run by `python -c`.
    """
    import importlib.util
    import json
    import shutil
    import sys
    import types

    found, failing = [], []
    for name in modules:
        top, _, inner = name.partition(".")
        if inner and top not in sys.modules:
            package = importlib.util.find_spec(top)
            if package is None:
                continue
            sys.modules[top] = types.ModuleType(top)
            sys.modules[top].__path__ = package.submodule_search_locations
        spec = importlib.util.find_spec(name)
        if spec is None or getattr(spec.loader, "__name__", "") == "Broken":
            try:
                importlib.import_module(name)
            except ImportError:
                failing.append(name)
        if spec is not None:
            found.append(name)
    print(json.dumps({"found": found, "failing": failing, "nvcc": shutil.which("nvcc")}))


def path_without_nvcc(path: str, stack: ExitStack) -> str:
    """PATH, its directories that hold nvcc replaced by ones of links to all else in them."""
    directories = []
    for directory in path.split(os.pathsep):
        if directory and shutil.which("nvcc", path=directory):
            links = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="no-nvcc-")))
            for file in Path(directory).iterdir():
                if file.name != "nvcc":
                    (links / file.name).symlink_to(file.absolute())
            directory = str(links)
        directories.append(directory)
    return os.pathsep.join(directories)


def environment(modules: Sequence[str], broken: bool, stack: ExitStack) -> dict[str, str]:
    """Variables for the command; what they point to lasts until `stack` closes."""
    env = {name: value for name, value in os.environ.items() if name not in TOOLKIT_VARIABLES}
    site = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="no-toolkit-")))
    call = f"hide({tuple(modules)!r}, broken={broken!r})"
    source = f"from collections.abc import Sequence\n\n\n{inspect.getsource(hide)}\n\n{call}\n"
    (site / "sitecustomize.py").write_text(source, encoding="utf-8")
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), env.get("PYTHONPATH")]))
    env["PATH"] = path_without_nvcc(env.get("PATH", os.defpath), stack)
    return env


def verify(modules: Sequence[str], broken: bool, env: dict[str, str]) -> str:
    """What was hidden, in one line. Raises NotHiddenError if anything is left."""
    before, after = _ask(modules, dict(os.environ)), _ask(modules, env)
    left = [name for name in before["found"] if name not in after["failing"]]
    if not broken:
        left += after["found"]
    if after["nvcc"]:
        left.append(after["nvcc"])
    if left:
        raise NotHiddenError(f"still there: {', '.join(left)}")
    nothing = [name for name in modules if name not in before["found"]]
    line = f"hidden ({'broken' if broken else 'absent'}): {', '.join(before['found']) or 'nothing'}"
    line += f"; not installed anyway: {', '.join(nothing)}" if nothing else ""
    line += f"; nvcc: was {before['nvcc'] or 'not on PATH'}, off PATH now"
    unset = [name for name in TOOLKIT_VARIABLES if name in os.environ]
    line += f"; unset: {', '.join(unset)}" if unset else ""
    line += f"; NOT hidden: {DEFAULT_TOOLKIT}" if DEFAULT_TOOLKIT.exists() else ""
    return line


def _ask(modules: Sequence[str], env: dict[str, str]) -> dict:
    code = "from collections.abc import Sequence\n"
    code += f"{inspect.getsource(probe)}\nprobe({tuple(modules)!r})"
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


@app.command(context_settings={"allow_interspersed_args": False})
def main(
    command: Annotated[list[str], typer.Argument(help="The command and its arguments.")],
    broken: Annotated[
        bool,
        typer.Option("--broken/--absent", help="Importing fails / looks as if not installed."),
    ] = False,
    keep: Annotated[list[str] | None, typer.Option(help="A module to leave; repeatable.")] = None,
) -> None:
    """Run COMMAND without the toolkit. Exits with its status."""
    if unknown := set(keep or ()) - set(MODULES):
        raise typer.BadParameter(f"--keep takes {', '.join(MODULES)}, not {min(unknown)}")
    modules = [name for name in MODULES if name not in (keep or ())]
    with ExitStack() as stack:
        env = environment(modules, broken, stack)
        print(verify(modules, broken, env), file=sys.stderr, flush=True)
        program = shutil.which(command[0])
        if program is None or shutil.which(command[0], path=env["PATH"]) is None:
            raise typer.BadParameter(f"no such command: {command[0]}")
        # By its own path, not by a link to it: a virtual environment's Python looks around itself.
        status = subprocess.run([program, *command[1:]], env=env).returncode
    raise typer.Exit(status if status >= 0 else 128 - status)


if __name__ == "__main__":
    app()

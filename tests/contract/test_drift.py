# SPDX-License-Identifier: Apache-2.0
"""The drift gate, on small made-up releases of vLLM and plugins, and on the installed vLLM."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from textwrap import dedent

import pytest
from packaging.version import Version

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "drift"))

from comparison import compare, missing
from needs import Block, Row, Source, needs, rows
from trees import Tree
from wheels import tree_of

from vllm_sm12x.vllm_api.version import PINS

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "vllm_sm12x"


class Workshop:
    """Writes releases and plugins into a folder, and compares."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def release(self, version: str, requires: tuple[str, ...] = (), **files: str) -> Tree:
        """Each keyword is a module of vLLM: `a` or, for vllm.a.b, `a__b`."""
        root = self.folder / version
        _write(root / "vllm", files)
        info = root / f"vllm-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.4", "Name: vllm", f"Version: {version}", *requires]
        (info / "METADATA").write_text("\n".join(lines))
        return Tree(root, Version(version))

    def plugin(self, **files: str) -> Block:
        _write(self.folder / "plugin", files)
        return Source(self.folder / "plugin").needs()


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in {"__init__": "", **files}.items():
        path = folder.joinpath(*name.split("__")) if name != "__init__" else folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for parent in path.relative_to(folder).parents:
            (folder / parent / "__init__.py").touch()
        path.with_name(f"{path.name}.py").write_text(dedent(text))


@pytest.fixture
def workshop(tmp_path):
    return Workshop(tmp_path)


@pytest.fixture
def judged(workshop):
    """The section and the words for each symbol, from release 1 to release 2."""

    def judge(plugin: str, old: str, new: str, table=()):
        source = workshop.plugin(vllm_api__surface=plugin)
        trees = workshop.release("1.0", a=old), workshop.release("2.0", a=new)
        report = compare(*trees, *(needs(tree, source, table) for tree in trees))
        lines = {
            line.symbol: (section, line.what)
            for section, found in report.sections.items()
            for line in found
        }
        lacking = [line.symbol for line in missing(trees[1], needs(trees[1], source, table))]
        return lines, lacking

    return judge


CALLS = """
    def ours(x):
        from vllm.a import scale
        return scale(x, factor=2)
"""


def test_a_removed_function_is_breaking_and_fails_the_gate(judged):
    lines, lacking = judged(CALLS, "def scale(x, factor): return x", "def other(x): return x")
    assert lines == {"vllm.a.scale": ("Breaking", "gone")}
    assert lacking == ["vllm.a.scale"]


@pytest.mark.parametrize(
    ("new", "section", "words"),
    [
        ("def scale(x, by): return x * 1", "Breaking", "no parameter factor"),
        ("def scale(x, factor, mode): return x * 1", "Breaking", "no argument for mode"),
        ("def scale(by, factor, x=2): return x * 1", "Breaking", "x to by"),
        ("def scale(factor, x=2): return x * 1", "Breaking", "two arguments for factor"),
        ("def scale(x): return x * 1", "Breaking", "no parameter factor"),
        ("def scale(x, factor, mode=1): return x * 1", "Behavioural", "parameter mode=1 added"),
        ("def scale(x, *, factor): return x * 1", "Behavioural", "factor was positional"),
        ("def scale(x, factor): return x * 2", "Behavioural", "another body"),
        ("scale = 1", "Breaking", "was a function, is a value"),
        (
            'def scale(x: int, factor: "int") -> int:\n  """More."""\n  return x * 1  # so',
            "Unchanged",
            "",
        ),
    ],
)
def test_a_function_that_is_only_called_is_judged_by_the_calls(judged, new, section, words):
    lines, lacking = judged(CALLS, "def scale(x, factor): return x * 1", new)
    assert lines.keys() == {"vllm.a.scale"}
    found, what = lines["vllm.a.scale"]
    assert (found, lacking) == (section, [])
    assert words in what and bool(what) == bool(words)


@pytest.mark.parametrize(
    ("new", "words"),
    [
        ("def scale(x, mode=1): return x", "parameter factor replaced by mode"),
        ("def scale(x): return x", "parameter factor=1 gone"),
        ("def scale(mode, x, factor=1): return x", "new required parameter mode"),
        ("def scale(x, mode=2, factor=1): return x", "positional parameters moved: factor"),
        ("def scale(x, factor): return x", "parameter factor: default was 1, is None"),
    ],
)
def test_a_function_that_a_row_touches_is_judged_by_all_of_its_parameters(judged, new, words):
    row = Row("row", ("vllm.a.scale",), "")
    lines, _ = judged("", "def scale(x, factor=1): return x", new, [row])
    section, what = lines["vllm.a.scale"]
    assert section == "Breaking" and words in what


def test_a_symbol_that_moved_behind_a_re_export_is_unchanged(workshop):
    plugin = workshop.plugin(vllm_api__surface="from vllm.a import scale")
    old = workshop.release("1.0", a="def scale(x): return x")
    new = workshop.release(
        "2.0", a="from .b import resize as scale", b="from vllm.c import *", c="resize = 0"
    )
    (new.root / "vllm/c.py").write_text("def resize(x): return x")
    block = needs(new, plugin, ())
    report = compare(old, new, block, block)
    (line,) = report.sections["Unchanged"]
    assert "now in vllm.c" in line.what and missing(new, block) == []


def test_an_import_that_fails_is_no_submodule_of_that_name(workshop):
    plugin = workshop.plugin(vllm_api__surface="from vllm.ops import scale")
    tree = workshop.release("1.0", ops__scale="def resize(x): return x")
    (tree.root / "vllm/ops/__init__.py").write_text("from .scale import scale")
    assert [line.symbol for line in missing(tree, needs(tree, plugin, ()))] == ["vllm.ops.scale"]


SUBCLASS = """
    from vllm.a import Layer

    class Ours(Layer):
        def forward(self, x):
            return super().forward(x) + self.offset

        def of_our_own(self):
            return self.forward(1)
"""
LAYER = """
    class Base:
        def __init__(self):
            self.offset = 1

        def forward(self, x):
            return x

    class Layer(Base):
        pass
"""


def test_members_of_a_class_are_found_in_its_bases(judged):
    lines, lacking = judged(SUBCLASS, LAYER, LAYER)
    assert {symbol.rpartition(".")[2] for symbol in lines} == {"Layer", "forward", "offset"}
    assert {section for section, _ in lines.values()} == {"Unchanged"}
    assert lacking == []


def test_a_method_that_comes_from_another_class_now_is_breaking(judged):
    own = LAYER.replace("pass", "def forward(self, x):\n            return x")
    lines, lacking = judged(SUBCLASS, own, LAYER)
    assert lines["vllm.a.Layer.forward"] == ("Breaking", "was of class Layer, is of Base")
    assert lacking == []


def test_a_method_that_a_class_now_has_of_its_own_is_behavioural(judged):
    own = LAYER.replace("pass", "def forward(self, x):\n            return x + 1")
    lines, _ = judged(SUBCLASS, LAYER, own)
    words = "was of class Base, is of Layer; another body"
    assert lines["vllm.a.Layer.forward"] == ("Behavioural", words)


def test_a_call_that_never_fitted_is_no_news(judged):
    lines, _ = judged(CALLS, "def scale(x): return x", "def scale(x, y=1): return x")
    assert lines["vllm.a.scale"] == ("Behavioural", "parameter y=1 added")


def test_an_attribute_that_the_base_no_longer_sets_fails_the_gate(judged):
    _, lacking = judged(SUBCLASS, LAYER, LAYER.replace("self.offset", "self.shift"))
    assert lacking == ["vllm.a.Layer.offset"]


def test_other_bases_and_another_constructor_are_breaking(judged):
    new = LAYER.replace("class Layer(Base)", "class Layer(Base, dict)").replace(
        "__init__(self)", "__init__(self, config)"
    )
    section, what = judged(SUBCLASS, LAYER, new)[0]["vllm.a.Layer"]
    assert section == "Breaking"
    assert "bases were (Base), are (Base, dict)" in what
    assert "__init__: new required parameter config" in what


def test_a_method_that_we_extend_may_be_new_but_not_gone(workshop):
    plugin = workshop.plugin(vllm_api__surface=SUBCLASS)
    without = LAYER.replace("def forward", "def run")
    trees = [workshop.release(f"{n}.0", a=text) for n, text in enumerate([without, LAYER, without])]
    blocks = [needs(tree, plugin, ()) for tree in trees]
    gate = [missing(trees[n], blocks[n], trees[:n]) for n in range(3)]
    assert [[line.symbol for line in lines] for lines in gate] == [[], [], ["vllm.a.Layer.forward"]]
    old, new = (compare(*trees[n : n + 2], *blocks[n : n + 2]) for n in (0, 1))
    sections = [
        (section, line.what)
        for report in (old, new)
        for section, lines in report.sections.items()
        for line in lines
        if line.symbol == "vllm.a.Layer.forward"
    ]
    assert sections == [("Behavioural", "new in 1.0"), ("Breaking", "gone")]


def test_a_dataclass_field_that_is_gone_is_breaking(judged):
    plugin = """
        from vllm.a import Metadata

        def ours(metadata: Metadata):
            return metadata.tokens
    """
    old = """
        import dataclasses

        @dataclasses.dataclass
        class Common:
            tokens: int
            lens: list[int]

        @dataclasses.dataclass
        class Metadata(Common):
            blocks: int = 0
    """
    lines, lacking = judged(plugin, old, old.replace("tokens", "num_tokens"))
    assert lines["vllm.a.Metadata"][0] == "Breaking"
    assert "field tokens gone" in lines["vllm.a.Metadata"][1]
    assert lines["vllm.a.Metadata.tokens"] == ("Breaking", "gone")
    assert lacking == ["vllm.a.Metadata.tokens"]


def test_an_enum_member_that_is_gone_is_breaking(judged):
    plugin = "from vllm.a import Backend\nCUSTOM = Backend.CUSTOM\nNAME = CUSTOM.path()"
    old = """
        from enum import Enum

        class Backend(Enum):
            FLASH = 1
            CUSTOM = 2

            def path(self):
                return "x"
    """
    lines, lacking = judged(plugin, old, old.replace("    CUSTOM = 2\n", ""))
    assert lines["vllm.a.Backend"][0] == "Breaking"
    assert lacking == ["vllm.a.Backend.CUSTOM", "vllm.a.Backend.CUSTOM.path"]


@pytest.mark.parametrize(
    ("plugin", "lacking"),
    [
        ("try:\n    from vllm.a import f\nexcept ImportError:\n    f = None", []),
        ("try:\n    from vllm.a import f\nexcept ImportError:\n    from vllm.a import g as f", []),
        (
            "try:\n    from vllm.a import f\nexcept ImportError:\n    from vllm.a import h as f",
            ["vllm.a.f"],
        ),
        ("try:\n    from vllm.a import f\nexcept ImportError:\n    raise", ["vllm.a.f"]),
        ("try:\n    from vllm.a import f\nexcept ValueError:\n    f = None", ["vllm.a.f"]),
        ("try:\n    from vllm.a import f\nexcept ImportError:\n    f = None\nx = f and f()", []),
        (
            "def ours():\n    try:\n        from vllm.a import f\n    except ImportError:\n"
            "        return 0\n    return f()",
            [],
        ),
        (
            "def ours():\n    try:\n        from vllm.a import g\n    except ImportError:\n"
            "        g = 0\n    from vllm.a import f",
            ["vllm.a.f"],
        ),
        ("import vllm.a as a\nif hasattr(a, 'f'):\n    a.f()", []),
        ("import vllm.a as a\nif hasattr(a, 'g'):\n    a.f()", ["vllm.a.f"]),
        ("import vllm.a as a\nif not hasattr(a, 'f'):\n    a.g()\nelse:\n    a.f()", []),
        ("import vllm.a as a\nx = a.f if hasattr(a, 'f') else a.g", []),
        ("import vllm.a as a\nx = a.f if len('f') else a.g", ["vllm.a.f"]),
        ("from x import within\nif within(1, '<2'):\n    from vllm.a import f", []),
        ("from x import within\nif within(1, '>=2'):\n    from vllm.a import f", ["vllm.a.f"]),
        (
            "from x import within\nOLD = within(1, '<2')\n"
            "def ours():\n    import vllm.a as a\n    if OLD:\n        return a.f()\n    a.h()",
            ["vllm.a.h"],
        ),
        ("import inspect\nimport vllm.a as a\nif inspect.signature(a.g).x:\n    a.f()", []),
        ("import vllm.a as a\ndef ours(x):\n    if x is None:\n        a.f()", ["vllm.a.f"]),
        ("import vllm.a as a\ndef ours():\n    a.x = [a.f(y) for y in ()]", ["vllm.a.f"]),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vllm.a import f", []),
        ("import importlib\nimportlib.import_module('vllm.b')", ["vllm.b"]),
        ("import importlib\nimportlib.import_module('vllm.a').f()", ["vllm.a.f"]),
        ("PATH = 'vllm.b'", []),
    ],
)
def test_what_may_be_missing_depends_on_the_branch(judged, plugin, lacking):
    """Release 2 has g alone."""
    old = "def f(): pass\ndef g(): pass\ndef h(): pass"
    assert judged(plugin, old, "def g(): pass")[1] == lacking


def test_what_our_functions_return_is_followed_into_other_modules(workshop):
    plugin = workshop.plugin(
        vllm_api__surface="""
            def wrappers():
                from vllm import a
                return a
        """,
        integration__use="""
            from plugin.vllm_api import surface

            def ours():
                found = surface.wrappers()
                return found.scale(1), surface.wrappers().gone(2)
        """,
    )
    tree = workshop.release("1.0", a="def scale(x): return x")
    (line,) = missing(tree, needs(tree, plugin, ()))
    assert (line.symbol, line.by) == ("vllm.a.gone", ("integration/use.py ours",))


def test_a_symbol_on_one_side_of_a_compat_branch_is_compared_with_the_other(judged):
    plugin = (
        "try:\n    from vllm.a import f\nexcept ImportError:\n    from vllm.a import g as f\nf(1)"
    )
    lines, lacking = judged(plugin, "def f(x): return x", "def g(x): return x")
    assert lacking == []
    assert lines["vllm.a.f -> vllm.a.g"] == ("Unchanged", "")
    assert lines["vllm.a.f"] == ("Breaking", "gone, where it may be missing")


@pytest.mark.parametrize(("versions", "lacking"), [("<2", []), (">=2", ["vllm.a.f"])])
def test_a_row_needs_its_symbols_in_its_range_only(judged, versions, lacking):
    row = Row("row", ("vllm.a.f",), versions)
    assert judged("", "def f(): pass", "", [row])[1] == lacking


def test_dependencies_are_those_of_the_wheels(workshop):
    old = workshop.release(
        "1.0", ("Requires-Python: >=3.10", "Requires-Dist: torch==2.1", "Requires-Dist: einops==1")
    )
    new = workshop.release(
        "2.0",
        (
            "Requires-Python: >=3.11",
            "Requires-Dist: torch==2.2",
            "Requires-Dist: flashinfer-python==0.7",
            'Requires-Dist: tilelang==3; extra == "all"',
        ),
    )
    block = needs(new, workshop.plugin(), ())
    lines = compare(old, new, block, block).sections["Dependencies"]
    assert {(line.symbol, line.what) for line in lines} == {
        ("Python", "was >=3.10, is >=3.11"),
        ("torch", "was ==2.1, is ==2.2"),
        ("flashinfer-python", "was not required, is ==0.7"),
    }


def run(*arguments: str | Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, ROOT / "scripts" / "drift", *arguments]
    env = {"PATH": f"{path or '/nowhere'}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    return subprocess.run(script, capture_output=True, text=True, env=env)


def test_the_command_exits_1_where_a_required_symbol_is_missing(workshop, tmp_path):
    """Made-up releases have one of all the symbols that the plugin needs."""
    asked = f"{PINS[-1]}.post1"
    for version in (*PINS, asked):
        workshop.release(version, envs="environment_variables = {}")
    to = tmp_path / "report.json"
    done = run(asked, "--cache", tmp_path, "--json", to)
    assert done.returncode == 1, done.stderr
    result = json.loads(to.read_text())
    assert [(report["from"], report["to"]) for report in result["reports"]] == [(PINS[-1], asked)]
    lacking = {line["symbol"] for line in result["missing"][asked]}
    assert "vllm.models.deepseek_v4.nvidia.model._select_dsv4_attn_cls" in lacking
    assert "vllm.envs.environment_variables" not in lacking
    # Rows that ask which vLLM is installed hear of the release, not of the one installed here.
    assert "vllm.models.deepseek_v4.nvidia.dspark.mhc_post_tilelang" in lacking


def test_of_a_wheel_only_python_is_kept(tmp_path):
    (tmp_path / "uv").write_text(
        """#!/bin/sh
        while [ "$1" != --target ]; do shift; done
        mkdir -p "$2/vllm" "$2/vllm-0.0.1.dist-info"
        echo "def f(): pass" >"$2/vllm/__init__.py"
        echo >"$2/vllm/_C.so"
        echo "Name: vllm" >"$2/vllm-0.0.1.dist-info/METADATA"
        """
    )
    (tmp_path / "uv").chmod(0o755)
    cache = tmp_path / "cache"
    assert run("0.0.1", "--cache", cache, path=tmp_path).returncode == 1
    (tmp_path / "uv").unlink()
    assert run("0.0.1", "--cache", cache).returncode == 1, "the cache was not used"
    kept = {str(file.relative_to(cache)) for file in cache.rglob("*") if file.is_file()}
    assert {name for name in kept if name.startswith("0.0.1/")} == {
        "0.0.1/vllm/__init__.py",
        "0.0.1/vllm-0.0.1.dist-info/METADATA",
    }


@pytest.mark.parametrize("error", ["error: Failed to fetch", ""])
def test_without_a_network_the_command_says_so(tmp_path, error):
    (tmp_path / "uv").write_text(f"#!/bin/sh\necho '{error}' >&2\nexit 2\n")
    (tmp_path / "uv").chmod(0o755)
    done = run("0.0.1", "--cache", tmp_path / "cache", path=tmp_path)
    assert done.returncode == 2
    assert "The wheel of vLLM" in done.stdout and "Traceback" not in done.stderr
    assert error.partition(": ")[2] in done.stdout
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("newest",), "newest"),
        (("0.0.1", "--cache", "/proc/none"), "/proc/none"),
        (("0.0.1", "--json", "/proc/none/report"), "/proc/none"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(arguments, named):
    done = run(*arguments)
    assert done.returncode == 2
    assert named in done.stdout + done.stderr and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Tree:
    """The Python of the installed vLLM, to be read and to be broken."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    found = tree_of(Version(metadata.version("vllm")), tmp_path_factory.mktemp("no_cache"))
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(found.root / "vllm", root / "vllm", ignore=_all_but_python)
    return Tree(root, found.version)


def _all_but_python(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not (name.endswith(".py") or Path(folder, name).is_dir())]


@pytest.fixture(scope="module")
def plugins_needs() -> Block:
    return Source(PLUGIN).needs()


def test_nothing_that_the_plugin_needs_is_missing_in_the_installed_vllm(installed, plugins_needs):
    block = needs(installed, plugins_needs, rows(installed, PLUGIN))
    assert len(list(block.required(installed))) > 100
    assert missing(installed, block) == []


@pytest.mark.parametrize(
    ("module", "name", "symbol"),
    [
        ("models/deepseek_v4/nvidia/model.py", "_select_dsv4_attn_cls", None),
        ("v1/worker/workspace.py", "get_simultaneous", "current_workspace_manager()"),
        ("v1/worker/workspace.py", "current_workspace_manager", None),
        ("model_executor/layers/sparse_attn_indexer.py", "has_deep_gemm", None),
        ("v1/attention/backends/registry.py", "register_backend", None),
        ("v1/attention/backends/registry.py", "clear_override", "AttentionBackendEnum.CUSTOM"),
        ("forward_context.py", "attn_metadata", "get_forward_context()"),
    ],
)
def test_a_symbol_renamed_in_the_installed_vllm_fails_the_gate(
    installed, plugins_needs, module, name, symbol
):
    file = installed.root / "vllm" / module
    text = file.read_text()
    file.write_text(re.sub(rf"\b{name}\b", f"{name}_renamed", text))
    try:
        broken = Tree(installed.root, installed.version)
        block = needs(broken, plugins_needs, rows(broken, PLUGIN))
        lacking = [line.symbol for line in missing(broken, block)]
    finally:
        file.write_text(text)
    path = ["vllm", *Path(module).with_suffix("").parts, *filter(None, [symbol]), name]
    assert ".".join(path) in lacking

# SPDX-License-Identifier: Apache-2.0
"""A release of vLLM as a folder of Python source: where a dotted name leads, by reading alone."""

import ast
import builtins
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.machinery import PathFinder
from pathlib import Path
from types import FunctionType, ModuleType

from packaging.specifiers import SpecifierSet
from packaging.version import Version

PACKAGE = "vllm"
Function = ast.FunctionDef | ast.AsyncFunctionDef
_WITHOUT_MEMBERS = {"Generic", "Protocol"}  # and without source: typing has them from C
_PROPERTIES = {"property", "cached_property", "classproperty"}


@dataclass(frozen=True)
class Found:
    """What a name leads to, and the module whose code that is.

    `node` is None for what vLLM takes from elsewhere: other packages, builtins, compiled modules.
    `owner` is the class that holds the node.
    """

    symbol: str
    module: str
    node: ast.AST | None
    owner: "Found | None" = None

    @property
    def kind(self) -> str:
        if self.node is None:
            return "outside"
        names = {ast.Module: "module", ast.ClassDef: "class", ast.FunctionDef: "function"}
        return names.get(type(self.node), "value") if not self.is_function else "function"

    @property
    def is_function(self) -> bool:
        return isinstance(self.node, Function)

    @property
    def is_static(self) -> bool:
        return isinstance(self.node, Function) and "staticmethod" in decorators(self.node)


class Tree:
    """One release. `root` is the folder that holds the package `vllm`."""

    def __init__(self, root: Path, version: Version) -> None:
        self.root, self.version = root, version
        self._modules: dict[str, ast.Module | None] = {}
        self._packages: set[str] = set()
        self._found: dict[str, Found | None] = {}
        self._bindings: dict[str, dict[str, list[ast.stmt]]] = {}

    @functools.cached_property
    def metadata(self) -> list[str]:
        """The lines of the wheel's METADATA; none if there is none."""
        for folder in sorted(self.root.glob(f"{PACKAGE}-*.dist-info")):
            if folder.name.removeprefix(f"{PACKAGE}-").startswith(str(self.version)):
                return (folder / "METADATA").read_text().splitlines()
        return []

    def within(self, versions: str) -> bool:
        """Whether this release lies in a PEP 440 range ("" is every release)."""
        return SpecifierSet(versions).contains(self.version, prereleases=True)

    def find(self, dotted: str) -> Found | None:
        """What `dotted` means; None if it is not there.

        "f()" is what f returns by its annotation, or an instance if f is a class. Where no source
        tells what a part is (a value without an annotation, another package), the answer is the
        last part that is known, under its own name.
        """
        if dotted not in self._found:
            self._found[dotted] = self._find(dotted)
        return self._found[dotted]

    def _find(self, dotted: str) -> Found | None:
        first, *parts = re.findall(r"\w+|\(\)", dotted)
        at = self._module(first)
        for part in parts:
            if at is None:
                return None
            found = self._member(at, part)
            if found is at:
                return at
            dot = "" if part == "()" else "."
            at = found and replace(found, symbol=f"{at.symbol}{dot}{part}")
        return at

    def class_of(
        self, expression: ast.expr | None, module: str, within: ast.stmt | None = None
    ) -> Found | None:
        """The class that an expression of a module names or makes: a base, an annotation, a value.

        None if it cannot be read. Of `A if nvml else B` it is A, of `A | None` too.
        """
        if isinstance(expression, ast.Constant) and isinstance(expression.value, str):
            try:
                expression = ast.parse(expression.value, mode="eval").body
            except SyntaxError:
                return None
        if isinstance(expression, ast.IfExp):
            return self.class_of(expression.body, module)
        if isinstance(expression, ast.Subscript):
            expression = expression.value
        if isinstance(expression, ast.Call):
            expression = expression.func
        if isinstance(expression, ast.BinOp):
            sides = [self.class_of(side, module) for side in (expression.left, expression.right)]
            return next((side for side in sides if side), None)
        if not isinstance(expression, ast.Name | ast.Attribute):
            return None
        found = self._in_module_path(module, ast.unparse(expression))
        if found and isinstance(found.node, ast.Assign) and found.node is not within:
            return self.class_of(found.node.value, found.module, within=found.node)
        return found if found and isinstance(found.node, ast.ClassDef) else None

    def bases(self, found: Found) -> list[Found | None]:
        """The bases of a class, and its metaclass; None for one that cannot be read."""
        assert isinstance(found.node, ast.ClassDef)
        metaclass = [keyword.value for keyword in found.node.keywords if keyword.arg == "metaclass"]
        return [self.class_of(base, found.module) for base in (*found.node.bases, *metaclass)]

    def fields(self, found: Found) -> dict[str, ast.AnnAssign]:
        """The fields of a class with annotations, its bases' first: what a dataclass holds."""
        assert isinstance(found.node, ast.ClassDef)
        fields: dict[str, ast.AnnAssign] = {}
        for base in self.bases(found):
            if base is not None and base.module.split(".")[0] == PACKAGE:
                fields |= self.fields(base)
        for statement in found.node.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                fields[statement.target.id] = statement
        return fields

    def _member(self, at: Found, part: str) -> Found | None:
        """One step of `find`; `at` itself where no source tells."""
        if isinstance(at.node, ast.Module):
            return at if hasattr(ModuleType, part) else self._in_module(at.module, part)
        if isinstance(at.node, ast.ClassDef):
            return at if part == "()" else self._in_class(at, part)
        if isinstance(at.node, Function):
            is_property = _PROPERTIES & decorators(at.node)
            if part == "()" or is_property:
                returned = self.class_of(at.node.returns, at.module)
                if part == "()":
                    return returned or at
                return self._of_value(at, returned, part)
            return at if hasattr(FunctionType, part) else None
        if isinstance(at.node, ast.AnnAssign) and part != "()":
            return self._of_value(at, self.class_of(at.node.annotation, at.module), part)
        if at.owner is not None and part != "()" and self._is_enum(at.owner):
            return self._in_class(at.owner, part)
        if isinstance(at.node, ast.Assign):
            held = self.class_of(at.node.value, at.module, within=at.node)
            if not isinstance(at.node.value, ast.Call):
                return self._member(held, part) if held else at
            return self._of_value(at, held, part)
        return at

    def _of_value(self, at: Found, held: Found | None, part: str) -> Found | None:
        """An attribute of a value of class `held`; any may be there if the class makes them up."""
        if held is None or part == "()":
            return at
        found = self._in_class(held, part)
        return at if found is None and self._in_class(held, "__getattr__") else found

    def _is_enum(self, found: Found) -> bool:
        if found.module == "enum":
            return True
        return any(base is not None and self._is_enum(base) for base in self.bases(found))

    def _module(self, name: str) -> Found | None:
        if name not in self._modules:
            self._modules[name] = self._parse(name)
        node = self._modules[name]
        return Found(name, name, node) if node is not None else None

    def _parse(self, name: str) -> ast.Module | None:
        first, *rest = name.split(".")
        folder = self.root / first if first == PACKAGE else _folder_of(first)
        if folder is None:
            return None
        path = folder.joinpath(*rest)
        if path.is_dir():
            self._packages.add(name)
        for file in (path / "__init__.py", path.with_name(f"{path.name}.py")):
            if file.is_file():
                return ast.parse(file.read_text(encoding="utf-8"))
        return ast.Module(body=[], type_ignores=[]) if path.is_dir() else None

    def _in_module_path(self, module: str, dotted: str) -> Found | None:
        first, *parts = dotted.split(".")
        at = self._in_module(module, first)
        for part in parts:
            at = at and self._member(at, part)
        return at

    def _in_module(
        self, module: str, name: str, seen: frozenset[tuple[str, str]] = frozenset()
    ) -> Found | None:
        home = self._module(module)
        if home is None or (module, name) in seen:
            return None
        seen |= {(module, name)}
        if module not in self._bindings:
            assert isinstance(home.node, ast.Module)
            self._bindings[module] = bindings(home.node.body)
        bound = self._bindings[module]
        for node in bound.get(name, ()):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                return Found(f"{module}.{name}", module, node)
            found = self._imported(node, module, name, seen)
            if found is not None:
                return found
        if name in bound:  # by imports that fail, whatever submodule has that name
            return None
        for node in bound.get("*", ()):
            assert isinstance(node, ast.ImportFrom)
            found = self._in_module(self._source_of(node, module), name, seen)
            if found is not None:
                return found
        submodule = self._module(f"{module}.{name}")
        if submodule is not None:
            return submodule
        # A module that makes its attributes when asked: the name stands in it as a string.
        if "__getattr__" in bound and name in _strings(home.node):
            return Found(f"{module}.{name}", module, None)
        return None

    def _imported(
        self,
        node: ast.Import | ast.ImportFrom,
        module: str,
        name: str,
        seen: frozenset[tuple[str, str]],
    ) -> Found | None:
        for alias in node.names:
            if isinstance(node, ast.Import):
                path = alias.name if alias.asname else alias.name.split(".")[0]
                if name != (alias.asname or path):
                    continue
                found = self._module(path)
            else:
                if name != (alias.asname or alias.name):
                    continue
                path = self._source_of(node, module)
                found = self._in_module(path, alias.name, seen)
            if found is None and path.split(".")[0] != PACKAGE:
                return Found(f"{module}.{name}", path, None)
            return found
        return None

    def _source_of(self, node: ast.ImportFrom, module: str) -> str:
        if not node.level:
            return node.module or ""
        package = module.split(".")
        package = package[: len(package) - node.level + (module in self._packages)]
        return ".".join([*package, *([node.module] if node.module else [])])

    def _in_class(
        self, found: Found, name: str, seen: frozenset[tuple[str, str]] = frozenset()
    ) -> Found | None:
        assert isinstance(found.node, ast.ClassDef)
        here = (found.module, found.node.name)
        if here in seen:
            return None
        held = class_members(found.node).get(name)
        if held:
            return Found(f"{found.symbol}.{name}", found.module, held[0], owner=found)
        for base in self.bases(found):
            inherited = base and self._in_class(base, name, seen | {here})
            if inherited:
                return inherited
        builtin = [getattr(builtins, base, object) for base in map(ast.unparse, found.node.bases)]
        if any(hasattr(base, name) for base in (*builtin, object, type)):
            return Found(f"{found.symbol}.{name}", "builtins", None)
        return None if self._is_read(found) else Found(f"{found.symbol}.{name}", "", None)

    def _is_read(self, found: Found) -> bool:
        """Whether all bases are there to be read, or are known to bring nothing."""
        assert isinstance(found.node, ast.ClassDef)
        expressions = (*found.node.bases, *(keyword.value for keyword in found.node.keywords))
        for expression, base in zip(expressions, self.bases(found), strict=False):
            name = ast.unparse(expression).partition("[")[0].rpartition(".")[2]
            if base is None and not hasattr(builtins, name) and name not in _WITHOUT_MEMBERS:
                return False
        return True


def _folder_of(package: str) -> Path | None:
    """Where another package of this environment has its source; nothing is imported."""
    spec = PathFinder.find_spec(package) if package else None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    file = Path(spec.origin)
    return file.parent if file.name == "__init__.py" else file.with_suffix("")


def decorators(node: Function | ast.ClassDef) -> set[str]:
    """The last parts of the names of what decorates it."""
    names = (item.func if isinstance(item, ast.Call) else item for item in node.decorator_list)
    return {ast.unparse(name).rpartition(".")[2] for name in names}


def bindings(body: list[ast.stmt]) -> dict[str, list[ast.stmt]]:
    """The statements that bind each name, under if and try too; definitions first, "*" for all."""
    bound: dict[str, list[ast.stmt]] = {}
    for statement in _flat(body):
        for name in _names_bound(statement):
            bound.setdefault(name, []).append(statement)
    defined = Function | ast.ClassDef
    for statements in bound.values():
        statements.sort(key=lambda statement: not isinstance(statement, defined))
    return bound


@functools.cache
def class_members(node: ast.ClassDef) -> dict[str, list[ast.stmt]]:
    """What a class's body binds, then what its methods assign to self or cls."""
    members = bindings(node.body)
    for method in _flat(node.body):
        for statement in ast.walk(method) if isinstance(method, Function) else ():
            for target in _targets(statement):
                own, _, attribute = ast.unparse(target).partition(".")
                if own in ("self", "cls") and attribute.isidentifier():
                    assert isinstance(statement, ast.stmt)
                    members.setdefault(attribute, []).append(statement)
    return members


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With | ast.For | ast.While):
            for part in ("body", "handlers", "orelse", "finalbody"):
                for child in getattr(statement, part, ()):
                    yield from _flat(
                        child.body if isinstance(child, ast.ExceptHandler) else [child]
                    )


def _names_bound(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, Function):
        if "overload" not in decorators(statement):
            yield statement.name
    elif isinstance(statement, ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Import):
        for alias in statement.names:
            yield alias.asname or alias.name.split(".")[0]
    elif isinstance(statement, ast.ImportFrom):
        for alias in statement.names:
            yield alias.asname or alias.name
    else:
        yield from (name.id for name in _targets(statement) if isinstance(name, ast.Name))


def _targets(statement: ast.AST) -> Iterator[ast.expr]:
    """The names and attributes that an assignment, or a loop or with, binds."""
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign | ast.AugAssign | ast.For):
        targets = [statement.target]
    elif isinstance(statement, ast.With):
        targets = [item.optional_vars for item in statement.items if item.optional_vars]
    else:
        return
    for target in targets:
        yield from target.elts if isinstance(target, ast.Tuple | ast.List) else [target]


def _strings(node: ast.AST | None) -> set[str]:
    constants = (
        (child for child in ast.walk(node) if isinstance(child, ast.Constant)) if node else ()
    )
    return {constant.value for constant in constants if isinstance(constant.value, str)}

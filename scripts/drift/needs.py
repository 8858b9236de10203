# SPDX-License-Identifier: Apache-2.0
"""What the plugin needs of vLLM, read out of its own source.

Followed are imports (in functions too), attributes of what was imported, of parameters whose
annotation is a class of vLLM's, of what functions of ours return and of `self` and `super()` in
subclasses of vLLM's classes, and dotted names in strings of `vllm_api`. Not followed are names put
together at run time (the rows' `touches` have those), attributes of values without an annotation,
and operators of `torch.ops`, which are compiled.
"""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from trees import PACKAGE, Function, Tree, class_members

# What a condition mentions that asks what this vLLM has, rather than what a request is.
PROBES = {
    "TYPE_CHECKING",
    "__dataclass_fields__",
    "__members__",
    "fields",
    "find_spec",
    "hasattr",
    "installed",
    "signature",
    "vars",
    "within",
}
_MISSING_NAME = {"AttributeError", "Exception", "ImportError", "ModuleNotFoundError"}
_COMPREHENSION = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp

# Alternatives: a compat branch gives a name more than one meaning; "" is one that is not vLLM's.
Names = tuple[str, ...]
Scope = dict[str, Names]
Test = Callable[[Tree], bool | None]  # None: cannot be told from source


class How(Enum):
    """How a symbol is used, which decides how much of its signature matters."""

    IMPORT = "import"
    CALL = "call"
    READ = "read"
    OVERRIDE = "override"
    CHANGE = "change"


class Call(NamedTuple):
    """The shape of a call; `open` where * or ** may stand for more."""

    positional: int
    keywords: tuple[str, ...]
    open: bool


@dataclass(frozen=True)
class Use:
    """One place that needs one symbol, by the first of `names` that is there.

    An `optional` one may be missing: a method of ours that overrides none, a name in a string. A
    `hook` is what an override of ours calls by super(): a release older than the method never calls
    the override, but one in which the method is gone leaves it uncalled.
    """

    names: Names
    by: str
    how: How
    call: Call | None = None
    optional: bool = False
    hook: bool = False

    def is_in(self, tree: Tree) -> bool:
        return any(map(tree.find, self.names))


@dataclass
class Block:
    """Uses that all must be there, and choices of each of which one branch must."""

    uses: list[Use] = field(default_factory=list)
    choices: list["Choice"] = field(default_factory=list)

    def all_uses(self) -> Iterator[Use]:
        yield from self.uses
        for choice in self.choices:
            for branch in choice.branches:
                yield from branch.all_uses()

    def required(self, tree: Tree) -> Iterator[Use]:
        """The uses that this release must serve: of a choice, the branch that it takes."""
        yield from (use for use in self.uses if not use.optional)
        for choice in self.choices:
            yield from choice.taken(tree).required(tree)

    def missing(self, tree: Tree, older: Iterable[Tree] = ()) -> list[Use]:
        """The required uses that this release lacks; hooks only if an older one has them."""
        lacking = (use for use in self.required(tree) if not use.is_in(tree))
        return [use for use in lacking if not use.hook or any(map(use.is_in, older))]


@dataclass
class Choice:
    """An if about vLLM (`test` is its condition; the second branch is the else), or a try."""

    branches: list[Block]
    test: Test | None = None

    def taken(self, tree: Tree) -> Block:
        """The branch that the test picks; without an answer, the first that lacks nothing."""
        answer = self.test(tree) if self.test else None
        if answer is not None:
            return self.branches[0 if answer else 1]
        whole = (branch for branch in self.branches if not branch.missing(tree))
        return next(whole, self.branches[0])


class Row(NamedTuple):
    """A change's name, the symbols that it touches, and its PEP 440 range."""

    name: str
    touches: tuple[str, ...]
    vllm: str


def rows(tree: Tree, package: Path) -> list[Row]:
    """The table of changes as it is where `tree` is the installed vLLM: rows may ask for that.

    Read in a process of its own. Raises RuntimeError.
    """
    version = str(tree.version)
    code = (
        "import json, sys; from importlib import metadata; known = metadata.version; "
        f"metadata.version = lambda name: {version!r} if name == {PACKAGE!r} else known(name); "
        f"sys.path[:] = {[str(package.parent), *sys.path]!r}; "
        f"from {package.name}.changes import CHANGES; "
        "print(json.dumps([(row.name, row.touches, row.vllm) for row in CHANGES]))"
    )
    read = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if read.returncode:
        raise RuntimeError(f"The table of changes cannot be read: {read.stderr.strip()}")
    return [Row(name, tuple(touches), vllm) for name, touches, vllm in json.loads(read.stdout)]


def needs(tree: Tree, source: Block, table: Iterable[Row]) -> Block:
    """Everything that the plugin's source and its table of changes need of one release."""
    touched = [
        Use((symbol,), f"row {row.name}", How.CHANGE)
        for row in table
        if tree.within(row.vllm)
        for symbol in row.touches
    ]
    return Block([*source.uses, *touched], source.choices)


class Source:
    """The plugin's source: what each module binds, and what all of it needs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name
        self.modules: dict[str, Module | None] = {}

    def needs(self) -> Block:
        block = Block()
        for file in sorted(self.folder.rglob("*.py")):
            parts = file.relative_to(self.folder.parent).with_suffix("").parts
            module = self.module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
            assert module is not None
            block.uses += module.block.uses
            block.choices += module.block.choices
        return block

    def module(self, name: str) -> "Module | None":
        if name not in self.modules:
            path = self.folder.parent.joinpath(*name.split("."))
            files = (path / "__init__.py", path.with_name(f"{path.name}.py"))
            file = next((file for file in files if file.is_file()), None)
            self.modules[name] = None
            if file is not None:
                tree = ast.parse(file.read_text(encoding="utf-8"))
                # In the second pass the code above a function knows what it returns.
                Module(self, name, file, tree, Module(self, name, file, tree, {}).returns)
        return self.modules[name]

    def is_ours(self, name: str) -> bool:
        return name.split(".")[0] == self.name

    def home_of(self, name: str) -> "tuple[Module, str] | None":
        """The module that a dotted name of ours lies in, and what is left of the name."""
        module, _, rest = name.rpartition(".")
        while module:
            home = self.module(module)
            if home is not None:
                return home, rest
            module, _, part = module.rpartition(".")
            rest = f"{part}.{rest}"
        return None

    def attribute(self, base: str, name: str) -> Names:
        """What an attribute of one of our modules, classes or their instances means."""
        home = self.module(base)
        if home is not None:
            if name in home.scope:
                return home.scope[name]
            return (f"{base}.{name}",) if self.module(f"{base}.{name}") else ()
        if self.owns(base, name):
            return ()
        return tuple(f"{theirs}.{name}" for theirs in self.bases(base))

    def owns(self, name: str, attribute: str) -> bool:
        """Whether a class of ours, or a base of it that is ours, has an attribute of its own."""
        found = self.home_of(name)
        if found is None or found[1] not in found[0].classes:
            return True
        home, rest = found
        node, bases = home.classes[rest]
        inherited = (base for base in bases if self.is_ours(base))
        return attribute in class_members(node) or any(
            self.owns(base, attribute) for base in inherited
        )

    def bases(self, name: str) -> Names:
        """The classes of vLLM's that a class of ours is made of."""
        found = self.home_of(name)
        if found is None or found[1] not in found[0].classes:
            return ()
        bases = found[0].classes[found[1]][1]
        nested = (self.bases(base) if self.is_ours(base) else (base,) for base in bases)
        return tuple(base for group in nested for base in group)

    def probe(self, name: str) -> "tuple[Test | None] | None":
        found = self.home_of(name)
        return found[0].probes.get(found[1]) if found else None


@dataclass
class Place:
    """Where the reader stands: the names in force, what to add to, and whose code it is."""

    scope: Scope
    block: Block
    path: str = ""
    cls: str = ""
    function: str = ""

    def within(self, block: Block) -> "Place":
        return Place(dict(self.scope), block, self.path, self.cls, self.function)


class Module:
    """One module of ours, read statement by statement."""

    def __init__(
        self, source: Source, name: str, file: Path, tree: ast.Module, returns: dict[str, Names]
    ) -> None:
        self.source, self.name = source, name
        self.label = str(file.relative_to(source.folder))
        self.names_in_strings = self.label.startswith("vllm_api/")
        self.returns = returns
        self.classes: dict[str, tuple[ast.ClassDef, Names]] = {}
        self.probes: dict[str, tuple[Test | None]] = {}
        self.block = Block()
        self.scope: Scope = {}
        source.modules[name] = self
        self._later: list[tuple[Function | ast.Lambda, Place]] = []
        self._read(tree.body, Place(self.scope, self.block))
        while self._later:
            self._read_function(*self._later.pop(0))

    # Statements

    def _read(self, body: list[ast.stmt], place: Place) -> None:
        for number, statement in enumerate(body):
            rest = body[number + 1 :]
            if isinstance(statement, ast.If) and self._is_probe(statement.test, place):
                self._probe(statement, rest, place)
                return
            if isinstance(statement, ast.Try) and _survives_a_missing_name(statement):
                self._try(statement, rest, place)
                return
            self._statement(statement, place)

    def _probe(self, node: ast.If, rest: list[ast.stmt], place: Place) -> None:
        """An if about vLLM, and what follows it."""
        self._expression(node.test, place)
        otherwise = node.orelse
        if _ends(node.body, ast.Raise):
            self._read([*otherwise, *rest], place)
            return
        if _ends(node.body, ast.Return):
            otherwise, rest = [*otherwise, *rest], []
        self._choose([node.body, otherwise], self._test(node.test, place), place)
        self._read(rest, place)

    def _try(self, node: ast.Try, rest: list[ast.stmt], place: Place) -> None:
        """A try that goes on without a name of vLLM's, and what follows it."""
        body = [*node.body, *node.orelse]
        handlers = [handler.body for handler in node.handlers]
        handlers = [handler for handler in handlers if not _ends(handler, ast.Raise)]
        if any(_ends(handler, ast.Return) for handler in handlers):
            body, rest = [*body, *rest], []
        self._choose([body, *handlers], None, place)
        self._read([*node.finalbody, *rest], place)

    def _choose(self, bodies: list[list[ast.stmt]], test: Test | None, place: Place) -> None:
        blocks = [Block() for _ in bodies]
        places = [place.within(block) for block in blocks]
        for body, inner in zip(bodies, places, strict=True):
            self._read(body, inner)
        if any(block.uses or block.choices for block in blocks):
            place.block.choices.append(Choice(blocks, test))
        _merge(place.scope, [inner.scope for inner in places])

    def _statement(self, node: ast.stmt, place: Place) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom):
            self._import(node, place)
        elif isinstance(node, Function):
            self._define(node, place)
        elif isinstance(node, ast.ClassDef):
            self._class(node, place)
        elif isinstance(node, ast.If):
            self._expression(node.test, place)
            inner = [place.within(place.block), place.within(place.block)]
            self._read(node.body, inner[0])
            self._read(node.orelse, inner[1])
            _merge(place.scope, [branch.scope for branch in inner])
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            self._assign(node, place)
        elif isinstance(node, ast.Return) and node.value is not None:
            self._expression(node.value, place)
            if place.function:
                found = self._resolve(node.value, place)
                known = self.returns.get(place.function, ())
                self.returns[place.function] = _united(known, found)
                if _mentions(node.value, PROBES):
                    self.probes.setdefault(place.function, (None,))
        else:
            self._compound(node, place)

    def _compound(self, node: ast.AST, place: Place) -> None:
        for name in _stored(node):
            place.scope[name] = ()
        for _, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.expr):
                    self._expression(child, place)
                elif isinstance(child, ast.stmt):
                    self._read([child], place)
                elif isinstance(child, ast.AST):
                    self._compound(child, place)

    def _import(self, node: ast.Import | ast.ImportFrom, place: Place) -> None:
        for alias in node.names:
            if isinstance(node, ast.Import):
                path = alias.name
                local = alias.asname or path.split(".")[0]
                meaning: Names = (path if alias.asname else local,)
            else:
                path = f"{node.module}.{alias.name}"
                local, meaning = alias.asname or alias.name, (path,)
            root = path.split(".")[0]
            if root == PACKAGE:
                place.block.uses.append(Use((path,), self._by(place), How.IMPORT))
            elif root == self.source.name and isinstance(node, ast.ImportFrom):
                meaning = self.source.attribute(node.module or "", alias.name)
                probe = self.source.probe(path)
                if probe is not None:
                    self.probes[local] = probe
            place.scope[local] = meaning if root in (PACKAGE, self.source.name) else ()

    def _define(self, node: Function, place: Place) -> None:
        for expression in (*node.decorator_list, *node.args.defaults, *node.args.kw_defaults):
            if expression is not None:
                self._expression(expression, place)
        qualified = f"{place.path}.{node.name}".lstrip(".")
        place.scope[node.name] = (f"{self.name}.{qualified}",) if not place.cls else ()
        # The scope is shared, so that names bound further down are known.
        inner = Place(place.scope, place.block, qualified, place.cls, qualified)
        self._later.append((node, inner))

    def _read_function(self, node: Function | ast.Lambda, place: Place) -> None:
        inner = Place(dict(place.scope), place.block, place.path, place.cls, place.function)
        arguments = node.args
        parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        starred = [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
        for parameter in parameters:
            inner.scope[parameter.arg] = self._resolve_annotation(parameter.annotation, inner)
        for parameter in starred:
            inner.scope[parameter.arg] = ()
        is_method = place.cls and place.path.rpartition(".")[0] == place.cls
        if is_method and parameters and parameters[0].arg in ("self", "cls"):
            inner.scope[parameters[0].arg] = (f"{self.name}.{place.cls}",)
        if isinstance(node, ast.Lambda):
            self._expression(node.body, inner)
            return
        returned = self._resolve_annotation(node.returns, inner)
        self._read(node.body, inner)
        if returned:
            self.returns[place.function] = returned

    def _class(self, node: ast.ClassDef, place: Place) -> None:
        for expression in (*node.bases, *node.decorator_list):
            self._expression(expression, place)
        qualified = f"{place.path}.{node.name}".lstrip(".")
        bases = tuple(name for base in node.bases for name in self._resolve(base, place))
        self.classes[qualified] = (node, bases)
        place.scope[node.name] = (f"{self.name}.{qualified}",)
        inner = Place(dict(place.scope), place.block, qualified, qualified)
        theirs = self.source.bases(f"{self.name}.{qualified}")
        for name in class_members(node) if theirs else ():
            names = tuple(f"{base}.{name}" for base in theirs)
            by = f"{self.label} {qualified}.{name}"
            place.block.uses.append(Use(names, by, How.OVERRIDE, optional=True))
        self._read(node.body, inner)

    def _assign(self, node: ast.Assign | ast.AnnAssign, place: Place) -> None:
        if node.value is None:
            return
        self._expression(node.value, place)
        value = self._resolve(node.value, place)
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            if isinstance(target, ast.Name):
                place.scope[target.id] = value
                if not place.function and self._is_probe(node.value, place):
                    self.probes[target.id] = (self._test(node.value, place),)
            else:
                self._compound(target, place)

    # Expressions

    def _expression(self, node: ast.expr, place: Place) -> None:
        """Note what an expression needs of vLLM."""
        if isinstance(node, ast.Call):
            self._call(node, place)
        elif isinstance(node, ast.Name | ast.Attribute):
            self._use(node, How.READ, None, place)
        elif isinstance(node, ast.IfExp) and self._is_probe(node.test, place):
            self._expression(node.test, place)
            blocks = [Block(), Block()]
            for part, block in zip((node.body, node.orelse), blocks, strict=True):
                self._expression(part, place.within(block))
            place.block.choices.append(Choice(blocks, self._test(node.test, place)))
        elif isinstance(node, ast.Lambda):
            self._later.append((node, place))
        elif isinstance(node, _COMPREHENSION):
            inner = place.within(place.block)
            for generator in node.generators:
                self._compound(generator, inner)
            parts = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
            for part in parts:
                self._expression(part, inner)
        elif isinstance(node, ast.Constant):
            text = node.value if isinstance(node.value, str) else ""
            if self.names_in_strings and re.fullmatch(r"vllm(\.\w+)+", text):
                use = Use((text,), self._by(place), How.IMPORT, optional=True)
                place.block.uses.append(use)
        else:
            self._compound(node, place)

    def _call(self, node: ast.Call, place: Place) -> None:
        function = node.func
        if isinstance(function, ast.Subscript):  # a Triton kernel and its grid
            self._expression(function.slice, place)
            function = function.value
        starred = any(isinstance(argument, ast.Starred) for argument in node.args)
        keywords = tuple(keyword.arg for keyword in node.keywords if keyword.arg)
        shape = Call(len(node.args), keywords, starred or len(keywords) < len(node.keywords))
        if isinstance(function, ast.Name | ast.Attribute):
            self._use(function, How.CALL, shape, place)
        else:
            self._expression(function, place)
        imported = _last_name(function) == "import_module" and _constant(node.args)
        if imported and imported.split(".")[0] == PACKAGE:
            place.block.uses.append(Use((imported,), self._by(place), How.IMPORT))
            return
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            self._expression(argument, place)

    def _use(
        self, node: ast.Name | ast.Attribute, how: How, call: Call | None, place: Place
    ) -> None:
        names = self._resolve(node, place)
        theirs = tuple(filter(_is_vllms, names))
        # A result by itself is no need: what is called, and what is taken from a result, is.
        if theirs and not (how is How.READ and theirs[0].endswith("()")):
            cls, _, method = place.path.rpartition(".")
            extended = {f"{base}.{method}" for base in self._bases(place) if cls == place.cls}
            hook = how is How.CALL and extended.issuperset(theirs)
            use = Use(theirs, self._by(place), how, call, optional="" in names, hook=hook)
            place.block.uses.append(use)
        inner: ast.expr = node
        while isinstance(inner, ast.Attribute):
            inner = inner.value
        if not isinstance(inner, ast.Name):
            self._expression(inner, place)

    def _resolve(self, node: ast.expr, place: Place) -> Names:
        """What an expression may mean: dotted names of vLLM's and of ours; none if unknown."""
        if isinstance(node, ast.Name):
            return place.scope.get(node.id, ())
        if isinstance(node, ast.Attribute):
            bases = self._resolve(node.value, place)
            return _united(*(self._attribute(base, node.attr) for base in bases))
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id == "super" and place.cls:
                return self._bases(place)
            if _last_name(node.func) == "import_module":
                imported = _constant(node.args)
                return (imported,) if imported and _is_vllms(imported) else ()
            called = self._resolve(node.func, place)
            return _united(*(self._result(name) for name in called))
        if isinstance(node, ast.IfExp):
            return _united(self._resolve(node.body, place), self._resolve(node.orelse, place))
        if isinstance(node, ast.NamedExpr | ast.Await):
            return self._resolve(node.value, place)
        return ()

    def _attribute(self, base: str, name: str) -> Names:
        if self.source.is_ours(base):
            return self.source.attribute(base, name)
        return (f"{base}.{name}",) if base else ("",)

    def _result(self, called: str) -> Names:
        """What a call of `called` gives."""
        if not self.source.is_ours(called):
            return (f"{called}()",) if called else ("",)
        found = self.source.home_of(called)
        if found is None:
            return ()
        home, rest = found
        return (called,) if rest in home.classes else home.returns.get(rest, ())

    def _bases(self, place: Place) -> Names:
        """vLLM's bases of the class that the reader is in."""
        return self.source.bases(f"{self.name}.{place.cls}") if place.cls else ()

    def _resolve_annotation(self, node: ast.expr | None, place: Place) -> Names:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node = ast.parse(node.value, mode="eval").body
        if isinstance(node, ast.BinOp):
            sides = (self._resolve_annotation(side, place) for side in (node.left, node.right))
            return _united(*sides)
        return self._resolve(node, place) if isinstance(node, ast.Name | ast.Attribute) else ()

    # Conditions

    def _is_probe(self, test: ast.expr, place: Place) -> bool:
        if _mentions(test, PROBES):
            return True
        parts = (node for node in ast.walk(test) if isinstance(node, ast.Name | ast.Attribute))
        return any(self._named_probe(part, place) is not None for part in parts)

    def _named_probe(
        self, node: ast.Name | ast.Attribute, place: Place
    ) -> tuple[Test | None] | None:
        if isinstance(node, ast.Name):
            return self.probes.get(node.id)
        for base in self._resolve(node.value, place):
            home = self.source.module(base) if self.source.is_ours(base) else None
            if home is not None and node.attr in home.probes:
                return home.probes[node.attr]
        return None

    def _test(self, test: ast.expr, place: Place) -> Test | None:
        """A condition as a question to a release, where source alone can answer it."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self._test(test.operand, place)
            return inner and (lambda tree: None if (yes := inner(tree)) is None else not yes)
        if isinstance(test, ast.Name | ast.Attribute):
            if _last_name(test) == "TYPE_CHECKING":
                return lambda tree: False
            named = self._named_probe(test, place)
            return named[0] if named else None
        if not isinstance(test, ast.Call):
            return None
        asked, last = _last_name(test.func), _constant(test.args[-1:])
        if asked == "within" and last is not None:
            return lambda tree: tree.within(last)
        if asked == "find_spec" and last is not None and _is_vllms(last):
            return lambda tree: tree.find(last) is not None
        if asked == "hasattr" and last is not None:
            names = tuple(filter(_is_vllms, self._resolve(test.args[0], place)))
            if names:
                return lambda tree: any(tree.find(f"{name}.{last}") for name in names)
        return None

    def _by(self, place: Place) -> str:
        return f"{self.label} {place.path}".strip()


def _is_vllms(name: str) -> bool:
    return name.split(".")[0] == PACKAGE


def _united(*groups: Names) -> Names:
    return tuple(dict.fromkeys(name for group in groups for name in group))


def _merge(scope: Scope, branches: list[Scope]) -> None:
    """After a branching, a name means whatever it means after any of the branches."""
    for name in dict.fromkeys(name for branch in branches for name in branch):
        meanings = [branch[name] for branch in branches if name in branch]
        scope[name] = _united(*meanings)
        if scope[name] and not all(meanings):
            scope[name] = _united(scope[name], ("",))


def _mentions(node: ast.expr, names: set[str]) -> bool:
    return any(_last_name(part) in names for part in ast.walk(node))


def _last_name(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else None


def _constant(arguments: list[ast.expr]) -> str | None:
    values = [argument.value for argument in arguments[:1] if isinstance(argument, ast.Constant)]
    return values[0] if values and isinstance(values[0], str) else None


def _ends(body: list[ast.stmt], how: type[ast.stmt]) -> bool:
    return bool(body) and isinstance(body[-1], how)


def _survives_a_missing_name(node: ast.Try) -> bool:
    caught = (ast.walk(handler.type) for handler in node.handlers if handler.type)
    return any(_last_name(part) in _MISSING_NAME for names in caught for part in names)


def _stored(node: ast.AST) -> Iterator[str]:
    """Names that a loop, a with or a handler binds, itself and not its body."""
    parts = [getattr(node, part, None) for part in ("target", "optional_vars")]
    for part in filter(None, parts):
        yield from (name.id for name in ast.walk(part) if isinstance(name, ast.Name))

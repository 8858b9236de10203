# SPDX-License-Identifier: Apache-2.0
"""What moved between two releases of vLLM, for each symbol that the plugin needs.

Breaking: a symbol is gone; a parameter that somebody passes is gone, replaced, moved, or a new one
is required; a class has other bases, another constructor or a field less. Where all that the plugin
does with a function is to call it, those calls decide. Behavioural: the same interface and other
code, docstrings, comments and annotations aside. Of a module only its presence is compared.

A machine can tell that a required symbol is missing, which is the gate, and that a signature moved.
It cannot tell whether the plugin's code for that release copes, whether an override still does what
its caller expects, or what other code means: the contract tests on each pin do, so those are
reported and pass the gate.
"""

import ast
import copy
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

from needs import Block, Call, How, Use
from packaging.requirements import Requirement
from trees import Found, Function, Tree, bindings, decorators

SECTIONS = ("Breaking", "Behavioural", "Dependencies", "Unchanged")
# The dependencies that the plugin's kernels, or the kernels that it replaces, run on.
WATCHED = re.compile(
    r"torch|triton|flashinfer|numpy$|transformers$|compressed-tensors$|tilelang|apache-tvm-ffi$"
    r"|cuda|nvidia-|deep-?gemm|quack-kernels$"
)


@dataclass(frozen=True)
class Line:
    """One symbol of a report: who needs it, and what changed."""

    symbol: str
    by: tuple[str, ...]
    what: str


@dataclass
class Report:
    """What moved from one release to the next, by section."""

    old: str
    new: str
    sections: dict[str, list[Line]] = field(default_factory=lambda: {s: [] for s in SECTIONS})

    def as_json(self) -> dict[str, object]:
        lines = {name.lower(): [asdict(line) for line in self.sections[name]] for name in SECTIONS}
        return {"from": self.old, "to": self.new, **lines}


def missing(tree: Tree, needed: Block, older: Iterable[Tree] = ()) -> list[Line]:
    """The gate: what a release must have and has not, and hooks of older ones that it dropped."""
    by_symbol: dict[str, list[str]] = {}
    for use in needed.missing(tree, older):
        by_symbol.setdefault(" or ".join(use.names), []).append(use.by)
    return [Line(symbol, _unique(by), "missing") for symbol, by in sorted(by_symbol.items())]


def compare(old: Tree, new: Tree, needed_of_old: Block, needed_of_new: Block) -> Report:
    """The upgrade report from one release to another."""
    report = Report(str(old.version), str(new.version))
    lacking = set(needed_of_new.missing(new, [old]))
    found: dict[tuple[str, str], tuple[Found | None, Found | None, list[Use]]] = {}
    for use in dict.fromkeys([*needed_of_old.all_uses(), *needed_of_new.all_uses()]):
        before, after = _first(old, use), _first(new, use)
        if before or after or use in lacking:
            names = before.symbol if before else "", after.symbol if after else ""
            names = names if any(names) else (use.names[0], "")
            found.setdefault(names, (before, after, []))[2].append(use)
    for names in sorted(found):
        before, after, uses = found[names]
        section, what = _judge(old, new, before, after, uses)
        if after is None and not lacking.intersection(uses):
            what += ", where it may be missing"
        symbol = " -> ".join(dict.fromkeys(filter(None, names)))
        report.sections[section].append(Line(symbol, _unique(use.by for use in uses), what))
    report.sections["Dependencies"] = list(dependencies(old, new))
    return report


def _first(tree: Tree, use: Use) -> Found | None:
    return next(filter(None, map(tree.find, use.names)), None)


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _judge(
    old: Tree, new: Tree, before: Found | None, after: Found | None, uses: list[Use]
) -> tuple[str, str]:
    if before is None and after is None:
        return "Breaking", f"missing in {old.version} too"
    if after is None:
        return "Breaking", "gone"
    if before is None:
        return "Behavioural", f"new in {new.version}"
    if "outside" in (before.kind, after.kind):
        own = "own" if before.kind == "outside" else "no longer own"
        same = before.kind == after.kind
        return ("Unchanged", "") if same else ("Behavioural", f"now vLLM's {own}")
    if before.kind != after.kind:
        return "Breaking", f"was a {before.kind}, is a {after.kind}"
    breaking: list[str] = []
    other: list[str] = []
    if before.kind == "function":
        breaking, other = _signatures(parameters(before), parameters(after), uses)
    elif before.kind == "class":
        breaking, other = _classes(old, new, before, after, uses)
    holders = [side.owner and side.owner.node for side in (before, after)]
    names = [holder.name for holder in holders if isinstance(holder, ast.ClassDef)]
    if len(set(names)) > 1:
        inherited = names[1] != after.symbol.split(".")[-2]
        words = f"was of class {names[0]}, is of {names[1]}"
        (breaking if inherited else other).append(words)
    other += _bodies(before, after)
    section = "Breaking" if breaking else "Behavioural" if other else "Unchanged"
    if before.module != after.module:
        other.append(f"now in {after.module}, was in {before.module}")
    return section, "; ".join([*breaking, *other])


# Functions


@dataclass(frozen=True)
class Parameter:
    """One parameter: its kind is "positional", "keyword", "*" or "**"."""

    name: str
    kind: str
    default: str | None

    @property
    def required(self) -> bool:
        return self.default is None and self.kind in ("positional", "keyword")


def parameters(found: Found) -> list[Parameter]:
    """The parameters of a function, of a method without self or cls."""
    assert isinstance(found.node, Function)
    arguments = found.node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    no_default = [None] * (len(positional) - len(arguments.defaults))
    pairs = list(zip(positional, [*no_default, *arguments.defaults], strict=True))
    if found.owner is not None and not found.is_static:
        pairs = pairs[1:]
    result = [_parameter(argument, "positional", default) for argument, default in pairs]
    if arguments.vararg:
        result.append(Parameter(arguments.vararg.arg, "*", None))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        result.append(_parameter(argument, "keyword", default))
    if arguments.kwarg:
        result.append(Parameter(arguments.kwarg.arg, "**", None))
    return result


def _parameter(argument: ast.arg, kind: str, default: ast.expr | None) -> Parameter:
    return Parameter(argument.arg, kind, None if default is None else ast.unparse(default))


def _signatures(
    old: list[Parameter], new: list[Parameter], uses: list[Use]
) -> tuple[list[str], list[str]]:
    """What changed between two lists of parameters, breaking and other."""
    breaking, other = _all_changes(old, new)
    calls = [use.call for use in uses if use.how is How.CALL]
    only_called = calls and all(use.how in (How.CALL, How.IMPORT) for use in uses)
    if not only_called or any(call is None or call.open for call in calls):
        return breaking, other
    worse = [why for call in calls if call and (why := _breaks(call, old, new))]
    return list(_unique(worse)), [*breaking, *other]


def _all_changes(old: list[Parameter], new: list[Parameter]) -> tuple[list[str], list[str]]:
    was, now = ({parameter.name: parameter for parameter in side} for side in (old, new))
    gone = [name for name in was if name not in now]
    added = [name for name in now if name not in was]
    replaced = {
        before.name: after.name
        for before, after in zip(old, new, strict=False)
        if before.kind == after.kind and before.name in gone and after.name in added
    }
    breaking = [f"parameter {before} replaced by {after}" for before, after in replaced.items()]
    breaking += [f"parameter {_shown(was[name])} gone" for name in gone if name not in replaced]
    other = []
    for name in added:
        if name in replaced.values():
            continue
        if now[name].required:
            breaking.append(f"new required parameter {name}")
        else:
            other.append(f"parameter {_shown(now[name])} added")
    for name in (name for name in was if name in now):
        before, after = was[name], now[name]
        if before.kind != after.kind:
            wider = (before.kind, after.kind) == ("keyword", "positional")
            words = f"parameter {name} was {before.kind}, is {after.kind}"
            (other if wider else breaking).append(words)
        if before.default != after.default:
            words = f"parameter {name}: default was {before.default}, is {after.default}"
            (breaking if after.required and not before.required else other).append(words)
    places = [[p.name for p in side if p.kind == "positional"] for side in (old, new)]
    moved = [
        name
        for name in places[0]
        if name in places[1] and places[0].index(name) != places[1].index(name)
    ]
    # Behind a parameter that is gone all others move up: that one is the news.
    if moved and not set(gone) - set(replaced):
        breaking.append(f"positional parameters moved: {', '.join(moved)}")
    return breaking, other


def _shown(parameter: Parameter) -> str:
    prefix = parameter.kind if parameter.kind in ("*", "**") else ""
    default = "" if parameter.default is None else f"={parameter.default}"
    return f"{prefix}{parameter.name}{default}"


def _breaks(call: Call, old: list[Parameter], new: list[Parameter]) -> str | None:
    """Why a call of ours means something else than before; none where it has not fitted before."""
    before, after = bound(call, old), bound(call, new)
    if isinstance(before, str) or before == after:
        return None
    if isinstance(after, str):
        return f"our call does not fit: {after}"
    swapped = [f"{a} to {b}" for a, b in zip(before, after, strict=False) if a != b]
    return f"our arguments change their meaning: {', '.join(swapped)}"


def bound(call: Call, to: list[Parameter]) -> list[str] | str:
    """The parameters that a call's positional arguments go to, or why it does not fit."""
    positional = [parameter.name for parameter in to if parameter.kind == "positional"]
    star = any(parameter.kind == "*" for parameter in to)
    if call.positional > len(positional) and not star:
        return f"{call.positional} positional arguments for {len(positional)}"
    taken = positional[: call.positional]
    twice = [name for name in call.keywords if name in taken]
    if twice:
        return f"two arguments for {', '.join(twice)}"
    named = {parameter.name for parameter in to if parameter.kind in ("positional", "keyword")}
    if not any(parameter.kind == "**" for parameter in to):
        unknown = [name for name in call.keywords if name not in named]
        if unknown:
            return f"no parameter {', '.join(unknown)}"
    given = {*taken, *call.keywords}
    absent = [
        parameter.name for parameter in to if parameter.required and parameter.name not in given
    ]
    return f"no argument for {', '.join(absent)}" if absent else taken


# Classes


def _classes(
    old: Tree, new: Tree, before: Found, after: Found, uses: list[Use]
) -> tuple[list[str], list[str]]:
    assert isinstance(before.node, ast.ClassDef) and isinstance(after.node, ast.ClassDef)
    breaking: list[str] = []
    other: list[str] = []
    was, now = (", ".join(map(ast.unparse, node.bases)) for node in (before.node, after.node))
    if was != now:
        breaking.append(f"bases were ({was}), are ({now})")
    # What became a method or a property is still there.
    breaking += [
        f"field {name} gone"
        for name in _fields(old, before)
        if new.find(f"{after.symbol}.{name}") is None
    ]
    makers = [tree.find(f"{side.symbol}.__init__") for tree, side in ((old, before), (new, after))]
    lists = [parameters(maker) for maker in makers if maker is not None and maker.is_function]
    if len(lists) == 2:
        worse, milder = _signatures(lists[0], lists[1], uses)
        breaking += [f"__init__: {what}" for what in worse]
        other += [f"__init__: {what}" for what in milder]
    return breaking, other


def _fields(tree: Tree, found: Found) -> list[str]:
    """The fields of a dataclass, or the members of an enum and other values of the class body."""
    assert isinstance(found.node, ast.ClassDef)
    return list(_unique([*tree.fields(found), *_values(found.node)]))


def _values(node: ast.ClassDef) -> list[str]:
    bound = bindings(node.body).items()
    return [name for name, by in bound if isinstance(by[0], ast.Assign | ast.AnnAssign)]


# Bodies


def _bodies(before: Found, after: Found) -> list[str]:
    """In words, what differs in code."""
    if before.node is None or after.node is None or before.kind == "module":
        return []
    if not isinstance(before.node, ast.ClassDef) or not isinstance(after.node, ast.ClassDef):
        same = _code(before.node) == _code(after.node)
        return [] if same else ["another body" if before.kind == "function" else "another value"]
    was, now = (dict(_parts(node)) for node in (before.node, after.node))
    values = _values(before.node)
    words = {
        "other": [name for name in was if name in now and was[name] != now[name]],
        "new": [name for name in now if name not in was],
        "gone": [name for name in was if name not in now and name not in values],
    }
    return [f"{word}: {', '.join(names)}" for word, names in words.items() if names]


def _parts(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """What the body of a class binds, and the code of each; a decorator is a part by its name."""
    for name, (statement, *_) in bindings(node.body).items():
        definition = isinstance(statement, Function | ast.ClassDef)
        yield name, _dump(statement) if definition else "".join(_code(statement))
    yield from ((f"@{name}", "") for name in decorators(node))


def _code(node: ast.AST) -> list[str]:
    """What a definition does, apart from its name and its parameters."""
    if isinstance(node, Function):
        return [_dump(part) for part in (*node.decorator_list, *_without_docstring(node.body))]
    value = getattr(node, "value", None)
    return [_dump(value)] if isinstance(value, ast.AST) else []


def _dump(node: ast.AST) -> str:
    return ast.dump(_Bare().visit(copy.deepcopy(node)))


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0].value if isinstance(body[0], ast.Expr) else None
    is_text = isinstance(first, ast.Constant) and isinstance(first.value, str)
    return body[1:] if is_text else body


class _Bare(ast.NodeTransformer):
    """Takes docstrings and annotations off."""

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, Function | ast.ClassDef):
            node.body = _without_docstring(node.body)
        if isinstance(node, Function):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
        return self.generic_visit(node)


# Dependencies


def dependencies(old: Tree, new: Tree) -> Iterator[Line]:
    """What the wheels ask for, of `WATCHED` and of Python."""
    was, now = requirements(old), requirements(new)
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            what = f"was {was.get(name, 'not required')}, is {now.get(name, 'not required')}"
            yield Line(name, (), what)


def requirements(tree: Tree) -> dict[str, str]:
    """By name, what a wheel asks for outside its extras."""
    asked: dict[str, str] = {}
    for line in tree.metadata:
        label, _, value = line.partition(": ")
        if label == "Requires-Python":
            asked["Python"] = value.strip()
        if label != "Requires-Dist":
            continue
        requirement = Requirement(value)
        name = requirement.name.lower().replace("_", "-")
        extra = requirement.marker is not None and "extra" in str(requirement.marker)
        if WATCHED.match(name) and not extra:
            marker = f"; {requirement.marker}" if requirement.marker else ""
            versions = f"{requirement.specifier or 'any version'}{marker}"
            asked[name] = ", ".join(filter(None, (asked.get(name), versions)))
    return asked

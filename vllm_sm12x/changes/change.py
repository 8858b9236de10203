# SPDX-License-Identifier: Apache-2.0
"""The one mechanism by which the plugin changes vLLM: a row that applies, proves itself, undoes.

Standard library only at import: `plugin.platform()` runs while vLLM is half imported.
"""

import enum
import functools
import importlib
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

from packaging.version import Version

from vllm_sm12x import device, knobs
from vllm_sm12x.log import get_logger
from vllm_sm12x.vllm_api import version as vllm_version

logger = get_logger(__name__)


class Kind(enum.IntEnum):
    """How deep a change reaches into vLLM, gentlest first."""

    REGISTER = 1
    SUBCLASS = 2
    WRAP = 3
    REPLACE = 4


class Phase(enum.Enum):
    """When a row applies."""

    REGISTER = "register"  # in every process, as vLLM loads its plugins: cheap
    WORKER = "worker"  # in a GPU worker, before the model is built: may import the model's module


class State(enum.Enum):
    """What became of a row in this process."""

    ACTIVE = "active"
    OFF = "off"
    NOT_NEEDED = "not needed"
    NOT_FOR_DEVICE = "not for this device"
    NOT_FOR_VLLM = "not for this vLLM"
    DRIFTED = "drifted"
    FAILED = "failed"


class Verdict(NamedTuple):
    """Yes or no, and why, in words."""

    yes: bool
    reason: str


@dataclass(frozen=True)
class Context:
    """What decides whether the plugin does anything in this process."""

    device: device.Device | device.NoDevice
    capability: tuple[int, int] | None  # after VLLM_SM12X_ASSUME
    switch: bool | None  # VLLM_TRITON_MLA_SPARSE
    assumed: bool
    vllm: Version | None

    @classmethod
    def detect(cls) -> "Context":
        """Raises KnobError."""
        found = device.first_visible_device()
        return cls(
            device=found,
            capability=device.effective_capability(found),
            switch=knobs.get("VLLM_TRITON_MLA_SPARSE"),
            assumed=knobs.get("VLLM_SM12X_ASSUME") is not None,
            vllm=vllm_version.installed(),
        )

    @property
    def for_device(self) -> Verdict:
        """Whether the plugin is wanted on this GPU. An inert plugin leaves vLLM as it is."""
        if isinstance(self.device, device.NoDevice) or self.capability is None:
            return Verdict(False, getattr(self.device, "reason", "no GPU"))
        name, own = self.device.name, _sm(self.device.capability)
        if self.device.capability < device.MINIMUM_CAPABILITY:
            needed = _sm(device.MINIMUM_CAPABILITY)
            return Verdict(False, f"{name} is {own}; the kernels need {needed} or later")
        if self.capability[0] == 12:
            by = " by VLLM_SM12X_ASSUME" if self.assumed else ""
            return Verdict(True, f"{name} is {_sm(self.capability)}{by}")
        if self.switch:
            return Verdict(True, f"{name} is {own}, forced by VLLM_TRITON_MLA_SPARSE=1")
        return Verdict(False, f"{name} is {own}, not SM 12.x")

    @property
    def for_vllm(self) -> Verdict:
        """Whether the plugin works with this vLLM."""
        if vllm_version.supported(self.vllm):
            return Verdict(True, f"vLLM {self.vllm}")
        found = f"vLLM {self.vllm}" if self.vllm else "no vLLM"
        needed = f"vllm-sm12x needs {vllm_version.SUPPORTED}: install vllm=={vllm_version.PINS[-1]}"
        return Verdict(False, f"{found} is installed, and {needed}")

    @property
    def untested(self) -> str | None:
        """What a user of a supported vLLM should know that no pin is like; else None."""
        what = vllm_version.beyond_pins(self.vllm)
        if what is None:
            return None
        return (
            f"vLLM {self.vllm} {what}: each change is on where it proves itself and off where vLLM "
            "has moved; look with `vllm-sm12x doctor`, or install "
            f"vllm=={vllm_version.PINS[-1]}."
        )

    @property
    def active(self) -> bool:
        return self.for_device.yes and self.for_vllm.yes

    @property
    def demanded(self) -> bool:
        """The user asked for the SM12x path by a variable, so silence would be wrong."""
        return bool(self.switch) or self.assumed


def _sm(capability: tuple[int, int]) -> str:
    major, minor = capability
    return f"SM {major}.{minor}"


def _always(context: Context) -> Verdict:
    return Verdict(True, "")


@dataclass(frozen=True, kw_only=True)
class Change:
    """One thing that the plugin changes in vLLM.

    `apply` registers on the ExitStack how to undo each step as it takes it. `check` looks at
    vLLM, not at what `apply` believes it did.
    """

    name: str  # stable: VLLM_SM12X_OFF takes it
    kind: Kind
    phase: Phase
    what: str
    why: str  # the symptom without it
    upstream: str  # an issue or pull request, or why there is none
    touches: tuple[str, ...]  # dotted vLLM symbols; a missing one means drifted
    apply: Callable[[Context, ExitStack], None]
    check: Callable[[Context], Verdict]
    retire: str  # the observable event after which this row can go
    vllm: str = ""  # PEP 440 range inside the supported one; "" is all of it
    wanted: Callable[[Context], Verdict] = _always  # do the user's settings leave it on?
    needed: Callable[[Context], Verdict] = _always  # does this vLLM lack it?
    requires: tuple[str, ...] = ()  # rows without which this one has no effect
    speed_only: bool = False  # the model runs without it, and with the same result


@dataclass(frozen=True)
class Outcome:
    """A row's state in this process, and the evidence or the reason."""

    change: Change
    state: State
    detail: str


class Applied:
    """Applies rows once per process, remembers what came of them, and can undo them."""

    def __init__(self, rows: Sequence[Change]) -> None:
        self._rows = tuple(rows)
        self._outcomes: dict[str, Outcome] = {}
        self._undo = ExitStack()
        self._lock = threading.RLock()

    def apply_all(self, phase: Phase, context: Context | None = None) -> tuple[Outcome, ...]:
        """Settle every row of `phase` that is not settled yet, in order.

        Raises KnobError when VLLM_SM12X_OFF names no row. A row that fails is undone, logged as
        an error, and does not stop the others.
        """
        with self._lock:
            off = self._switched_off()
            context = context or Context.detect()
            for row in self._rows:
                if row.phase is phase and row.name not in self._outcomes:
                    outcome = self._settle(row, context, off)
                    self._outcomes[row.name] = outcome
                    if outcome.state in (State.DRIFTED, State.FAILED):
                        logger.error("%s is %s: %s", row.name, outcome.state.value, outcome.detail)
            return self.report()

    def undo_all(self) -> None:
        """Give vLLM back everything, last change first."""
        with self._lock:
            self._undo.close()
            self._outcomes.clear()

    def report(self) -> tuple[Outcome, ...]:
        """What is settled so far, in table order."""
        return tuple(self._outcomes[row.name] for row in self._rows if row.name in self._outcomes)

    def state_of(self, name: str) -> State | None:
        """The state of the row `name`, None if its phase has not come yet."""
        outcome = self._outcomes.get(name)
        return None if outcome is None else outcome.state

    def _switched_off(self) -> tuple[str, ...]:
        names = [row.name for row in self._rows]
        off = knobs.get("VLLM_SM12X_OFF")
        for name in off:
            if name not in names:
                raise knobs.KnobError(
                    f"VLLM_SM12X_OFF={','.join(off)!r} is not valid: no change is called {name!r}"
                    f"{knobs.did_you_mean(name, names)}; allowed is {', '.join(names)}."
                )
        return off

    def _settle(self, row: Change, context: Context, off: tuple[str, ...]) -> Outcome:
        if not context.for_vllm.yes:
            return Outcome(row, State.NOT_FOR_VLLM, context.for_vllm.reason)
        if not vllm_version.within(context.vllm, row.vllm):
            return Outcome(row, State.NOT_FOR_VLLM, f"vLLM {context.vllm} is outside {row.vllm}")
        if not context.for_device.yes:
            return Outcome(row, State.NOT_FOR_DEVICE, context.for_device.reason)
        if row.name in off:
            return Outcome(row, State.OFF, "VLLM_SM12X_OFF names it")
        wanted = row.wanted(context)
        if not wanted.yes:
            return Outcome(row, State.OFF, wanted.reason)
        for name in row.requires:
            if self.state_of(name) is not State.ACTIVE:
                return Outcome(row, State.OFF, f"{name}, which it requires, is not active")
        try:
            for symbol in row.touches:
                if not _exists(symbol):
                    return Outcome(row, State.DRIFTED, f"vLLM {context.vllm} has no {symbol}")
            needed = row.needed(context)
            if not needed.yes:
                return Outcome(row, State.NOT_NEEDED, needed.reason)
            with ExitStack() as undo:
                row.apply(context, undo)
                evidence = row.check(context)
                if evidence.yes:
                    self._undo.callback(undo.pop_all().close)
            state = State.ACTIVE if evidence.yes else State.FAILED
            return Outcome(row, state, evidence.reason)
        except Exception as error:
            logger.debug("%s failed", row.name, exc_info=True)
            return Outcome(row, State.FAILED, f"{type(error).__name__}: {error}")


def _exists(symbol: str) -> bool:
    """Whether a dotted name leads to something: a module's path, then attributes."""
    parts = symbol.split(".")
    for depth in range(len(parts), 0, -1):
        module_name = ".".join(parts[:depth])
        try:
            target: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise  # the module is there, and something that it imports is not
            continue
        missing = object()
        for part in parts[depth:]:
            target = getattr(target, part, missing)
            if target is missing:
                return False
        return True
    return False


def wrap(
    undo: ExitStack, owner: Any, attribute: str, name: str, around: Callable[..., Any]
) -> None:
    """Put `around(original, *args, **kwargs)` in place of `owner.attribute`, its own or inherited.

    The wrapper carries `__sm12x__ = name`, so that it can be recognised and taken off again.
    Raises RuntimeError when undone under somebody else's later wrapper.
    """
    inherited = attribute not in vars(owner)
    original = getattr(owner, attribute) if inherited else vars(owner)[attribute]

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    wrapper.__sm12x__ = name  # type: ignore[attr-defined]
    setattr(owner, attribute, wrapper)

    def restore() -> None:
        if vars(owner)[attribute] is not wrapper:
            raise RuntimeError(f"{owner!r}.{attribute} was changed again after {name}")
        if inherited:
            delattr(owner, attribute)
        else:
            setattr(owner, attribute, original)

    undo.callback(restore)


def wrapped_by(target: Any) -> str | None:
    """The name of the change whose wrapper `target` is."""
    return getattr(target, "__sm12x__", None)

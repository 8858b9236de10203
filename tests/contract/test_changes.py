# SPDX-License-Identifier: Apache-2.0
"""The table of changes, and the mechanism that applies, proves and undoes a row."""

import logging
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from packaging.version import Version

from vllm_sm12x import device, knobs, log, plugin
from vllm_sm12x.changes import CHANGES
from vllm_sm12x.changes.change import (
    Applied,
    Change,
    Context,
    Kind,
    Phase,
    State,
    Verdict,
    wrap,
    wrapped_by,
)
from vllm_sm12x.device import Device, NoDevice

ROOT = Path(__file__).parents[2]
SM120 = Device("NVIDIA RTX PRO 6000", (12, 0), 96 * 2**30, "580.95")
SM90 = Device("NVIDIA H200", (9, 0), 141 * 2**30, "580.95")
SM80 = Device("NVIDIA A100", (8, 0), 80 * 2**30, "580.95")
SM75 = Device("NVIDIA T4", (7, 5), 16 * 2**30, "580.95")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for knob in knobs.KNOBS:
        monkeypatch.delenv(knob.name, raising=False)
    log.once.cache_clear()


def context(found=SM120, *, switch=None, assumed=None, vllm="0.26.0"):
    capability = None if isinstance(found, NoDevice) else assumed or found.capability
    return Context(
        device=found,
        capability=capability,
        switch=switch,
        assumed=assumed is not None,
        vllm=Version(vllm) if vllm else None,
    )


@pytest.fixture
def library(monkeypatch):
    """An importable module `stand_in` in vLLM's place."""
    module = ModuleType("stand_in")
    module.answer = lambda: 42
    module.table = {}
    monkeypatch.setitem(sys.modules, "stand_in", module)
    return module


def row(name="row", *, apply=lambda context, undo: None, check=None, **fields):
    return Change(
        **{
            "name": name,
            "kind": Kind.REGISTER,
            "phase": Phase.REGISTER,
            "what": "",
            "why": "",
            "upstream": "",
            "touches": (),
            "apply": apply,
            "check": check or (lambda context: Verdict(True, "seen")),
            "retire": "",
            **fields,
        }
    )


def settle(*rows, given=None):
    applied = Applied(rows)
    applied.apply_all(Phase.REGISTER, given or context())
    return applied


def outcomes(applied):
    return {outcome.change.name: (outcome.state, outcome.detail) for outcome in applied.report()}


class TestTable:
    def test_names_are_unique(self):
        names = [change.name for change in CHANGES]
        assert len(set(names)) == len(names)

    def test_no_two_rows_touch_the_same_symbol(self):
        touched = [symbol for change in CHANGES for symbol in change.touches]
        assert len(set(touched)) == len(touched)

    def test_what_is_required_comes_before(self):
        for index, change in enumerate(CHANGES):
            earlier = {other.name for other in CHANGES[:index]}
            assert set(change.requires) <= earlier

    def test_budget_of_deep_changes(self):
        """Raise a number only with a reason: each of these can break with any vLLM release."""
        kinds = [change.kind for change in CHANGES]
        # Four for DeepSeek V4; one reads ahead, and needs the loader's progress; one answers a
        # GEMM's question; graph_warm_up: vLLM #39483 is open, with no hook; moe.marlin: vLLM has no
        # order of backends to set; attention.token_to_request: three kinds of builders ask, of
        # which the compressor's are vLLM's own, and what they are given is no class of ours.
        assert kinds.count(Kind.WRAP) <= 9
        assert kinds.count(Kind.REPLACE) <= 1, "hyper-connections are functions, called by name"

    @pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
    def test_rows_say_everything(self, change):
        assert change.what and change.why and change.upstream and change.retire and change.touches
        assert all(symbol.startswith("vllm.") for symbol in change.touches)


class TestStates:
    def test_active_carries_the_evidence(self):
        assert outcomes(settle(row())) == {"row": (State.ACTIVE, "seen")}

    def test_a_check_that_says_no_is_a_failure_and_is_undone(self, library, caplog):
        def apply(context, undo):
            library.table["key"] = 1
            undo.callback(library.table.pop, "key")

        with caplog.at_level(logging.ERROR, "vllm.sm12x"):
            applied = settle(row(apply=apply, check=lambda context: Verdict(False, "not there")))
        assert outcomes(applied) == {"row": (State.FAILED, "not there")}
        assert library.table == {}
        assert "row is failed: not there" in caplog.text

    def test_an_exception_undoes_that_row_only(self, library, caplog):
        def good(context, undo):
            library.table["good"] = 1
            undo.callback(library.table.pop, "good")

        def bad(context, undo):
            library.table["half"] = 1
            undo.callback(library.table.pop, "half")
            raise OSError("disk on fire")

        with caplog.at_level(logging.ERROR, "vllm.sm12x"):
            applied = settle(row("good", apply=good), row("bad", apply=bad), row("after"))
        assert outcomes(applied)["bad"] == (State.FAILED, "OSError: disk on fire")
        assert outcomes(applied)["after"][0] is State.ACTIVE
        assert library.table == {"good": 1}
        assert "bad is failed: OSError: disk on fire" in caplog.text

    @pytest.mark.parametrize(
        "symbol", ["stand_in.gone", "stand_in.answer.gone", "no_such_module.thing"]
    )
    def test_a_missing_symbol_is_drift_and_nothing_is_applied(self, library, symbol):
        def apply(context, undo):
            raise AssertionError("applied to a vLLM that drifted")

        applied = settle(row(apply=apply, touches=("stand_in.answer", symbol)))
        assert outcomes(applied) == {"row": (State.DRIFTED, f"vLLM 0.26.0 has no {symbol}")}

    def test_a_module_that_fails_to_import_is_not_drift(self, tmp_path, monkeypatch):
        (tmp_path / "half_module.py").write_text("import a_library_that_is_not_installed\n")
        monkeypatch.syspath_prepend(tmp_path)
        state, detail = outcomes(settle(row(touches=("half_module.thing",))))["row"]
        assert state is State.FAILED and "a_library_that_is_not_installed" in detail

    def test_not_needed_and_not_wanted_have_reasons(self):
        applied = settle(
            row("needless", needed=lambda context: Verdict(False, "vLLM has it")),
            row("unwanted", wanted=lambda context: Verdict(False, "X=0")),
        )
        assert outcomes(applied) == {
            "needless": (State.NOT_NEEDED, "vLLM has it"),
            "unwanted": (State.OFF, "X=0"),
        }

    def test_switched_off_by_name(self, monkeypatch):
        monkeypatch.setenv("VLLM_SM12X_OFF", "first")
        applied = settle(row("first"), row("second", requires=("first",)), row("third"))
        assert outcomes(applied)["first"] == (State.OFF, "VLLM_SM12X_OFF names it")
        assert outcomes(applied)["second"][0] is State.OFF
        assert "first" in outcomes(applied)["second"][1]
        assert outcomes(applied)["third"][0] is State.ACTIVE

    def test_switching_off_an_unknown_name_is_an_error(self, monkeypatch):
        monkeypatch.setenv("VLLM_SM12X_OFF", "frist")
        with pytest.raises(knobs.KnobError, match="'frist'; did you mean first; allowed is first"):
            settle(row("first"))

    @pytest.mark.parametrize(
        "given, state, reason",
        [
            (context(SM90), State.NOT_FOR_DEVICE, "NVIDIA H200 is SM 9.0, not SM 12.x"),
            (context(NoDevice("no driver")), State.NOT_FOR_DEVICE, "no driver"),
            (context(SM75, switch=True), State.NOT_FOR_DEVICE, "SM 7.5; the kernels need SM 8.9"),
            (context(SM75, assumed=(12, 0)), State.NOT_FOR_DEVICE, "SM 7.5"),
            (context(SM80, switch=True), State.NOT_FOR_DEVICE, "SM 8.0; the kernels need SM 8.9"),
            (context(vllm="0.22.1"), State.NOT_FOR_VLLM, "vLLM 0.22.1 is installed"),
            (context(vllm=None), State.NOT_FOR_VLLM, "no vLLM is installed"),
            (context(SM90, switch=True), State.ACTIVE, "seen"),
            (context(SM90, assumed=(12, 1)), State.ACTIVE, "seen"),
            (context(vllm="0.23.0"), State.ACTIVE, "seen"),
            (context(vllm="0.26.1rc1.dev1219+g1234"), State.ACTIVE, "seen"),
            (context(vllm="0.99.0"), State.ACTIVE, "seen"),
        ],
    )
    def test_device_and_vllm(self, given, state, reason):
        found, detail = outcomes(settle(row(), given=given))["row"]
        assert found is state and reason in detail

    @pytest.mark.parametrize("versions, state", [("<0.26", "not for this vLLM"), ("", "active")])
    def test_a_rows_own_range(self, versions, state):
        assert outcomes(settle(row(vllm=versions)))["row"][0].value == state


class TestOnce:
    def test_the_second_call_applies_nothing(self, library):
        applied = settle(row(apply=lambda context, undo: library.table.update(n=1)))
        library.table.clear()
        applied.apply_all(Phase.REGISTER, context())
        assert library.table == {}

    def test_threads_apply_once(self, library):
        calls = []
        gate = threading.Barrier(8)
        applied = Applied([row(apply=lambda context, undo: calls.append(1))])

        def enter():
            gate.wait()
            applied.apply_all(Phase.REGISTER, context())

        threads = [threading.Thread(target=enter) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert calls == [1]

    def test_phases_are_apart_and_may_build_on_each_other(self):
        applied = settle(row("early"), row("late", phase=Phase.WORKER, requires=("early",)))
        assert list(outcomes(applied)) == ["early"]
        applied.apply_all(Phase.WORKER, context())
        assert outcomes(applied)["late"][0] is State.ACTIVE

    def test_undo_all_gives_everything_back_and_allows_a_new_start(self, library):
        original = library.answer

        def apply(context, undo):
            wrap(undo, library, "answer", "row", lambda original: original() + 1)

        applied = settle(row(apply=apply))
        assert library.answer() == 43
        applied.undo_all()
        assert library.answer is original
        assert applied.report() == ()
        applied.apply_all(Phase.REGISTER, context())
        assert library.answer() == 43


class TestWrap:
    def test_arguments_and_name_pass_through(self, library):
        def original(a, *rest, key=None, **others):
            """Original words."""
            return a, rest, key, others

        library.call = original

        def apply(context, undo):
            wrap(undo, library, "call", "row", lambda f, *args, **kwargs: f(*args, **kwargs))

        settle(row(apply=apply))
        assert library.call(1, 2, key=3, more=4) == (1, (2,), 3, {"more": 4})
        assert library.call.__doc__ == "Original words."
        assert wrapped_by(library.call) == "row"
        assert wrapped_by(original) is None

    def test_undo_refuses_to_drop_a_later_wrapper(self, library):
        def apply(context, undo):
            wrap(undo, library, "answer", "row", lambda original: original())

        applied = settle(row(apply=apply))
        library.answer = lambda: 0
        with pytest.raises(RuntimeError, match=r"answer was changed again after row"):
            applied.undo_all()


class TestEntryPoints:
    """`plugin.platform` and `plugin.register` by GPU, vLLM and settings, with vLLM untouched."""

    @pytest.fixture
    def machine(self, monkeypatch):
        """Call with a device and a vLLM version to have them found; records what is applied."""
        applied = []
        monkeypatch.setattr(plugin, "apply_all", lambda *args: applied.append(args) or ())

        def found(gpu, vllm="0.26.0"):
            monkeypatch.setattr(device, "first_visible_device", lambda: gpu)
            version = "vllm_sm12x.vllm_api.version.installed"
            monkeypatch.setattr(version, lambda: Version(vllm))
            return applied

        return found

    @pytest.mark.parametrize(
        "gpu, vllm, env, answers",
        [
            (SM120, "0.26.0", {}, True),
            (SM120, "0.22.1", {}, False),
            (SM120, "0.26.0", {"VLLM_SM12X_OFF": "platform"}, False),
            (SM120, "0.26.0", {"VLLM_TRITON_MLA_SPARSE": "0"}, True),
            (SM120, "0.26.0", {"VLLM_TRITON_MLA_SPARSE": "maybe"}, False),
            (SM90, "0.26.0", {}, False),
            (SM90, "0.26.0", {"VLLM_TRITON_MLA_SPARSE": "1"}, True),
            (SM90, "0.26.0", {"VLLM_SM12X_ASSUME": "12.0"}, True),
            (SM75, "0.26.0", {"VLLM_TRITON_MLA_SPARSE": "1"}, False),
            (NoDevice("none"), "0.26.0", {"VLLM_TRITON_MLA_SPARSE": "1"}, False),
        ],
    )
    def test_platform(self, machine, monkeypatch, gpu, vllm, env, answers):
        machine(gpu, vllm)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        path = "vllm_sm12x.integration.platform.Sm12xPlatform"
        assert plugin.platform() == (path if answers else None)

    def test_platform_never_raises_and_says_why(self, machine, monkeypatch, caplog):
        def explode():
            raise AttributeError("a strange NVML")

        monkeypatch.setattr(device, "first_visible_device", explode)
        with caplog.at_level(logging.ERROR, "vllm.sm12x"):
            assert plugin.platform() is None
        assert "a strange NVML" in caplog.text

    @pytest.mark.parametrize(
        "gpu, vllm, env, message",
        [
            (SM75, "0.26.0", {"VLLM_TRITON_MLA_SPARSE": "1"}, "SPARSE=1 .*SM 7.5.*SM 8.9"),
            (SM75, "0.26.0", {"VLLM_SM12X_ASSUME": "12.0"}, "VLLM_SM12X_ASSUME .*SM 7.5.*SM 8.9"),
            (SM120, "0.22.1", {"VLLM_TRITON_MLA_SPARSE": "1"}, r"vLLM 0.22.1 .*needs >=0.23"),
            (SM120, "0.26.0", {"VLLM_TRITON_MLA_SPARSE": "2"}, "'2' is not valid"),
            (SM90, "0.26.0", {"VLLM_SM12X_OFFF": "x"}, "did you mean VLLM_SM12X_OFF"),
        ],
    )  # fmt: skip
    def test_register_refuses_before_any_change(
        self, machine, monkeypatch, gpu, vllm, env, message
    ):
        applied = machine(gpu, vllm)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        with pytest.raises((RuntimeError, knobs.KnobError), match=message):
            plugin.register()
        assert applied == []

    def test_register_on_an_old_vllm_warns_once(self, machine, caplog):
        machine(SM120, "0.22.1")
        with caplog.at_level(logging.INFO, "vllm.sm12x"):
            plugin.register()
            plugin.register()
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "vLLM 0.22.1" in caplog.text

    def test_register_is_silent_where_it_is_inert(self, machine, caplog):
        machine(SM90)
        with caplog.at_level(logging.INFO, "vllm.sm12x"):
            plugin.register()
        assert caplog.records == []


class TestSelection:
    """One decision, whatever asks for it. Uses vLLM's real registry of attention backends."""

    @pytest.fixture
    def registry(self, monkeypatch):
        from vllm_sm12x.integration import selection
        from vllm_sm12x.vllm_api import registry

        registry.claim_custom(selection.BACKEND_PATH)
        yield registry
        registry.release_custom()

    def config(self, backend=None):
        return SimpleNamespace(attention_config=SimpleNamespace(backend=backend))

    @pytest.mark.parametrize(
        "backend, env, ours, explicit, why",
        [
            (None, {}, True, False, "the GPU is SM12x"),
            (None, {"VLLM_SM12X_ASSUME": "12.0"}, True, True, "VLLM_SM12X_ASSUME"),
            (None, {"VLLM_TRITON_MLA_SPARSE": "1"}, True, True, "VLLM_TRITON_MLA_SPARSE=1"),
            (None, {"VLLM_TRITON_MLA_SPARSE": "0"}, False, True, "VLLM_TRITON_MLA_SPARSE=0"),
            ("CUSTOM", {}, True, True, "--attention-backend TRITON_MLA_SPARSE"),
            ("FLASHMLA_SPARSE", {}, False, True, "--attention-backend FLASHMLA_SPARSE"),
            (
                "FLASHMLA_SPARSE", {"VLLM_TRITON_MLA_SPARSE": "1"},
                False, True, "--attention-backend FLASHMLA_SPARSE",
            ),
        ],
    )  # fmt: skip
    def test_who_wins(self, registry, monkeypatch, backend, env, ours, explicit, why):
        from vllm_sm12x.integration.selection import Choice, choose

        for name, value in env.items():
            monkeypatch.setenv(name, value)
        member = registry.lookup(backend) if backend else None
        assert choose(self.config(member)) == Choice(ours, explicit, why)

    def test_the_class_follows_the_choice_and_is_logged_once(self, registry, monkeypatch, caplog):
        from vllm_sm12x.integration import selection

        stand_in = ModuleType("vllm_sm12x.integration.sparse_mla")
        stand_in.TritonMlaSparseAttention = type("TritonMlaSparseAttention", (), {})
        monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
        stock = type("DeepseekV4FlashMLAAttention", (), {})

        def original(vllm_config):
            return stock

        with caplog.at_level(logging.INFO, "vllm.sm12x"):
            for _ in range(3):
                chosen = selection.select_attention_class(original, self.config())
                assert chosen is stand_in.TritonMlaSparseAttention
            flashmla = self.config(registry.lookup("FLASHMLA_SPARSE"))
            assert selection.select_attention_class(original, flashmla) is stock
        assert [record.getMessage() for record in caplog.records] == [
            "DeepSeek V4 attention: TritonMlaSparseAttention (TRITON_MLA_SPARSE), because the GPU "
            "is SM12x.",
            "DeepSeek V4 attention: DeepseekV4FlashMLAAttention, because --attention-backend "
            "FLASHMLA_SPARSE.",
        ]

    def test_the_name_is_refused_when_switched_off(self, registry, monkeypatch):
        from vllm_sm12x.integration import selection

        monkeypatch.setenv("VLLM_TRITON_MLA_SPARSE", "0")
        with pytest.raises(ValueError, match="VLLM_TRITON_MLA_SPARSE=0 forbids it"):
            selection.look_up(
                type(registry.CUSTOM).__getitem__, type(registry.CUSTOM), "TRITON_MLA_SPARSE"
            )
        with pytest.raises(ValueError, match="VLLM_TRITON_MLA_SPARSE=0 forbids it"):
            selection.choose(self.config(registry.CUSTOM))

    def test_the_name_is_refused_when_custom_is_somebody_elses(self, registry):
        from vllm_sm12x.integration import selection

        registry.claim_custom("their.package.Backend")
        with pytest.raises(ValueError, match="CUSTOM backend is their.package.Backend.*=1 instead"):
            selection.look_up(
                registry.Lookup.__getitem__, type(registry.CUSTOM), "TRITON_MLA_SPARSE"
            )

    def test_other_names_and_other_enums_go_to_vllm(self, registry):
        from vllm_sm12x.integration import selection

        asked = []
        lookup = registry.Lookup.__getitem__

        def original(enum, name):
            asked.append(name)
            return lookup(enum, name)

        enum = type(registry.CUSTOM)
        assert selection.look_up(original, enum, "FLASHMLA") is enum["FLASHMLA"]
        with pytest.raises(ValueError, match="Unknown attention backend: 'FLASHMAL'"):
            selection.look_up(original, enum, "FLASHMAL")
        other = type("Other", (), {})
        assert (
            selection.look_up(lambda enum, name: "theirs", other, "TRITON_MLA_SPARSE") == "theirs"
        )
        assert asked == ["FLASHMLA", "FLASHMAL"]

# SPDX-License-Identifier: Apache-2.0
"""Every setting of the plugin, one row each, and the only place that reads the environment.

An unset or empty variable has its default. Anything else must parse, or `KnobError` says which
variable holds what, and what it takes.
"""

import difflib
import os
from collections.abc import Callable, Container, Iterable, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

TILED = "VLLM_DEEP_GEMM_SM120_PAGED_MQA_TILED"
DEEP_GEMM_TILED = "DG_SM120_PAGED_MQA_TILED"
# The ops that more than one implementation can serve, and the names of the implementations.
OPS = ("mqa_logits", "paged_mqa_logits", "fp8_einsum", "hc_prenorm_gemm")
PROVIDERS = ("auto", "triton", "deep_gemm")
_OUR_PREFIXES = ("VLLM_SM12X_", "VLLM_TRITON_MLA_SPARSE")


class KnobError(ValueError):
    """A variable of ours holds a value, or has a name, that means nothing."""


class _Because(ValueError):
    """What is wrong with a value, to be said besides what is allowed."""


@dataclass(frozen=True, kw_only=True)
class Knob:
    """One environment variable: its name, default, what it takes, and what it does."""

    name: str
    default: Any
    default_text: str
    allowed: str
    parse: Callable[[str], Any]  # raises ValueError for anything outside `allowed`
    help: str

    @property
    def text(self) -> str:
        """What the environment says, "" when it says nothing."""
        return os.environ.get(self.name, "").strip()

    def read(self) -> Any:
        """The value in force now. Raises KnobError."""
        if not self.text:
            return self.default
        try:
            return self.parse(self.text)
        except ValueError as error:
            because = f" ({error})" if isinstance(error, _Because) else ""
            message = f"{self.name}={self.text!r} is not valid{because}: allowed is {self.allowed}."
            raise KnobError(message) from None


def _one_of(values: dict[str, Any]) -> Callable[[str], Any]:
    def parse(raw: str) -> Any:
        if raw not in values:
            raise ValueError
        return values[raw]

    return parse


def _integer(low: int, high: int | None = None, multiple: int = 1) -> Callable[[str], int]:
    def parse(raw: str) -> int:
        value = int(raw)
        if value < low or (high is not None and value > high) or value % multiple:
            raise ValueError
        return value

    return parse


def _names(raw: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in raw.split(",") if part.strip())


def _providers(raw: str) -> dict[str, str]:
    """One provider for all ops, or `op=provider` pairs; an op that none names has auto."""
    if "=" not in raw and "," not in raw:
        return dict.fromkeys(OPS, _provider(raw))
    chosen: dict[str, str] = {}
    for pair in _names(raw):
        op, equals, provider = (part.strip() for part in pair.partition("="))
        if not equals:
            raise _Because(f"{pair!r} names no op, as in {OPS[0]}=triton")
        if op not in OPS:
            raise _Because(f"no op is called {op!r}{did_you_mean(op, OPS)}")
        if op in chosen:
            raise _Because(f"it names {op} twice")
        chosen[op] = _provider(provider)
    if not chosen:
        raise _Because("it names no op")
    return dict.fromkeys(OPS, "auto") | chosen


def _provider(name: str) -> str:
    if name not in PROVIDERS:
        raise _Because(f"no provider is called {name!r}{did_you_mean(name, PROVIDERS)}")
    return name


_switch = _one_of({"0": False, "1": True})

KNOBS: tuple[Knob, ...] = (
    Knob(
        name="VLLM_TRITON_MLA_SPARSE",
        default=None,
        default_text="unset (auto)",
        allowed="0, 1 or auto",
        parse=_one_of({"auto": None, "0": False, "1": True}),
        help="Auto: TRITON_MLA_SPARSE serves DeepSeek V4 on SM12x GPUs, and nothing changes on "
        "others. 1: also on any other NVIDIA GPU from SM89 on. 0: off.",
    ),
    Knob(
        name=TILED,
        default=True,
        default_text="1",
        allowed="0 or 1",
        parse=_switch,
        help="Handed to DeepGEMM as `DG_SM120_PAGED_MQA_TILED` (unless that is set already): 1 "
        "takes the tiled paged-MQA kernel where the installed DeepGEMM has one for SM120, 0 its "
        "simpler one. No effect without a DeepGEMM that has SM120 kernels.",
    ),
    Knob(
        name="VLLM_TRITON_MLA_SPARSE_ALLOW_CUDAGRAPH",
        default=True,
        default_text="1",
        allowed="0 or 1",
        parse=_switch,
        help="0: no torch.compile and no CUDA graphs while TRITON_MLA_SPARSE is in use, for "
        "debugging. 1, where you set it: vLLM's graph mode also where another one is the default "
        "(speculative decoding on SM 12.1).",
    ),
    Knob(
        name="VLLM_TRITON_MLA_SPARSE_TOPK_CHUNK_SIZE",
        default=512,
        default_text="512",
        allowed="a multiple of 16 from 16 to 65536",
        parse=_integer(16, 65536, multiple=16),
        help="Candidates of one query that the split decode works on at one time over all its "
        "splits, so at most this / 16 splits. Lower: a smaller fp32 workspace for partial "
        "results. Higher: a shorter loop in each program.",
    ),
    Knob(
        name="VLLM_TRITON_MLA_SPARSE_QUERY_CHUNK_SIZE",
        default=256,
        default_text="256",
        allowed="an integer from 1 on",
        parse=_integer(1),
        help="Prefill is launched in whole multiples of this many query tokens, as many as fill "
        "the GPU. The memory for unpacked rows (at most 256 MiB, which vLLM's layers share) does "
        "not depend on it.",
    ),
    Knob(
        name="VLLM_TRITON_MLA_SPARSE_HEAD_BLOCK_SIZE",
        default=None,
        default_text="auto",
        allowed="auto, 1, 2 or 4",
        parse=_one_of({"auto": None, "1": 1, "2": 2, "4": 4}),
        help="Heads of one program, in units of one 16-head MMA tile. Auto: 1 for single-token "
        "decode, 2 for small batches, 4 for larger ones and prefill, which is then a kernel in "
        "Gluon. With a number it is one in Triton.",
    ),
    Knob(
        name="VLLM_TRITON_MLA_SPARSE_DUMP",
        default=False,
        default_text="0",
        allowed="0 or 1",
        parse=_switch,
        help="1: a request's first attention call writes its tensors' metadata (shapes, dtypes, "
        "strides, lengths, value ranges) as JSON lines and aborts. vLLM cannot end one request "
        "without ending the engine, so **the engine stops**. Implies eager execution.",
    ),
    Knob(
        name="VLLM_TRITON_MLA_SPARSE_DUMP_PATH",
        default="/tmp/deepseek_v4_triton_mla_sparse_dump.jsonl",
        default_text="/tmp/deepseek_v4_triton_mla_sparse_dump.jsonl",
        allowed="a path",
        parse=str,
        help="The file that `VLLM_TRITON_MLA_SPARSE_DUMP=1` writes.",
    ),
    Knob(
        name="VLLM_SM12X_ASSUME",
        default=None,
        default_text="unset",
        allowed="12.0 or 12.1",
        parse=_one_of({"12.0": (12, 0), "12.1": (12, 1)}),
        help="Take the SM12x path on another NVIDIA GPU as if it had this compute capability. For "
        "tests: the results are proxies.",
    ),
    Knob(
        name="VLLM_SM12X_PROVIDERS",
        default=dict.fromkeys(OPS, "auto"),
        default_text="auto",
        allowed=f"{', '.join(PROVIDERS[:-1])} or {PROVIDERS[-1]} for every op, or op=provider "
        f"pairs separated by commas, where op is {', '.join(OPS[:-1])} or {OPS[-1]}",
        parse=_providers,
        help="Which implementation serves each op on SM12x: `auto` (ours), `triton` (ours) or "
        "`deep_gemm`, for every op or by op, as in "
        "`paged_mqa_logits=deep_gemm,fp8_einsum=triton`. `deep_gemm` needs a DeepGEMM with SM120 "
        "kernels and nvcc 12.9 or later, and is refused without them. `vllm-sm12x doctor` shows "
        "who serves what.",
    ),
    Knob(
        name="VLLM_SM12X_ONE_PASS_TOP_K",
        default=False,
        default_text="0",
        allowed="0 or 1",
        parse=_switch,
        help="1: a prefill's index scores are selected from as they are made, with scratch memory "
        "up to `VLLM_SPARSE_INDEXER_MAX_LOGITS_MB`. 0: they are written, up to as much at a time, "
        "and then selected from, which is faster on the GPU that was measured (an H200).",
    ),
    Knob(
        name="VLLM_SM12X_WARMUP",
        default=None,
        default_text="unset (auto)",
        allowed="0, 1 or auto",
        parse=_one_of({"auto": None, "0": False, "1": True}),
        help="Whether a worker runs batches of made-up requests before it reports ready, so that "
        "real ones do not wait for compilers. Auto: where TRITON_MLA_SPARSE serves the model, and "
        "for models with linear attention (GDN). 1: for any model that generates text. 0: never.",
    ),
    Knob(
        name="VLLM_SM12X_COMPILE_LOG",
        default=None,
        default_text="unset",
        allowed="a path",
        parse=str,
        help="A file to which workers append a JSON line when they are ready, and one for each "
        "kernel that they compile, load from disk or autotune after that.",
    ),
    Knob(
        name="VLLM_SM12X_OFF",
        default=(),
        default_text="unset",
        allowed="names of changes, separated by commas",
        parse=_names,
        help="Changes to leave out, by the names that `vllm-sm12x doctor` lists.",
    ),
)

_BY_NAME = {knob.name: knob for knob in KNOBS}


def get(name: str) -> Any:
    """The value in force of the knob `name`. Raises KnobError for a bad value."""
    return _BY_NAME[name].read()


def given(name: str) -> bool:
    """Whether the user has set the knob `name`, to its default or to anything else."""
    return bool(_BY_NAME[name].text)


def check_environment(known: Container[str] = ()) -> None:
    """Parse every knob, and refuse names under our prefixes that nobody knows.

    `known` are names that vLLM itself defines: a later release may use the same prefix.
    Raises KnobError.
    """
    for knob in KNOBS:
        knob.read()
    for name in sorted(os.environ):
        if name.startswith(_OUR_PREFIXES) and name not in _BY_NAME and name not in known:
            raise KnobError(f"{name} is not a setting of vllm-sm12x{did_you_mean(name, _BY_NAME)}.")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean X`, the end of a sentence about a wrong name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}" if close else ""


def merge_into(environment_variables: MutableMapping[str, Callable[[], Any]]) -> list[str]:
    """Add every knob to vLLM's table of variables, and return the names that were not there.

    Members of that table cause no "unknown variable" warning, enter the compile-cache key and are
    shown by `vllm collect-env`.
    """
    added = [knob for knob in KNOBS if knob.name not in environment_variables]
    environment_variables.update({knob.name: knob.read for knob in added})
    return [knob.name for knob in added]


def set_default(name: str, value: str, undo: ExitStack) -> None:
    """Set a variable that is somebody else's, unless it is set; `undo` unsets it again."""
    if name not in os.environ:
        os.environ[name] = value
        undo.callback(os.environ.pop, name, None)


def forward_to_deep_gemm(undo: ExitStack) -> None:
    """Set DeepGEMM's own variable from ours, unless the user set DeepGEMM's; `undo` unsets it."""
    set_default(DEEP_GEMM_TILED, f"{get(TILED):d}", undo)


def set_by_others(name: str, ours: str) -> str | None:
    """What a variable holds that is neither unset nor `ours`, the value of `set_default`.

    A child process inherits `ours` from its parent, and cannot tell it from the user's.
    """
    value = os.environ.get(name)
    return None if value == ours else value


def variable(name: str) -> str | None:
    """A variable that is somebody else's, None when unset."""
    return os.environ.get(name)


def cuda_home() -> str | None:
    """The folder of the CUDA toolkit that the user names: CUDA_HOME, else CUDA_PATH, else None."""
    return os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or None


def cuda_visible_devices() -> str | None:
    """CUDA_VISIBLE_DEVICES, None when unset."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def vllm_plugins() -> tuple[str, ...] | None:
    """The plugin names that VLLM_PLUGINS lets vLLM load, None when unset (all of them)."""
    raw = os.environ.get("VLLM_PLUGINS")
    return None if raw is None else tuple(raw.split(","))


def markdown_table() -> str:
    """The README's table of settings."""
    rows = [f"| `{knob.name}` | {knob.default_text} | {knob.help} |" for knob in KNOBS]
    return "\n".join(["| Variable | Default | Meaning |", "| --- | --- | --- |", *rows]) + "\n"

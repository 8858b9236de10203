# SPDX-License-Identifier: Apache-2.0
"""vLLM's registry of attention backends, and how a name that a user types becomes a member."""

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

# `--attention-backend`, `--attention-config` and AttentionConfig(backend=...) all look a name up
# as AttentionBackendEnum[name], which is this class's __getitem__.
Lookup = type(AttentionBackendEnum)
CUSTOM = AttentionBackendEnum.CUSTOM


def members() -> tuple[str, ...]:
    """The names of vLLM's own members."""
    return tuple(AttentionBackendEnum.__members__)


def lookup(name: str) -> AttentionBackendEnum:
    """What vLLM's config makes of a name. Raises ValueError for an unknown one."""
    return AttentionBackendEnum[name]


def path_of(backend: AttentionBackendEnum) -> str | None:
    """The class path that a member stands for; None for one without (an unregistered CUSTOM)."""
    try:
        return backend.get_path()
    except ValueError:
        return None


def claim_custom(path: str) -> None:
    """Let CUSTOM stand for the class at `path`."""
    register_backend(CUSTOM, path)


def release_custom() -> None:
    """Give CUSTOM back, unregistered."""
    CUSTOM.clear_override()

# SPDX-License-Identifier: Apache-2.0
"""What the platform and a worker run; `changes` fills it, as imports point downwards."""

from collections.abc import Callable
from typing import Any

# By the platform, each with the VllmConfig: to fill in what the user left open, and when vLLM has
# filled in the rest.
config_defaults: list[Callable[[Any], None]] = []
config_complete: list[Callable[[Any], None]] = []
before_model: list[Callable[[Any], None]] = []  # in a worker; each takes the VllmConfig
before_capture: list[Callable[[Any], None]] = []  # in a worker, which each takes
ready: list[Callable[[], None]] = []  # in a worker, everything is compiled and captured

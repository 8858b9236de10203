# SPDX-License-Identifier: Apache-2.0
"""What runs as an engine starts; `changes` fills it, as imports point downwards."""

from collections.abc import Callable
from typing import Any

graphs_decided: list[Callable[[Any], None]] = []  # by vLLM, for the VllmConfig that each takes
before_model: list[Callable[[Any], None]] = []  # in a worker; each takes the VllmConfig
before_capture: list[Callable[[Any], None]] = []  # in a worker, which each takes
ready: list[Callable[[], None]] = []  # in a worker, everything is compiled and captured

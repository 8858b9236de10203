# SPDX-License-Identifier: Apache-2.0
"""What a worker runs at its steps; `changes` fills it, as imports point downwards."""

from collections.abc import Callable
from typing import Any

before_model: list[Callable[[Any], None]] = []  # each takes the VllmConfig
ready: list[Callable[[], None]] = []  # when everything is compiled and captured

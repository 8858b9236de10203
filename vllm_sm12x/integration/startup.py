# SPDX-License-Identifier: Apache-2.0
"""What a worker runs before it builds the model; `changes` fills it, as imports point downwards."""

from collections.abc import Callable
from typing import Any

before_model: list[Callable[[Any], None]] = []  # each takes the VllmConfig

# SPDX-License-Identifier: Apache-2.0
"""What the platform and a worker run; `changes` fills it, as imports point downwards."""

from collections.abc import Callable
from typing import Any

# A worker, before it builds the model. Each step of either list takes the VllmConfig.
before_model: list[Callable[[Any], None]] = []
# The platform, on each VllmConfig that vLLM makes: fill in what the user left open.
config_defaults: list[Callable[[Any], None]] = []

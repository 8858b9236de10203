# SPDX-License-Identifier: Apache-2.0
"""vLLM's table of environment variables."""

from vllm.envs import environment_variables

__all__ = ["environment_variables"]

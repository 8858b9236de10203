# SPDX-License-Identifier: Apache-2.0
"""DeepSeek V4 sparse attention for SM12x GPUs on stock vLLM."""

__version__ = "0.1.0"

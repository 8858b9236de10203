# SPDX-License-Identifier: Apache-2.0
"""vLLM's GPU worker."""

from vllm.v1.worker.gpu_worker import Worker

__all__ = ["Worker"]

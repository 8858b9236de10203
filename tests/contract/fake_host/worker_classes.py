# SPDX-License-Identifier: Apache-2.0
"""A user's own worker class, for `--worker-cls`."""

from vllm_sm12x.integration.worker import Sm12xWorker


class Derived(Sm12xWorker):
    """Ours, and nothing else."""

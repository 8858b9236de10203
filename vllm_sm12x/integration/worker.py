# SPDX-License-Identifier: Apache-2.0
"""vLLM's GPU worker with a step before the model is built."""

from typing import Any

from vllm_sm12x.integration import startup
from vllm_sm12x.vllm_api.worker import Worker


class Sm12xWorker(Worker):
    """The worker that `Sm12xPlatform` chooses. Subclass it if you need your own `--worker-cls`."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        for step in startup.before_model:
            step(self.vllm_config)
        super().load_model(*args, **kwargs)

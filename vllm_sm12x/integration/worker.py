# SPDX-License-Identifier: Apache-2.0
"""vLLM's GPU worker, with steps before the model is built and when it is ready to serve."""

from typing import Any

from vllm_sm12x.integration import startup
from vllm_sm12x.vllm_api.worker import Worker


class Sm12xWorker(Worker):
    """The worker that `Sm12xPlatform` chooses. Subclass it if you need your own `--worker-cls`."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        for step in startup.before_model:
            step(self.vllm_config)
        super().load_model(*args, **kwargs)

    def compile_or_warm_up_model(self) -> Any:
        """vLLM's last step before it reports ready."""
        for prepare in startup.before_capture:
            prepare(self)
        times = super().compile_or_warm_up_model()
        for step in startup.ready:
            step()
        return times

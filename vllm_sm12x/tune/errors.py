# SPDX-License-Identifier: Apache-2.0
"""What `vllm-sm12x tune` cannot do, in one sentence."""


class TuneError(ValueError):
    """The model, the folder, the GPU or an argument does not allow tuning."""

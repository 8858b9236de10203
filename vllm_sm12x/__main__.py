# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_sm12x`."""

from vllm_sm12x.cli import app

app(prog_name="vllm-sm12x")

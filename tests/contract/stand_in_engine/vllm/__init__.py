# SPDX-License-Identifier: Apache-2.0
"""A package named vllm whose `serve` needs no GPU: for tests of the programs that start one."""

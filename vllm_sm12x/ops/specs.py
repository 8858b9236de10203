# SPDX-License-Identifier: Apache-2.0
"""One row per op: function, oracle, inputs, shapes, tolerance: for tests, compile gate, benches."""

from vllm_sm12x.ops.sparse_mla.spec import SPARSE_MLA

SPECS = (SPARSE_MLA,)

# SPDX-License-Identifier: Apache-2.0
"""Oracle of fp8_einsum: plain torch, fp32, written from the formula in README.md."""

import torch


def _scale_as_float(scale: torch.Tensor) -> torch.Tensor:
    """fp32 from fp32 or e8m0; torch converts the latter."""
    if scale.dtype == torch.uint8:
        scale = scale.contiguous().view(torch.float8_e8m0fnu)
    return scale.float()


def fp8_einsum_reference(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`fp8_einsum` in fp32: same arguments, the result fp32 unless `out` is given."""
    values_a = a.float() * _scale_as_float(a_scale).repeat_interleave(128, -1)
    scale_b = _scale_as_float(b_scale).repeat_interleave(128, -1).repeat_interleave(128, -2)
    values_b = b.float() * scale_b[:, : b.shape[1]]
    result = torch.einsum("tgr,gdr->tgd", values_a, values_b)
    return result if out is None else out.copy_(result)

"""The number format of matrix products: float32, or bfloat16 under autocast where the device is fast at it."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

PRECISIONS = ("fp32", "bf16", "auto")


def resolve_precision(precision: str, device: torch.device) -> str:
    """Gives "fp32" or "bf16": what `precision` means on `device`; "auto" is bf16 where it has instructions for that.

    Raises:
        ValueError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, must be one of {', '.join(PRECISIONS)}")
    if precision != "auto":
        return precision
    return "bf16" if _multiplies_bfloat16(device) else "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Inside, matrix products are in "fp32" or "bf16"; weights, sums and norms stay float32."""
    stack = ExitStack()
    if precision == "bf16":
        stack.enter_context(torch.autocast(device.type, torch.bfloat16))
        if device.type == "cpu" and torch.is_grad_enabled():
            # The fused attention that torch has for CPUs takes 15 times as long backwards in bfloat16 as in float32.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    return stack


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False

"""Capabilities of the processor."""

from __future__ import annotations

import torch


def has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX-512 BF16, AMX, ARMv8.6); emulated, it would be slower than
    fp32.
    """
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16") or able.get("bf16"))

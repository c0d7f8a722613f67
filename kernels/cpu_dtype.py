"""In which type this CPU multiplies matrices well: known instruction sets and, where they do not
decide, a product.

Without instructions for it a product in bf16 is emulated: on an AVX2 CPU of 2021 one thread does
0.9 GFLOP/s in bf16 and 81 in fp32. Instructions that exist may not be in use
(``ONEDNN_MAX_CPU_ISA``, a library built without them), so that they are there only means that a
product is tried.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch

# torch.cpu.get_capabilities' names, the fastest first.
BF16_SETS = {
    "amx_bf16": "AMX-BF16",
    "avx512_bf16": "AVX512-BF16",
    "sve_bf16": "SVE-BF16",
    "bf16": "Arm BF16",
}
WIDTH = 256  # emulated: 13 to 40 ms a product; by AVX512-BF16 0.08 ms, and 0.3 ms in fp32
ROUNDS = 5
LIMIT_S = 0.05
# Where instructions are known a product may only refute them. Where none are, bf16 must gain enough
# to pay for casts.
WITH_INSTRUCTIONS = 1.0
WITHOUT_INSTRUCTIONS = 0.7


@dataclass(frozen=True)
class DtypeChoice:
    """A compute type and why it was chosen."""

    dtype: torch.dtype
    reason: str


@cache
def choose_cpu_dtype() -> DtypeChoice:
    """bf16 where this CPU does it well, else fp32. Takes a few milliseconds, 0.15 s where bf16 is
    emulated.
    """
    capabilities = _capabilities()
    known = [name for key, name in BF16_SETS.items() if capabilities.get(key)]
    simd = torch.backends.cpu.get_cpu_capability()
    if not known and capabilities.get("architecture") in ("x86", "x86_64"):
        return DtypeChoice(torch.float32, f"this CPU has no bf16 instructions ({simd})")
    ratio = product_ratio()
    measured = f"a product in bf16 takes {ratio:.2g}x the time of one in fp32"
    if ratio < (WITH_INSTRUCTIONS if known else WITHOUT_INSTRUCTIONS):
        return DtypeChoice(torch.bfloat16, known[0] if known else measured)
    return DtypeChoice(
        torch.float32, f"{known[0]} is not in use ({simd}): {measured}" if known else measured
    )


def product_ratio() -> float:
    """Time of a product of two matrices in bf16 / in fp32: the best of a few calls each, taken in
    turn.

    The first call of each is not counted: it may compile. Ends after LIMIT_S seconds, but calls
    each twice.
    """
    matrices = [torch.ones(WIDTH, WIDTH, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    for matrix in matrices:
        matrix @ matrix
    best = [float("inf"), float("inf")]
    begin = time.perf_counter()
    for _ in range(ROUNDS):
        for place, matrix in enumerate(matrices):
            best[place] = min(best[place], _seconds(matrix))
        if time.perf_counter() - begin > LIMIT_S:
            break
    return best[0] / best[1]


def _seconds(matrix: torch.Tensor) -> float:
    begin = time.perf_counter()
    matrix @ matrix
    return time.perf_counter() - begin


def _capabilities() -> Mapping[str, object]:
    """What torch knows of this CPU; nothing where it does not tell."""
    tell = getattr(torch.cpu, "get_capabilities", dict)
    found: Mapping[str, object] = tell()
    return found

"""What a CPU computes in: bf16 where its instructions, or a product, say so."""

import os
import subprocess
import sys

import pytest

from kernels import cpu_dtype
from kernels.cpu_dtype import choose_cpu_dtype
from tests.helpers.ranks import HANG_S
from training import compute_dtype

# As AVX2 alone would be: of all libraries, and of the one that multiplies; oneDNN without bf16 is
# the slower way.
CAPPED = {
    "all libraries": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "oneDNN": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "oneDNN, by its former name": {"DNNL_MAX_CPU_ISA": "AVX2"},
}
ASK = "from kernels.cpu_dtype import choose_cpu_dtype as c; print(c().dtype, c().reason)"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="caps of x86")
@pytest.mark.parametrize("cap", CAPPED)
def test_a_cpu_whose_instructions_are_not_in_use_computes_in_fp32(cap):
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        env=os.environ | CAPPED[cap],
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.stdout.startswith("torch.float32 "), done.stdout + done.stderr
    assert "bf16" in done.stdout


# What torch knows, the measured ratio (None: nothing is measured), the choice, a part of the
# reason.
X86 = {"architecture": "x86_64", "avx2": True}
ARM = {"architecture": "aarch64", "neon": True}
CPUS = {
    "AVX2": (X86, None, "fp32", "this CPU has no bf16 instructions ("),
    "AVX512": (
        X86 | {"avx512_f": True, "avx512_bf16": False},
        None,
        "fp32",
        "no bf16 instructions",
    ),
    "AVX512-BF16": (X86 | {"avx512_bf16": True}, 0.25, "bf16", "AVX512-BF16"),
    "AVX512-BF16, busy": (X86 | {"avx512_bf16": True}, 0.9, "bf16", "AVX512-BF16"),
    "AVX512-BF16, not in use": (
        X86 | {"avx512_bf16": True},
        43.0,
        "fp32",
        "AVX512-BF16 is not in use",
    ),
    "AMX": (X86 | {"avx512_bf16": True, "amx_bf16": True}, 0.1, "bf16", "AMX-BF16"),
    "SVE": (ARM | {"bf16": True, "sve_bf16": True}, 0.4, "bf16", "SVE-BF16"),
    "Arm BF16": (ARM | {"bf16": True}, 0.4, "bf16", "Arm BF16"),
    "Arm BF16, not in use": (ARM | {"bf16": True}, 9.0, "fp32", "takes 9x the time"),
    "Arm without": (ARM, 30.0, "fp32", "takes 30x the time"),
    "as quick by another way": (ARM, 0.9, "fp32", "takes 0.9x the time"),
    "quicker by another way": (ARM, 0.5, "bf16", "takes 0.5x the time"),
    "torch does not tell": ({}, 60.0, "fp32", "takes 60x the time"),
}


@pytest.mark.parametrize("name", CPUS)
def test_instructions_decide_and_where_they_do_not_a_product(monkeypatch, name):
    capabilities, ratio, dtype, reason = CPUS[name]
    monkeypatch.setattr(cpu_dtype, "_capabilities", lambda: capabilities)
    measured = iter([] if ratio is None else [ratio])
    monkeypatch.setattr(cpu_dtype, "product_ratio", lambda: next(measured))
    choice = choose_cpu_dtype.__wrapped__()
    assert (compute_dtype.name_of(choice), list(measured)) == (dtype, [])
    assert reason in choice.reason

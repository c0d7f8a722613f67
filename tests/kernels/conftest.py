"""Where tests of Triton kernels run: interpreted on CPU tensors, or compiled on a card.

The interpreter runs a kernel's programs one after the other in numpy: it shows wrong formulas,
masks and offsets, no races. Its bf16 products are wrong (triton 3.9), so 16-bit tests use fp16
there. ``pytest -m gpu`` runs the rest.
"""

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = (
        "1"  # read when a kernel is defined, that is at the first use of its op
    )


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Of the tensors that a Triton kernel gets."""
    if CUDA and request.param == "cpu":
        pytest.skip("kernels are compiled here, not interpreted")
    return request.param

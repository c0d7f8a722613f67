"""All Triton kernels of a model at once, interpreted: under DeepSpeed's engine, cut over ranks,
recomputed.
"""

from dataclasses import replace

import pytest
import torch

from kernels.backend import serve_cpu_tensors
from tests import parity
from tests.helpers.tiny import layout

CASES = (
    parity.Case(
        "TP2 x EP2, ZeRO 2, recompute", 2, {"tp": 2, "ep": 2, "zero_stage": 2}, recompute=True
    ),
    parity.Case(
        "4 streams, EP2, ZeRO 1",
        2,
        {"ep": 2},
        model="streams",
    ),
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_step_differs_from_fp64_by_rounding_as_pytorchs_path_on_one_process(case, monkeypatch):
    # The interpreter is slow, and not for two threads: one step of two rows, without prefetch.
    monkeypatch.setattr(parity, "STEPS", 1)
    config = case.config()
    config = replace(
        config, train=replace(config.train, global_batch=2), table=replace(config.table, prefetch=0)
    )
    truth = parity.true_run(replace(config, parallel=layout()))
    try:
        serve_cpu_tensors(True)  # also in the processes forked from here
        got = parity.run_case(config, case.world_size)
    finally:
        serve_cpu_tensors(False)
    wrong = parity.beyond_rounding(got, truth)
    assert not wrong, "; ".join(wrong.values())

"""Row formats: unbiased, to a neighbour, and the same bits from the host's loops as from tensor
operations.
"""

import math

import numpy as np
import pytest
import torch

from kernels.table_rows import codes as row_codes
from kernels.table_rows.formats import from_fp8, random_bits, row_keys, to_bf16, to_fp8
from tests.helpers.table_rows import FORMATS, make_store


def awkward_values(width: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    values = (
        torch.randn(30, width, generator=generator)
        * (torch.randn(30, 1, generator=generator) * 4).exp()
    )
    values[3], values[5, :32], values[6, 3] = 0, 1e-35, 3.4e38
    values[4, 5] = -0.0
    return values


@pytest.mark.parametrize("form", ["bf16", "fp8"])
def test_the_mean_of_stored_values_is_the_value(form):
    values = awkward_values()[:3]
    rows = torch.arange(3)
    sums = {}
    for count in (400, 6400):
        total = torch.zeros(values.shape, dtype=torch.float64)
        for update in range(count):
            keys = row_keys(rows, torch.full((3,), update), seed=1)
            stored = (
                to_bf16(values, keys).double()
                if form == "bf16"
                else from_fp8(*to_fp8(values, keys), torch.float64)
            )
            total += stored - values
        scale = (
            values.abs()
            if form == "bf16"
            else values.unflatten(1, (2, 32)).abs().amax(-1).repeat_interleave(32, 1)
        )
        sums[count] = (total / count / scale).square().mean().sqrt().item()
    unit = 2.0**-8 if form == "bf16" else 2.0**-4
    assert sums[400] < 2 * unit / math.sqrt(400)
    assert sums[6400] < sums[400] / 2.5  # 1 / sqrt(n) would be / 4


@pytest.mark.parametrize("form", ["bf16", "fp8"])
def test_only_neighbours_occur_and_stored_values_stay(form):
    values = awkward_values()[:3]
    keys = row_keys(torch.arange(3), torch.zeros(3), seed=1)

    def stored(values, keys):
        return (
            to_bf16(values, keys).float()
            if form == "bf16"
            else from_fp8(*to_fp8(values, keys), torch.float32)
        )

    drawn = torch.stack(
        [stored(values, row_keys(torch.arange(3), torch.full((3,), n), 1)) for n in range(60)]
    )
    for row, column in ((0, 0), (1, 17), (2, 63)):
        seen = drawn[:, row, column].unique()
        assert len(seen) <= 2
        assert seen[0] <= values[row, column] <= seen[-1]
    once = stored(values, keys)
    assert torch.equal(stored(once, keys + 1), once)


def test_bf16_keeps_what_is_not_finite_and_makes_nothing_infinite():
    values = torch.tensor([[math.inf, -math.inf, math.nan, 3.4028e38, -3.4028e38, -0.0]])
    for key in range(50):
        stored = to_bf16(values, torch.tensor([key]))[0]
        assert stored[:2].tolist() == [math.inf, -math.inf]
        assert stored[2].isnan()
        assert stored[3:5].isfinite().all()
        assert torch.signbit(stored[5])


def test_random_bits_are_uniform_and_independent():
    bits = random_bits(row_keys(torch.arange(1 << 14), torch.ones(1 << 14), 0), 32).double() / 65536
    assert bits.mean().item() == pytest.approx(0.5, abs=0.002)
    assert bits.var().item() == pytest.approx(1 / 12, rel=0.01)
    correlation = torch.corrcoef(bits.T) - torch.eye(32)
    assert correlation.abs().max() < 0.04
    for other in (
        row_keys(torch.arange(1 << 14) + 1, torch.ones(1), 0),
        row_keys(torch.arange(1 << 14), torch.full((1,), 2), 0),
    ):
        pair = torch.stack([bits[:, 0], random_bits(other, 1)[:, 0].double()])
        assert torch.corrcoef(pair)[0, 1].abs() < 0.04


def test_host_kernels_store_the_same_bits():
    values = awkward_values()
    rows = torch.arange(30) + (3 << 40)
    keys = row_keys(rows, torch.arange(30), seed=11)
    short = to_bf16(values, keys).view(torch.int16)
    (codes, exponents) = to_fp8(values, keys)
    scratch = row_codes.scratch_of(64, 2)
    w = scratch[0]
    w_bits = scratch[1]
    noise = scratch[-1]
    powers = np.float32(2) ** (np.arange(255) - 127)
    bf16 = np.empty((1, 64), np.uint16)
    fp8 = np.empty((1, 2, 32), np.uint8)
    scale = np.empty((1, 2), np.uint8)
    for i in range(30):
        key = row_codes.row_key(int(rows[i]), i, 11)
        assert int(key) == int(keys[i])
        w[0] = values[i].numpy()
        row_codes.encode_bf16(w_bits, key, bf16, 0, noise)
        row_codes.encode_fp8(scratch, key, fp8, scale, powers, 0)
        assert np.array_equal(bf16.view(np.int16)[0], short[i].numpy())
        assert np.array_equal(fp8.reshape(64), codes[i].numpy())
        assert np.array_equal(scale[0], exponents[i].numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMATS)
def test_host_kernels_read_the_same_bits(form, dtype):
    store = make_store(form, num_rows=30)
    store.write(torch.arange(30), awkward_values(), torch.arange(30))
    rows = torch.randint(
        0,
        30,
        (600,),
        generator=torch.Generator().manual_seed(1),
    )
    weight = store.weight[rows]
    expected = (
        from_fp8(weight, store.tensors["weight_scale"][rows], dtype)
        if form == "fp8"
        else weight.to(dtype)
    )
    assert torch.equal(store.read(rows, dtype).view(torch.uint8), expected.view(torch.uint8))

"""The Triton kernel of engram_hash: the same bits as PyTorch's path, whatever the ids, and golden
values.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.engram_hash import NgramHash, engram_hash, engram_hash_layers, ngram_hashes
from kernels.engram_hash.cpu import hash_rows
from tests.kernels.inputs.engram_hash import (
    DEMO,
    FIRST,
    LAST,
    SENTENCE,
    V41,
    VOCAB,
    random_case,
    small_hash,
)


def assert_same_bits(device, ids_BL, hash, seq_idx=None, history_BK=None):
    arguments = [x if x is None else x.to(device) for x in (seq_idx, history_BK)]
    rows = engram_hash(
        ids_BL.to(device),
        hash,
        *arguments,
        backend="triton",
    ).cpu()
    assert torch.equal(
        rows,
        engram_hash(
            ids_BL,
            hash,
            seq_idx,
            history_BK,
            backend="torch",
        ),
    )


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 10**6),
    length=st.integers(1, 90),
    orders=st.sampled_from([(1,), (2,), (3,), (2, 3), (2, 3, 4), (1, 4)]),
    vocab_size=st.sampled_from([1, 3, 1000, 99_092, 2**31]),
    table_size=st.sampled_from([1, 97, 16_000_000]),
    documents=st.booleans(),
    history=st.booleans(),
)
def test_same_bits(device, seed, length, orders, vocab_size, table_size, documents, history):
    torch.manual_seed(seed)
    hash = ngram_hashes(
        (4,), vocab_size, orders, 3, table_size, seed=seed, pad_id=seed % vocab_size
    )[4]
    ids_BL, seq_idx = random_case(length, vocab_size, masked_every=seed % 5)
    past = torch.randint(-1, vocab_size, (2, hash.max_order - 1)) if history else None
    assert_same_bits(
        device,
        ids_BL,
        hash,
        seq_idx if documents else None,
        past,
    )


def test_golden_sentence(device):
    rows_BLO = engram_hash(torch.tensor([SENTENCE], device=device), DEMO[1], backend="triton").cpu()
    index_BLO = rows_BLO - torch.tensor(DEMO[1].offsets)
    assert index_BLO[0, 0].tolist() == FIRST
    assert index_BLO[0, -1].tolist() == LAST


def test_both_ends_of_the_vocabulary(device):
    edges = torch.tensor([0, VOCAB - 1, 0, 0, VOCAB - 1, VOCAB - 1, VOCAB - 1, VOCAB - 2, 1])
    for hash in (*DEMO.values(), *V41.values()):
        assert_same_bits(device, edges[None], hash)


def test_all_layers_in_one_launch(device):
    ids_BL, seq_idx = random_case(33, VOCAB, masked_every=7)
    hashes = list(
        ngram_hashes(
            (0, 3, 9),
            VOCAB,
            (2, 3, 4),
            5,
            1000,
            seed=0,
            pad_id=2,
        ).values()
    )
    for backend in ("triton", "torch"):
        rows = engram_hash_layers(
            ids_BL.to(device), hashes, seq_idx.to(device), backend=backend
        ).cpu()
        assert rows.shape == (3, 2, 33, 15)
        for layer, hash in zip(rows, hashes, strict=True):
            assert torch.equal(layer, engram_hash(ids_BL, hash, seq_idx))


def test_different_numbers_of_heads_an_order(device):
    hash = NgramHash(
        multipliers=(3, 5, 7), primes=((11,), (13, 17, 19)), orders=(2, 3), vocab_size=30, pad_id=29
    )
    assert_same_bits(device, random_case()[0], hash)


def launch(device, ids_BL, multipliers, primes):
    """Without the checks, of one order and one head for each of the primes."""
    arguments = ([1], [len(primes)], list(multipliers), list(primes), 0)
    return torch.ops.engramba.engram_hash_fwd(
        ids_BL.to(device),
        None,
        None,
        *arguments,
    ).cpu()[0]


def test_products_that_wrap_and_mixes_below_zero(device):
    """Remainders are Python's, and never negative, at both ends of 64 bits and of the primes."""
    edges = [1, 2, 3, 2**31, 2**32 - 1, 2**62, 2**63 - 25, 2**63 - 2, 2**63 - 1]
    ids_BL = torch.tensor([[*edges, 0, 12345678901234567]])
    primes = [
        2,
        3,
        5,
        646_403,
        16_000_057,
        2**31 - 1,
        2**32 + 15,
        2**61 - 1,
        2**62 - 57,
        2**63 - 25,
    ]
    for multiplier in (1, 2**63 - 1, -1, -(2**63), 76632096046245):
        rows = launch(device, ids_BL, [multiplier], primes)
        starts = [sum(primes[:i]) for i in range(len(primes))]
        expected = [
            [
                ((x * multiplier + 2**63) % 2**64 - 2**63) % p + s
                for p, s in zip(primes, starts, strict=True)
            ]
            for x in ids_BL[0].tolist()
        ]
        wrapped = [[(y + 2**63) % 2**64 - 2**63 for y in row] for row in expected]
        assert rows[0].tolist() == wrapped


def test_ids_outside_the_vocabulary_stay_inside_the_tables(device):
    """On a GPU nothing looks for them."""
    primes = [p for heads in DEMO[1].primes for p in heads]
    ids_BL = torch.tensor([[VOCAB, 2**40, 2**62, -2, -(2**63)]])
    rows = launch(device, ids_BL, DEMO[1].multipliers[:1], primes)
    index = rows[0, :3] - torch.tensor(DEMO[1].offsets)
    assert ((index >= 0) & (index < torch.tensor(primes))).all()
    assert (rows[0, 3:] == -1).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint16, torch.uint8, torch.int8])
def test_any_integer_dtype(device, dtype):
    hash = small_hash(vocab_size=1000, pad_id=999)
    (ids_BL, seq_idx) = random_case()
    history_BK = torch.randint(0, 30, (2, 2)).to(dtype)
    assert_same_bits(device, ids_BL.to(dtype), hash)
    assert_same_bits(
        device,
        ids_BL.to(dtype),
        hash,
        seq_idx.to(torch.int32),
        history_BK,
    )


def test_views(device):
    hash = small_hash()
    wide = torch.randint(-1, 30, (40, 6))
    documents = (torch.rand(6, 40) < 0.2).cumsum(1)
    assert_same_bits(
        device,
        wide.T[1:4, 3:30],
        hash,
        documents[::2, 5:32],
        wide[:3, 2:4],
    )
    assert_same_bits(device, wide[:1].expand(5, 6), hash)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (1, 1), (3, 2)])
def test_empty_and_short_rows(device, shape):
    hash = small_hash(orders=(2, 3, 4))
    assert_same_bits(
        device, torch.zeros(shape, dtype=torch.int64), hash, torch.zeros(shape, dtype=torch.int32)
    )


def test_steps_with_history_equal_the_whole(device):
    hash = small_hash(orders=(2, 3, 4), pad_id=7)
    ids_BL = random_case(9, masked_every=9)[0].to(device)
    history_BK = torch.full((2, 3), 7, device=device)
    whole = engram_hash(ids_BL, hash, backend="triton")
    for t in range(ids_BL.shape[1]):
        step = engram_hash(
            ids_BL[:, t : t + 1],
            hash,
            history_BK=history_BK,
            backend="triton",
        )
        assert torch.equal(step, whole[:, t : t + 1])
        history_BK = torch.cat([history_BK, ids_BL[:, t : t + 1]], dim=1)[:, 1:]


def test_under_compilation(device):
    hash = small_hash()
    (ids_BL, seq_idx) = random_case(7, masked_every=4)
    ids_BL = ids_BL.to(device)
    seq_idx = seq_idx.to(device)

    def add_one(ids_BL, seq_idx):
        return engram_hash(ids_BL, hash, seq_idx, backend="triton") + 1

    compiled = torch.compile(add_one, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(ids_BL, seq_idx), add_one(ids_BL, seq_idx))
    functions = (
        list(hash.orders),
        [3, 3],
        list(hash.multipliers),
        [p for heads in hash.primes for p in heads],
        0,
    )
    torch.library.opcheck(
        torch.ops.engramba.engram_hash_fwd.default, (ids_BL, seq_idx, None, *functions)
    )


def test_hashes_that_do_not_fit_together_are_named():
    ids_BL = torch.zeros((1, 2), dtype=torch.int64)
    for other, message in {
        small_hash(orders=(2, 4)): r"hashes: got orders of \(2, 4\) beside \(2, 3\)",
        small_hash(vocab_size=31): "hashes: got vocab_size of 31 beside 30",
        small_hash(pad_id=1): "hashes: got pad_id of 1 beside 0",
        small_hash(num_heads=2): r"hashes: got heads of \[2, 2\] beside \[3, 3\]",
    }.items():
        with pytest.raises(ValueError, match=message):
            engram_hash_layers(ids_BL, [small_hash(), other])
    with pytest.raises(ValueError, match="hashes: got none"):
        engram_hash_layers(ids_BL, [])


def test_wrong_input_is_named(device):
    hash = small_hash()
    ids_BL = torch.zeros((1, 2), dtype=torch.int64)
    with pytest.raises(ValueError, match=r"seq_idx: got dtype torch.float32"):
        engram_hash(ids_BL, hash, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="history_BK: got a tensor on meta, expected cpu"):
        engram_hash(ids_BL, hash, None, ids_BL.to("meta"))
    wide = small_hash(num_heads=129)
    with pytest.raises(ValueError, match="do not serve 258 columns"):
        engram_hash(ids_BL.to(device), wide, backend="triton")


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    """2^31 + ids, a step from which the rows' places overflow 32 bits many times."""
    hash = small_hash(orders=(1, 2), num_heads=1)
    ids_BL = torch.randint(
        0,
        30,
        (2, 2**30 + 5),
        device="cuda",
        dtype=torch.uint8,
    )
    rows = engram_hash(ids_BL, hash)
    last = ids_BL[1:, -8:].to(torch.int64)
    assert torch.equal(rows[1:, -7:], hash_rows(last[:, 1:], hash, None, last[:, :1]))

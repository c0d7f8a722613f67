"""Engram hashing: golden values of the official code, the reference in Python integers, and its
properties.
"""

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.engram_hash import engram_hash, ngram_hashes
from kernels.engram_hash.layout import INT64_MAX
from kernels.engram_hash.reference import engram_hash_reference
from kernels.primes import is_prime
from tests.kernels.inputs.engram_hash import (
    DEMO,
    FIRST,
    LAST,
    PAD,
    SENTENCE,
    V41,
    VOCAB,
    random_case,
    small_hash,
)


def test_golden_multipliers():
    assert DEMO[1].multipliers == (76632096046245, 4839876093313, 35959672319349)
    assert DEMO[15].multipliers == (28919099099511, 56020370062535, 53929037264533)
    assert V41[1].multipliers == (*DEMO[1].multipliers, 73987337458391)
    assert V41[14].multipliers == (67716810739261, 51510806800915, 30921347202721, 82619226485591)


def test_golden_primes_and_rows():
    assert DEMO[1].primes == (
        (646403, 646411, 646421, 646423, 646433, 646453, 646519, 646523),
        (646537, 646543, 646549, 646571, 646573, 646577, 646609, 646619),
    )
    assert DEMO[15].primes == (
        (646631, 646637, 646643, 646669, 646687, 646721, 646757, 646771),
        (646781, 646823, 646831, 646837, 646843, 646859, 646873, 646879),
    )
    rows = [DEMO[1].num_rows, DEMO[15].num_rows, V41[1].num_rows, V41[14].num_rows]
    assert rows == [10_344_164, 10_348_242, 384_006_168, 384_016_682]
    assert (DEMO[1].num_columns, V41[1].num_columns) == (16, 24)


def test_golden_sentence():
    rows_BLO = engram_hash(torch.tensor([SENTENCE]), DEMO[1])
    assert rows_BLO.dtype == torch.int64
    index_BLO = rows_BLO - torch.tensor(DEMO[1].offsets)
    assert index_BLO[0, 0].tolist() == FIRST
    assert index_BLO[0, -1].tolist() == LAST


def test_is_prime_agrees_with_sympy():
    numbers = [*range(3000), *range(10**12, 10**12 + 300), INT64_MAX, 2**61 - 1, 646403 * 646411]
    numbers += [
        2047,
        3215031751,
        341550071728321,
        3825123056546413051,
    ]  # strong pseudoprimes to the first bases
    assert [n for n in numbers if is_prime(n) != sympy.isprime(n)] == []


@settings(max_examples=40, deadline=None)
@given(
    layers=st.lists(
        st.integers(0, 40),
        min_size=1,
        max_size=3,
        unique=True,
    ),
    vocab_size=st.sampled_from([1, 2, 37, 99_092, 2**31]),
    num_orders=st.integers(1, 3),
    num_heads=st.integers(1, 4),
    table_size=st.integers(1, 2000),
)
def test_tables_are_distinct_primes_side_by_side(
    layers, vocab_size, num_orders, num_heads, table_size
):
    orders = tuple(range(2, 2 + num_orders))
    hashes = ngram_hashes(
        layers,
        vocab_size,
        orders,
        num_heads,
        table_size,
        seed=3,
        pad_id=0,
    )
    primes = [p for layer in layers for heads in hashes[layer].primes for p in heads]
    assert list(hashes) == layers
    assert len(set(primes)) == len(primes) == len(layers) * num_orders * num_heads
    assert all(p >= table_size and sympy.isprime(p) for p in primes)
    for hash in hashes.values():
        sizes = [p for heads in hash.primes for p in heads]
        assert [*hash.offsets, hash.num_rows] == [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        assert all(
            m % 2 == 1 and 0 < m <= INT64_MAX // max(1, vocab_size - 1) for m in hash.multipliers
        )


def test_one_table_size_an_order_and_the_unused_prime_rule():
    hash = ngram_hashes(
        (0,),
        100,
        (2, 3),
        2,
        (10, 11),
        seed=0,
        pad_id=0,
    )[0]
    assert hash.primes == ((11, 13), (17, 19))


def test_hashes_do_not_depend_on_global_random_state():
    assert (
        ngram_hashes(
            (1, 15),
            VOCAB,
            (2, 3),
            8,
            646_400,
            seed=0,
            pad_id=PAD,
        )
        == DEMO
    )
    assert (
        ngram_hashes(
            (1,),
            VOCAB,
            (2, 3),
            8,
            646_400,
            seed=1,
            pad_id=PAD,
        )[1].multipliers
        != DEMO[1].multipliers
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    length=st.integers(1, 20),
    orders=st.sampled_from([(1,), (2,), (3,), (2, 3), (2, 3, 4), (1, 4)]),
    vocab_size=st.sampled_from([1, 3, 1000, 99_092]),
    documents=st.booleans(),
    history=st.booleans(),
)
def test_equals_the_reference(seed, length, orders, vocab_size, documents, history):
    torch.manual_seed(seed)
    hash = ngram_hashes(
        (4,),
        vocab_size,
        orders,
        3,
        97,
        seed=seed,
        pad_id=seed % vocab_size,
    )[4]
    ids_BL, seq_idx = random_case(length, vocab_size, masked_every=seed % 5)
    past = torch.randint(-1, vocab_size, (2, hash.max_order - 1)) if history else None
    args = (ids_BL, hash, seq_idx if documents else None, past)
    assert torch.equal(engram_hash(*args), engram_hash_reference(*args))


def test_largest_ids_neither_overflow_nor_leave_the_tables():
    for hash in (*DEMO.values(), *V41.values()):
        ids_BL = torch.full((1, 6), VOCAB - 1)
        rows_BLO = engram_hash(ids_BL, hash)
        assert torch.equal(rows_BLO, engram_hash_reference(ids_BL, hash))
        index = rows_BLO - torch.tensor(hash.offsets)
        assert (index >= 0).all()
        assert (index < torch.tensor([p for heads in hash.primes for p in heads])).all()


def test_a_row_depends_on_its_window_only():
    hash = small_hash(orders=(2, 3, 4), table_size=5000)
    ids_BL, _ = random_case()
    changed = ids_BL.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 30
    differs_LO = (engram_hash(ids_BL, hash) != engram_hash(changed, hash)).any(0)
    for order in hash.orders:
        heads = slice(3 * (order - 2), 3 * (order - 1))
        expected = [10 <= t < 10 + order for t in range(23)]
        assert differs_LO[:, heads].all(1).tolist() == expected
        assert differs_LO[:, heads].any(1).tolist() == expected


def test_packed_documents_equal_separate_ones():
    hash = small_hash(orders=(2, 3, 4), pad_id=7)
    ids_BL, seq_idx = random_case(length=40)
    packed = engram_hash(ids_BL, hash, seq_idx)
    for b in range(2):
        for document in seq_idx[b].unique():
            inside = seq_idx[b] == document
            assert torch.equal(packed[b, inside], engram_hash(ids_BL[b : b + 1, inside], hash)[0])
    assert not torch.equal(packed, engram_hash(ids_BL, hash))


def test_masked_positions_block_their_windows_and_no_other():
    hash = small_hash(orders=(2, 3))
    ids_BL = torch.tensor([[5, 6, -1, 8, 9, 10]])
    blocked = engram_hash(ids_BL, hash) == -1
    assert blocked[0, :, :3].all(1).tolist() == [False, False, True, True, False, False]
    assert blocked[0, :, 3:].all(1).tolist() == [False, False, True, True, True, False]
    assert torch.equal(blocked.any(-1), blocked[..., 3:].any(-1))
    ids_BL[0, 2] = 7
    assert torch.equal(
        engram_hash(ids_BL, hash)[0, 5], engram_hash(torch.tensor([[8, 9, 10]]), hash)[0, 2]
    )


def test_masked_position_of_another_document_does_not_block():
    hash = small_hash()
    rows = engram_hash(torch.tensor([[-1, 4, 5]]), hash, torch.tensor([[0, 1, 1]]))
    assert (rows[0, 0] == -1).all()
    assert torch.equal(rows[:, 1:], engram_hash(torch.tensor([[4, 5]]), hash))


def test_steps_with_history_equal_the_whole():
    hash = small_hash(orders=(2, 3, 4), pad_id=7)
    ids_BL, _ = random_case(masked_every=9)
    whole = engram_hash(ids_BL, hash)
    history_BK = torch.full((2, 3), 7)
    for t in range(ids_BL.shape[1]):
        step = engram_hash(ids_BL[:, t : t + 1], hash, history_BK=history_BK)
        assert torch.equal(step, whole[:, t : t + 1])
        history_BK = torch.cat([history_BK, ids_BL[:, t : t + 1]], dim=1)[:, 1:]


@pytest.mark.parametrize("cut", [1, 2, 9, 22])
def test_chunks_with_history_equal_the_whole_in_packed_rows(cut):
    hash = small_hash(orders=(2, 3))
    ids_BL, _ = random_case()
    seq_idx = torch.tensor([[0] * 11 + [1] * 12] * 2)
    padded = torch.cat([torch.full((2, 2), hash.pad_id), ids_BL], dim=1)
    history = torch.where(
        seq_idx[:, cut - 1 : cut] == seq_idx[:, cut : cut + 1],
        padded[:, cut : cut + 2],
        hash.pad_id,
    )
    rest = engram_hash(
        ids_BL[:, cut:],
        hash,
        seq_idx[:, cut:],
        history,
    )
    assert torch.equal(rest, engram_hash(ids_BL, hash, seq_idx)[:, cut:])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint16, torch.uint8])
def test_any_integer_dtype(dtype):
    hash = small_hash()
    ids_BL = random_case()[0]
    assert torch.equal(engram_hash(ids_BL.to(dtype), hash), engram_hash(ids_BL, hash))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (1, 1), (3, 2)])
def test_empty_and_short_rows(shape):
    hash = small_hash(orders=(2, 3, 4))
    rows_BLO = engram_hash(
        torch.zeros(shape, dtype=torch.int64), hash, torch.zeros(shape, dtype=torch.int32)
    )
    assert rows_BLO.shape == (*shape, 9)
    assert rows_BLO.dtype == torch.int64


@pytest.mark.parametrize(
    ("ids", "kwargs", "message"),
    [
        ([[1, 30]], {}, "ids_BL: got id 30, expected -1 .masked. to vocab_size - 1 = 29"),
        ([[1, -2]], {}, "ids_BL: got id -2"),
        ([1, 2], {}, r"ids_BL: got shape \(2,\)"),
        ([[1.0]], {}, "ids_BL: got dtype torch.float32"),
        (
            [[1, 2]],
            {"seq_idx": torch.zeros(1, 3, dtype=torch.int64)},
            r"seq_idx: got shape \(1, 3\), expected \(1, 2\)",
        ),
        (
            [[1, 2]],
            {"history_BK": torch.zeros(1, 1, dtype=torch.int64)},
            r"history_BK: got shape \(1, 1\)",
        ),
        ([[1, 2]], {"history_BK": torch.full((1, 2), 30)}, "history_BK: got id 30"),
    ],
)
def test_wrong_input_is_named(ids, kwargs, message):
    with pytest.raises(ValueError, match=message):
        engram_hash(torch.tensor(ids), small_hash(), **kwargs)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"layers": (1, 1)}, "layers"),
        ({"layers": (-1,)}, "layers"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"orders": ()}, "orders"),
        ({"orders": (3, 2)}, "orders"),
        ({"orders": (0, 1)}, "orders"),
        ({"num_heads": 0}, "num_heads"),
        ({"table_size": 0}, "table_size"),
        ({"table_size": (5, 5, 5)}, "table_size"),
        ({"pad_id": 10}, "pad_id"),
        ({"pad_id": -1}, "pad_id"),
    ],
)
def test_wrong_layout_is_named(change, name):
    arguments = {
        "layers": (1,),
        "vocab_size": 10,
        "orders": (2, 3),
        "num_heads": 2,
        "table_size": 9,
        "seed": 0,
        "pad_id": 0,
    }
    with pytest.raises(ValueError, match=f"^{name}: got"):
        ngram_hashes(**{**arguments, **change})

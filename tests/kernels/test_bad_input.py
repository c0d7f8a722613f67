"""What every public op refuses, argument by argument: other dtypes, devices and ranks, wrong
documents, growing decays.

Shapes that disagree are tested with each op.
"""

from functools import partial

import pytest
import torch

from kernels import backend
from kernels.causal_attention import causal_attention
from kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from kernels.engram_gate import engram_gate
from kernels.engram_hash import engram_hash, ngram_hashes
from kernels.grouped_matmul import grouped_matmul, grouped_mlp
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.lti_conv import lti_conv, s4d_kernel
from kernels.moe_permute import permute, unpermute
from kernels.rms_norm import gated_rms_norm, rms_norm
from kernels.rotary import apply_rotary
from kernels.route import choose_experts, route
from kernels.segment_sum import sum_sorted
from kernels.selective_scan import selective_scan
from kernels.sinkhorn_knopp import sinkhorn_knopp
from kernels.ssd import ssd
from kernels.state_update import state_update
from kernels.swiglu import swiglu

HASH = ngram_hashes((4,), 50, (2, 3), 2, 97, seed=1, pad_id=0)[4]
IDS = torch.tensor([[0, 1], [2, 0], [1, 2]])


def r(*shape):
    """Numbers below zero, as a decay may be."""
    return -0.1 - torch.rand(*shape)


def seq_idx():
    """Two packed rows of six tokens."""
    return torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 2, 2, 2, 2]], dtype=torch.int32)


def unpermuted(y_MD, weights_TK, **options):
    """Of a permutation that is right."""
    return unpermute(
        y_MD,
        permute(torch.zeros(3, 4), IDS, 3)[1],
        weights_TK,
        **options,
    )


def hashed(ids_BL, seq_idx, history_BK, **options):
    """Row ids by the hash functions of one layer."""
    return engram_hash(ids_BL, HASH, seq_idx, history_BK, **options)


OPS = {
    "ssd": (
        ssd,
        lambda: {
            "x": r(2, 6, 4, 3),
            "dt": r(2, 6, 4),
            "A": r(4),
            "B": r(2, 6, 2, 5),
            "C": r(2, 6, 2, 5),
            "D": r(4),
            "z": r(2, 6, 4, 3),
            "dt_bias": r(4),
            "initial_states": r(2, 4, 3, 5),
            "seq_idx": seq_idx(),
        },
    ),
    "ssd, documents with states": (
        ssd,
        lambda: {
            "x": r(2, 6, 4, 3),
            "dt": r(2, 6, 4),
            "A": r(4),
            "B": r(2, 6, 2, 5),
            "C": r(2, 6, 2, 5),
            "initial_states": r(2, 3, 4, 3, 5),
            "seq_idx": seq_idx(),
        },
    ),
    "selective_scan": (
        selective_scan,
        lambda: {
            "u": r(2, 4, 6),
            "delta": r(2, 4, 6),
            "A": r(4, 3),
            "B": r(2, 3, 6),
            "C": r(2, 3, 6),
            "D": r(4),
            "z": r(2, 4, 6),
            "delta_bias": r(4),
            "initial_state": r(2, 4, 3),
            "seq_idx": seq_idx(),
        },
    ),
    "causal_conv1d": (
        causal_conv1d,
        lambda: {
            "x_BLD": r(2, 6, 4),
            "weight_DK": r(4, 3),
            "bias": r(4),
            "seq_idx": seq_idx(),
            "initial_states": r(2, 2, 4),
        },
    ),
    "causal_conv1d_step": (
        causal_conv1d_step,
        lambda: {
            "x_BD": r(2, 4),
            "conv_state": r(2, 2, 4),
            "weight": r(4, 3),
            "bias": r(4),
        },
    ),
    "rms_norm": (rms_norm, lambda: {"x": r(2, 4), "weight": r(4)}),
    "gated_rms_norm": (gated_rms_norm, lambda: {"x": r(2, 4), "z": r(2, 4), "weight": r(4)}),
    "state_update, Mamba-2": (
        state_update,
        lambda: {
            "state": r(2, 4, 3, 5),
            "x": r(2, 4, 3),
            "dt": r(2, 4),
            "A": r(4),
            "B": r(2, 2, 5),
            "C": r(2, 2, 5),
            "D": r(4),
            "z": r(2, 4, 3),
            "dt_bias": r(4),
        },
    ),
    "state_update, Mamba-1": (
        state_update,
        lambda: {
            "state": r(2, 4, 5),
            "x": r(2, 4),
            "dt": r(2, 4),
            "A": r(4, 5),
            "B": r(2, 5),
            "C": r(2, 5),
            "D": r(4),
            "z": r(2, 4),
            "dt_bias": r(4),
        },
    ),
    "permute": (
        partial(permute, num_experts=3),
        lambda: {"x_TD": r(3, 4), "expert_ids_TK": IDS.clone()},
    ),
    "unpermute": (unpermuted, lambda: {"y_MD": r(6, 4), "weights_TK": r(3, 2)}),
    "grouped_matmul": (
        grouped_matmul,
        lambda: {
            "x_MD": r(5, 4),
            "weight_EDF": r(2, 4, 3),
            "counts_E": torch.tensor([2, 3]),
        },
    ),
    "grouped_mlp": (
        grouped_mlp,
        lambda: {
            "x_MD": r(5, 4),
            "counts_E": torch.tensor([2, 3]),
            "gate_up_ED2F": r(2, 4, 6),
            "down_EFD": r(2, 3, 4),
        },
    ),
    "swiglu": (swiglu, lambda: {"h": r(2, 4)}),
    "route": (partial(route, top_k=2), lambda: {"logits_TE": r(3, 4), "bias_E": r(4)}),
    "choose_experts": (
        partial(choose_experts, top_k=2),
        lambda: {"scores_TE": r(3, 4), "bias_E": r(4)},
    ),
    "engram_hash": (
        hashed,
        lambda: {
            "ids_BL": torch.randint(0, 50, (2, 6)),
            "seq_idx": seq_idx(),
            "history_BK": torch.zeros(2, 2).long(),
        },
    ),
    "engram_gate": (
        partial(engram_gate, eps=1e-5),
        lambda: {
            "h_BLSD": r(2, 6, 2, 4),
            "k_BLSD": r(2, 6, 2, 4),
            "v_BLD": r(2, 6, 4),
            "query_weight_SD": r(2, 4),
            "key_weight_SD": r(2, 4),
            "masked_BL": torch.zeros(2, 6, dtype=torch.bool),
        },
    ),
    "sum_sorted": (
        sum_sorted,
        lambda: {
            "rows_MW": r(5, 3),
            "order_N": torch.arange(5),
            "starts_S": torch.tensor([0, 2]),
        },
    ),
    "linear_cross_entropy": (
        linear_cross_entropy,
        lambda: {
            "hidden_TD": r(3, 4),
            "weight_VD": r(7, 4),
            "targets_T": torch.tensor([0, 6, -100]),
        },
    ),
    "sinkhorn_knopp": (sinkhorn_knopp, lambda: {"logits_NN": r(2, 4, 4)}),
    "lti_conv": (
        lti_conv,
        lambda: {"u_BDL": r(2, 4, 6), "K_DL": r(4, 6), "D": r(4), "seq_idx": seq_idx()},
    ),
    "rotary": (
        partial(apply_rotary, theta=1e4),
        lambda: {
            "x_BLHP": r(2, 6, 1, 4),
            "positions_BL": torch.arange(6).expand(2, 6),
        },
    ),
    "causal_attention": (
        causal_attention,
        lambda: {
            "q_BLHP": r(2, 6, 2, 4),
            "k_BLGP": r(2, 6, 1, 4),
            "v_BLGP": r(2, 6, 1, 4),
            "seq_idx": seq_idx(),
        },
    ),
}
ARGUMENTS = [(op, name) for op, (_, make) in OPS.items() for name in make()]
NO_TRITON = ("lti_conv", "rotary", "causal_attention")


def refused(op, change, *names):
    """The call raises a ValueError that begins with one of the names, or with what they are without
    a suffix.
    """
    fn, make = OPS[op]
    fn(**make())
    with pytest.raises(ValueError, match=r"got|expected") as caught:
        fn(**make() | change)
    starts = [start for name in names for start in (name, name.split("_")[0])]
    assert str(caught.value).startswith(tuple(starts)), caught.value


@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_other_dtypes(op, name):
    given = OPS[op][1]()[name]
    wrong = [torch.complex64, torch.bool if given.dtype is not torch.bool else torch.int64]
    wrong += [torch.int64, torch.float8_e4m3fn] if given.is_floating_point() else [torch.float32]
    matrices = {
        "x_MD": ("weight_EDF", "gate_up_ED2F"),
        "q_BLHP": ("k_BLGP",),
        "x": ("B",),
        "hidden_TD": ("weight_VD",),
    }
    for dtype in wrong:
        refused(
            op,
            {name: given.to(dtype)},
            name,
            *matrices.get(name, ()),
        )


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, name in ARGUMENTS if len(OPS[op][1]()) > 1]
)
def test_another_device(op, name):
    first, *others = OPS[op][1]()
    refused(
        op,
        {name: OPS[op][1]()[name].to("meta")},
        *([name] if name != first else [*others, "permutation"]),
    )


@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_a_scalar_for_a_tensor(op, name):
    refused(
        op,
        {name: OPS[op][1]()[name].new_zeros(())},
        name,
        "scores_TE",
    )


@pytest.mark.parametrize("op", [op for op, name in ARGUMENTS if name == "seq_idx"])
@pytest.mark.parametrize(
    ("row", "message"),
    [([-1, 0, 0, 1, 1, 1], "got -1, expected documents"), ([1, 0, 0, 1, 1, 1], "that falls")],
)
def test_documents_are_numbered_upwards_from_zero(op, row, message):
    fn, make = OPS[op]
    with pytest.raises(ValueError, match=f"^seq_idx: .*{message}"):
        fn(**make() | {"seq_idx": torch.tensor([row, row], dtype=torch.int32)})


@pytest.mark.parametrize("op", [op for op, name in ARGUMENTS if name == "A"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_what_does_not_decay(op, value):
    fn, make = OPS[op]
    A = make()["A"]
    A.view(-1)[-1] = value
    with pytest.raises(ValueError, match=r"^A: got .*, expected negative values"):
        fn(**make() | {"A": A})


def test_a_convolution_kernel_that_does_not_decay():
    with pytest.raises(ValueError, match=r"^A_DN: got 0.0, expected negative values"):
        s4d_kernel(
            torch.ones(1),
            torch.tensor([[-1.0 + 3j, 2j]]),
            torch.ones(1, 2, dtype=torch.complex64),
            4,
        )


@pytest.mark.parametrize(
    ("op", "name", "value"),
    [
        ("permute", "expert_ids_TK", torch.tensor([[0, 1], [2, 3], [1, 2]])),
        ("engram_hash", "ids_BL", torch.full((2, 6), 50)),
        ("engram_hash", "history_BK", torch.full((2, 2), -2)),
        ("linear_cross_entropy", "targets_T", torch.tensor([0, 7, 1])),
        ("sum_sorted", "order_N", torch.tensor([0, 1, 5])),
        ("sum_sorted", "order_N", torch.tensor([0, -1, 2])),
        ("sum_sorted", "starts_S", torch.tensor([1, 2])),
        ("sum_sorted", "starts_S", torch.tensor([0, 3, 2])),
        ("sum_sorted", "starts_S", torch.tensor([0, 6])),
    ],
)
def test_ids_beyond_the_table(op, name, value):
    refused(op, {name: value}, name)


@pytest.mark.parametrize(
    ("op", "name"), [("state_update, Mamba-2", "state"), ("causal_conv1d_step", "conv_state")]
)
def test_states_that_share_memory(op, name):
    state = OPS[op][1]()[name]
    refused(op, {name: state[:1].expand_as(state)}, name)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn])
def test_a_norm_of_another_dtype(dtype):
    with pytest.raises(ValueError, match=r"^out_dtype: got"):
        rms_norm(torch.ones(2, 3), out_dtype=dtype)


@pytest.mark.parametrize("op", [op for op in OPS if op not in NO_TRITON])
def test_triton_by_name_without_cuda_has_no_stand_in(op, monkeypatch):
    """As it is where nothing interprets the kernels."""
    monkeypatch.setattr(backend, "_interpreted", lambda: False)
    fn, make = OPS[op]
    with pytest.raises(
        ValueError, match=r"^backend: got 'triton', but the tensors are on cpu, not on CUDA"
    ):
        fn(**make(), backend="triton")
    with pytest.raises(
        ValueError, match=r"^backend: got 'cuda', expected 'torch', 'triton' or None"
    ):
        fn(**make(), backend="cuda")

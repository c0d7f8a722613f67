"""What one initial state a packed document adds to a scan that began every document from zero.

The scan is linear in its initial state: document s of row b adds d_t (C_t S_bs) to y_t, where d_t =
exp(Σ Δ A) from the document's first token to t, and d_t S_bs to the state after t. Heads of a group
share C, so the products are those of a grouped matmul whose rows are the tokens, once a group, and
whose experts are the documents. Plain differentiable operations; a card is waited for only where
``grouped_matmul`` has no kernel (fp64) or is asked for backend "torch".

Shape suffixes: B batch, L length, C chunks, Q chunk length, S documents of a row, G groups, J heads
of a group (H = G·J heads), P head width, N state size, R rows of a group (G·B).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import Backend
from kernels.grouped_matmul import grouped_matmul
from kernels.grouped_matmul.op import MAX_TRITON_EXPERTS

_CHUNK = 64


def add_document_states(
    y: Tensor,
    final: Tensor,
    C: Tensor,
    dt: Tensor,
    A: Tensor,
    z: Tensor | None,
    initial_states: Tensor,
    seq_idx: Tensor,
    backend: Backend | None,
) -> tuple[Tensor, Tensor]:
    """y and final states of the scan whose documents start from ``initial_states``.

    The sum is taken in the dtype of dt and rounded after the gate; y was rounded to its own dtype
    before.

    Args:
        y: (B, L, H, P), of the scan from zero, not gated.
        final: (B, H, P, N), of the scan from zero.
        C: (B, L, G, N), dtype of y, which the products run in.
        dt: (B, L, H), step sizes after bias, softplus and limit, in fp32 (fp64 for fp64).
        A: (H,), same dtype.
        z: (B, L, H, P), gate of the sum.
        initial_states: (B, S, H, P, N).
        seq_idx: (B, L), below S; on a card an index beyond is a device-side assertion.
        backend: of ``grouped_matmul``.
    """
    by_group = C.shape[2], y.shape[2] // C.shape[2]
    decay_BLH = _sums_within_documents(dt * A, seq_idx).exp()
    states_GBSNJP = (
        initial_states.to(y.dtype)
        .unflatten(2, by_group)
        .permute(
            2,
            0,
            1,
            5,
            3,
            4,
        )
    )
    products_BLGJP = _products(C, states_GBSNJP, seq_idx, backend)
    added = products_BLGJP * decay_BLH.unflatten(2, by_group)[..., None]
    total = (y.unflatten(2, by_group) + added).flatten(2, 3)
    if z is not None:
        total = total * F.silu(z.to(total.dtype))
    if seq_idx.shape[1]:
        rows = torch.arange(len(seq_idx), device=seq_idx.device)
        of_last = initial_states[rows, seq_idx[:, -1].long()]
        final = final + decay_BLH[:, -1, :, None, None] * of_last
    return total.to(y.dtype), final


def _products(
    C_BLGN: Tensor, states_GBSNJP: Tensor, seq_idx: Tensor, backend: Backend | None
) -> Tensor:
    """C times the state of each token's document, (B, L, G, J, P): a grouped matmul of as many rows
    as it can take.
    """
    groups, batch, documents, _, heads, width = states_GBSNJP.shape
    C_RLN = C_BLGN.permute(2, 0, 1, 3).flatten(0, 1)
    # As `torch._grouped_mm` wants it.
    states_RSNF = states_GBSNJP.flatten(0, 1).flatten(-2).contiguous()
    numbers = torch.arange(documents, device=seq_idx.device, dtype=seq_idx.dtype).expand(batch, -1)
    ends_BS = torch.searchsorted(seq_idx.contiguous(), numbers.contiguous(), right=True)
    counts_RS = ends_BS.diff(dim=1, prepend=torch.zeros_like(ends_BS[:, :1])).repeat(groups, 1)
    step = max(1, MAX_TRITON_EXPERTS // max(1, documents))
    parts = []
    for start in range(0, max(1, len(C_RLN)), step):
        C, states, counts = (
            t[start : start + step].flatten(0, 1) for t in (C_RLN, states_RSNF, counts_RS)
        )
        parts.append(grouped_matmul(C, states, counts, backend))
    products = parts[0] if len(parts) == 1 else torch.cat(parts)
    return products.view(
        groups,
        batch,
        seq_idx.shape[1],
        heads,
        width,
    ).permute(
        1,
        2,
        0,
        3,
        4,
    )


def _sums_within_documents(a_BLH: Tensor, seq_idx: Tensor) -> Tensor:
    """Running sums along each row that start anew with each document.

    Inside chunks they are products with 0 and 1; what enters a chunk is a running sum of the
    chunks' totals. A difference of sums over the whole row would lose digits with its length, and
    let rounding pass between documents.
    """
    length = a_BLH.shape[1]
    chunk = max(1, min(_CHUNK, length))
    missing = -length % chunk
    chunks = -(-length // chunk)
    a_BCQH = F.pad(a_BLH, (0, 0, 0, missing)).unflatten(1, (chunks, chunk))
    seq_BCQ = torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, missing)], 1).view(*a_BCQH.shape[:3])
    same = (seq_BCQ[..., :, None] == seq_BCQ[..., None, :]).tril()
    sums = same.to(a_BCQH.dtype) @ a_BCQH
    if chunks > 1:
        last_BC = seq_BCQ[..., -1]
        entering = _sums_within_documents(sums[:, :, -1], last_BC)[:, :-1, None]
        continues = (seq_BCQ[:, 1:] == last_BC[:, :-1, None])[..., None]
        sums = sums + F.pad(torch.where(continues, entering, 0.0), (0, 0, 0, 0, 1, 0))
    return sums.flatten(1, 2)[:, :length]

"""Embedding and head: padding is never predicted, a tied matrix adds both gradients."""

import torch

from parallel.placement import placed_parameters
from tests.helpers.compare import assert_close
from tests.helpers.tiny import VOCAB
from tests.training.model.models import build, build_tables, fetch, loss_of, run_config


def test_padded_vocabulary_is_never_predicted():
    config = run_config()
    model = build(config)
    tables = build_tables(config)
    assert model.head.weight.shape[0] == model.embedding.weight.shape[0] == 256
    loss, _ = loss_of(model, tables)
    loss.backward()
    assert not model.head.weight.grad[VOCAB:].any()
    assert not model.embedding.weight.grad[VOCAB:].any()
    assert model.head.weight.grad[:VOCAB].any(1).all()
    with torch.no_grad():
        model.head.weight[VOCAB:] = 1e4
    assert torch.equal(loss_of(model, tables)[0], loss)
    ids_BL = torch.randint(0, VOCAB, (1, 5))
    assert model.logits(ids_BL, None, fetch(tables, ids_BL, None)).shape == (1, 5, VOCAB)


def test_tied_embeddings_add_both_gradients():
    tied = build(run_config(tie_embeddings=True))
    untied = build(run_config())
    tables = build_tables(run_config())
    for model in (tied, build(run_config(tie_embeddings=True), dtype=torch.bfloat16)):
        assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(placed_parameters(tied))
    values = {**untied.state_dict(), **tied.state_dict()}
    untied.load_state_dict({**values, "head.weight": values["embedding.weight"]})
    losses = [loss_of(model, tables)[0] for model in (tied, untied)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    assert_close(
        "gradient",
        tied.embedding.weight.grad,
        untied.embedding.weight.grad + untied.head.weight.grad,
        1e-6,
    )

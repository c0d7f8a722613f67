"""Which class of transformers holds a model: what its ``generate`` says is our own greedy
continuation of the same weights; why none fits.
"""

from dataclasses import replace

import pytest
import torch

from parallel.mesh import single_mesh
from tests.helpers.saved import sample_ids, save_run
from tests.helpers.tiny import VOCAB, tiny_config
from tests.training.checkpoint.exchange.models import GROUPS, ROPE, SOFTMAX, config_of
from training.checkpoint import load_weights
from training.checkpoint.exchange.exporting import choose_family, export
from training.checkpoint.exchange.importing import import_model
from training.decode.generate import continue_tokens
from training.model.model import build_model

GRANITE = "GraniteMoeHybridForCausalLM"
NEMOTRON = "NemotronHForCausalLM"
NUM_TOKENS = 8
LONE_EXPERTS = replace(SOFTMAX, shared_dim=0, top_k=1)
CASES = [
    ("Mamba2ForCausalLM", {"pattern": "M"}),
    ("Mamba2ForCausalLM", {"pattern": "MMM", "mamba2": GROUPS, "tie_embeddings": True}),
    ("MambaForCausalLM", {"pattern": "S"}),
    ("MambaForCausalLM", {"pattern": "SS"}),
    (NEMOTRON, {"pattern": "*"}),
    (NEMOTRON, {"pattern": "M*", "mamba2": GROUPS}),
    (NEMOTRON, {"pattern": "*MM"}),
    (GRANITE, {"pattern": "*", "attention": ROPE}),
    (GRANITE, {"pattern": "M*M", "attention": ROPE}),
    (GRANITE, {"pattern": "*-"}),
    (GRANITE, {"pattern": "M-*", "tie_embeddings": True}),
    (GRANITE, {"pattern": "*E", "moe": LONE_EXPERTS}),
    (GRANITE, {"pattern": "MEM*EM", "moe": SOFTMAX, "attention": ROPE}),
    (GRANITE, {"pattern": "M-"}),
    (GRANITE, {"pattern": "MM-M", "mamba2": GROUPS, "tie_embeddings": True}),
    (GRANITE, {"pattern": "ME", "moe": SOFTMAX}),
    (GRANITE, {"pattern": "MEM", "moe": LONE_EXPERTS}),
]


def our_tokens(path, config, prompts: list[list[int]]) -> list[list[int]]:
    """Our greedy continuations of ``prompts``; no token ends them."""
    model = build_model(
        config.model, single_mesh(), seed=99, dtype=torch.float32, device=torch.device("cpu")
    ).eval()
    load_weights(path, model, single_mesh(), None)
    unused = torch.Generator()
    return [
        continue_tokens(
            model,
            None,
            ids,
            NUM_TOKENS,
            0.0,
            1.0,
            unused,
            -1,
            VOCAB,
        )
        for ids in prompts
    ]


def their_tokens(model, prompts: list[list[int]]) -> list[list[int]]:
    ids = torch.tensor(prompts)
    mask = torch.ones_like(ids)
    found = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return found[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("architecture", "fields"),
    CASES,
    ids=lambda value: value if isinstance(value, str) else value["pattern"],
)
def test_greedy_continuations_are_ours(architecture, fields, transformers, tmp_path):
    config = tiny_config(engram=None, **fields)
    path = save_run(config, tmp_path / "run", 1)[0]
    assert export(path, tmp_path / "out").architecture == architecture
    prompts = sample_ids()[:, :9].tolist()
    cases = [prompts, prompts[:1], [ids[:1] for ids in prompts]]
    expected = [our_tokens(path, config, case) for case in cases]
    automatic = transformers.AutoModelForCausalLM
    theirs = automatic.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    theirs.save_pretrained(tmp_path / "again")
    again = automatic.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    assert (
        again.config.use_cache
        == theirs.config.use_cache
        == ("*" in fields["pattern"] or architecture != GRANITE)
    )
    for model in (theirs, again):
        assert model(torch.tensor(prompts)).logits.shape == (2, 9, VOCAB)
        assert [their_tokens(model, case) for case in cases] == expected
    import_model(tmp_path / "again", tmp_path / "back")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"pattern": "ML"}, "it has no layers L as ours"),
        ({"pattern": "MM", "num_streams": 4}, "one residual stream, not 4"),
        ({"pattern": "MM", "engram": tiny_config().model.engram}, "no Engram memory"),
        ({"pattern": "MEE", "moe": SOFTMAX}, "each follow a mixer"),
        ({"pattern": "EM", "moe": SOFTMAX}, "each follow a mixer"),
        ({"pattern": "MEM-", "moe": SOFTMAX}, "all experts or all none"),
        (
            {"pattern": "ME", "moe": replace(SOFTMAX, scores="sigmoid")},
            "weighed by a softmax, ours by moe.scores=sigmoid",
        ),
        (
            {"pattern": "ME", "moe": replace(SOFTMAX, route_scale=2.5)},
            "sum to 1, ours to moe.route_scale=2.5",
        ),
        ({"pattern": "ME", "moe": replace(SOFTMAX, capacity_factor=1.0)}, "drop no tokens"),
    ],
)
def test_why_no_class_fits(fields, reason):
    family, misfits = choose_family(config_of(**fields).model, biased=False)
    assert family is None
    assert any(reason in told for told in misfits["GraniteMoeHybridForCausalLM"])

"""Text from a model: what the nucleus holds, and that decoding with states equals the whole
forward.
"""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import RunError
from parallel.mesh import single_mesh
from tests.helpers.runs import run_forked, words
from tests.helpers.tiny import made_up_token_map, tiny_config
from training.decode.generate import continue_tokens, generate, sample
from training.decode.loaded_model import load_model
from training.engram.memory import build_memory, memory_of
from training.model.model import build_model

logits = st.lists(st.floats(-20, 20), min_size=1, max_size=40)


def nucleus(logits_V: torch.Tensor, temperature: float, top_p: float) -> set[int]:
    """The fewest likeliest tokens that hold ``top_p``, and all that tie with the last of them."""
    probabilities = torch.softmax(logits_V.double() / temperature, -1).tolist()
    held = 0.0
    limit = 0.0
    for probability in sorted(probabilities, reverse=True):
        limit = probability
        held += probability
        if held >= top_p - 1e-9:
            break
    return {
        token
        for token, probability in enumerate(probabilities)
        if probability >= limit * (1 - 1e-9)
    }


@given(
    logits,
    st.floats(0.05, 5),
    st.floats(0.01, 1),
    st.integers(0, 2**31),
)
def test_a_sample_is_of_the_nucleus(values, temperature, top_p, seed):
    logits_V = torch.tensor(values)
    token = sample(
        logits_V,
        temperature,
        top_p,
        torch.Generator().manual_seed(seed),
    )
    assert token in nucleus(logits_V, temperature, top_p)


@given(logits, st.integers(0, 2**31))
def test_greedy_is_the_likeliest(values, seed):
    logits_V = torch.tensor(values)
    sampler = torch.Generator().manual_seed(seed)
    best = float(logits_V.max())
    assert logits_V[sample(logits_V, 0.0, 1.0, sampler)] == best
    assert logits_V[sample(logits_V, 1.0, 1e-9, sampler)] == pytest.approx(best, abs=1e-5)


def frequencies(logits_V, temperature, top_p, count=4000) -> torch.Tensor:
    sampler = torch.Generator().manual_seed(1)
    drawn = torch.tensor([sample(logits_V, temperature, top_p, sampler) for _ in range(count)])
    return torch.bincount(drawn, minlength=len(logits_V)) / count


def test_frequencies_are_the_probabilities():
    probabilities = torch.tensor([0.1, 0.4, 0.02, 0.3, 0.18])
    got = frequencies(probabilities.log(), 1.0, 1.0)
    assert torch.allclose(got, probabilities, atol=0.025)  # three standard deviations
    squared = probabilities**2 / (probabilities**2).sum()
    assert torch.allclose(frequencies(probabilities.log(), 0.5, 1.0), squared, atol=0.025)
    kept = torch.tensor([0.0, 0.4, 0.0, 0.3, 0.18]) / 0.88  # 0.4 and 0.3 hold less than 0.8
    assert torch.allclose(frequencies(probabilities.log(), 1.0, 0.8), kept, atol=0.025)


@pytest.fixture(scope="module")
def model():
    """The model with every block, its Engram memory, and how a whole text's logits are computed."""
    config = tiny_config()
    mesh = single_mesh()
    device = torch.device("cpu")
    memory = build_memory(config, mesh, made_up_token_map(), device)
    built = build_model(
        config.model,
        mesh,
        seed=3,
        dtype=torch.float32,
        device=device,
    ).eval()
    assert memory is not None

    def whole(tokens: list[int]) -> torch.Tensor:
        ids_BL = torch.tensor([tokens])
        return built.logits(ids_BL, None, memory_of(memory.look_up(ids_BL, None)))[0, -1]

    return built, memory, whole


def greedy(model, prompt, count, eod=-1, vocab_size=None):
    built, memory, _ = model
    return continue_tokens(
        built, memory, prompt, count, 0.0, 1.0, torch.Generator(), eod, vocab_size
    )


@pytest.mark.parametrize("prompt", [[5], [5, 190], [7, 8, 9, 7, 8, 9, 7, 8, 9, 10, 11]])
@pytest.mark.parametrize("vocab_size", [None, 40])
def test_greedy_decoding_equals_repeated_whole_forwards(model, prompt, vocab_size):
    expected = list(prompt)
    for _ in range(12):
        expected.append(int(model[2](expected)[:vocab_size].argmax()))
    got = greedy(model, prompt, 12, vocab_size=vocab_size)
    assert got == expected[len(prompt) :]
    assert vocab_size is None or max(got) < vocab_size


def test_engram_rows_matter_to_it(model):
    """Without its rows the model says something else: the test above would notice wrong ones."""
    memory = model[1]
    usual = greedy(model, [7, 8, 9], 12)
    for values, _, _ in memory.tables.state().values():
        values.neg_()
    changed = greedy(model, [7, 8, 9], 12)
    for values, _, _ in memory.tables.state().values():
        values.neg_()
    assert changed != usual == greedy(model, [7, 8, 9], 12)


def test_it_stops_at_the_end_of_a_document_and_at_the_limit(model):
    text = greedy(model, [7, 8, 9], 12)
    end = next(token for token in text if token != text[0])
    assert greedy(model, [7, 8, 9], 12, eod=end) == text[: text.index(end)]
    assert greedy(model, [7, 8, 9], 0) == []
    assert greedy(model, [7, 8, 9], 1) == text[:1]


def test_a_run_generates_on_one_process_whatever_trained_it(corpus, tmp_path, monkeypatch):
    more = (
        "--parallel.ep",
        "2",
        "--train.steps",
        "2",
        "--train.dtype",
        "bf16",
        "--train.eval_rows",
        "1",
    )
    run_forked(tmp_path, words(corpus, "two", *more), 2)
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "two"
    texts = [generate(run, "def __init__", 30, 1.0, 1.0, seed) for seed in (0, 0, 1)]
    assert texts[0].startswith("def __init__")
    assert texts[0] == texts[1] != texts[2]
    assert generate(run, "", 5, 0.0, 1.0, 0) == generate(run, "", 5, 0.0, 1.0, 1)
    (newest,) = run.glob("checkpoints/*")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "er")
    away = corpus.rename(corpus.with_name("away"))
    try:  # what generation needs is in the checkpoint, wherever it is started
        places = (
            Path("../../runs/two"),
            Path("../../runs/two/"),
            newest,
            Path("../..") / newest.relative_to(tmp_path),
        )
        assert [generate(place, "def __init__", 30, 1.0, 1.0, 0) for place in places] == texts[
            :1
        ] * 4
        with pytest.raises(RunError, match="does not exist"):
            load_model(run).files  # noqa: B018
    finally:
        away.rename(corpus)
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    with pytest.raises(RunError, match="has no complete checkpoint yet"):
        generate(run, "def", 5, 0.0, 1.0, 0)

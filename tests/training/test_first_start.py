"""What compiles at a first start: nothing that asks for a C++ compiler, unless torch.compile is
asked for by name.
"""

import shutil

import pytest

from tests.helpers.runs import forked, words

COMPILERS = ("cc", "gcc", "g++", "c++", "clang", "clang++", "ninja", "nvcc", "ld")


@pytest.fixture
def only_broken_compilers(tmp_path, monkeypatch):
    """The file in which compilers that fail leave their names; there are no others."""
    programs = tmp_path / "programs"
    log = tmp_path / "started"
    programs.mkdir()
    for name in COMPILERS:
        (programs / name).write_text(
            f"#!/bin/sh\necho {name} $* >> {log}\necho cannot find -laio >&2\nexit 1\n"
        )
        (programs / name).chmod(0o755)
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{programs}:/nowhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return log


SHORT = ("--train.steps", "1", "--train.eval_rows", "1")


def test_training_starts_no_compiler(corpus, only_broken_compilers, tmp_path):
    with forked(tmp_path, words(corpus, "run", "--parallel.ep", "2", *SHORT), 2) as ranks:
        assert ranks.codes() == [0, 0], ranks.text(0)
        assert "laio" not in ranks.text(0) + ranks.text(1)
    assert not only_broken_compilers.exists(), only_broken_compilers.read_text()
    assert not (tmp_path / "extensions").exists()


@pytest.mark.parametrize("kind", ["none", "broken"])
def test_torch_compile_without_a_compiler_is_told_in_one_box(
    corpus,
    only_broken_compilers,
    tmp_path,
    kind,
):
    if kind == "none":
        shutil.rmtree(only_broken_compilers.parent / "programs")
    with forked(tmp_path, words(corpus, "run", *SHORT, "--train.compile", "True")) as ranks:
        assert ranks.codes() == [2]
        text = ranks.text(0)
        assert text.index(
            "compiling pieces of the model by torch.compile: about a minute"
        ) < text.index("cannot run")
        assert "train.compile=True needs a C++ compiler: " in text
        assert "Traceback" not in text
    assert not (tmp_path / "runs" / "run" / "run.json").exists()

"""Loops by numba run right wherever their cache is not there, full, damaged, or filled by two
processes at once.
"""

import importlib.util
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

from kernels import compiled_loops
from tests.helpers.ranks import HANG_S

LOOPS = """
from kernels.compiled_loops import compile_loop

def form(factor):
    @compile_loop(error_model="numpy")
    def loop(x, y):
        for i in range(x.size):
            y[i] = x[i] * factor
    return loop
"""
MAIN = """
import numpy as np
x, y = np.arange(4.0), np.empty(4)
form(3.0)(x, y)
form(3.0)(x, y)
print(y.tolist())
"""
ANEW = "compiled at each start; set NUMBA_CACHE_DIR"
FIRST = "at the first start only"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source" / "some_loops.py"
    path.parent.mkdir()
    path.write_text(LOOPS)
    return path


def run(source: Path, cache: Path, factor: float, monkeypatch) -> numba.core.dispatcher.Dispatcher:
    """As a new process would: load the module, run one form of its loop over an empty memory, check
    what it gives.
    """
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(cache))
    compiled_loops.tell_once.cache_clear()
    spec = importlib.util.spec_from_file_location("some_loops", source)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(
        sys.modules, "some_loops", module
    )  # numba imports a cached form's module by its name
    spec.loader.exec_module(module)
    loop = module.form(factor)
    x = np.arange(4.0)
    y = np.full(4, np.nan)
    loop(x, y)
    assert np.array_equal(y, factor * x)
    return loop


def num_read(loop) -> int:
    """Forms that came from the cache."""
    return sum(loop.stats.cache_hits.values())


def test_a_form_is_compiled_once(source, tmp_path, monkeypatch, capfd):
    assert num_read(run(source, tmp_path / "cache", 3.0, monkeypatch)) == 0
    assert FIRST in capfd.readouterr().err
    assert num_read(run(source, tmp_path / "cache", 3.0, monkeypatch)) == 1
    assert num_read(run(source, tmp_path / "cache", 5.0, monkeypatch)) == 0
    capfd.readouterr()
    source.write_text(LOOPS.replace("* factor", "* factor + 0"))
    assert num_read(run(source, tmp_path / "cache", 3.0, monkeypatch)) == 0
    assert FIRST in capfd.readouterr().err


def test_a_form_is_compiled_again_once_a_neighbour_has_changed(source, tmp_path, monkeypatch):
    """A loop may inline from there, which numba's stamp of its own file does not show."""
    neighbour = source.with_name("parts.py")
    neighbour.write_text("ONE = 1")
    run(source, tmp_path / "cache", 3.0, monkeypatch)
    assert num_read(run(source, tmp_path / "cache", 3.0, monkeypatch)) == 1
    neighbour.write_text("ONE = 2")
    assert num_read(run(source, tmp_path / "cache", 3.0, monkeypatch)) == 0


DAMAGE = {
    "empty": lambda content: b"",
    "cut off": lambda content: content[:-1],
    "only its checksum": lambda content: content[:32],
    "half": lambda content: content[: len(content) // 2],
    "a bit": lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
    "zeros": lambda content: bytes(len(content)),
    "longer": lambda content: content + b"x",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_compiled_again(source, tmp_path, monkeypatch, damage):
    run(source, tmp_path, 3.0, monkeypatch)
    (path,) = tmp_path.glob("**/*.nbc")
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    assert num_read(run(source, tmp_path, 3.0, monkeypatch)) == 0
    assert num_read(run(source, tmp_path, 3.0, monkeypatch)) == 1


def test_a_directory_in_place_of_a_file(source, tmp_path, monkeypatch, capfd):
    run(source, tmp_path, 3.0, monkeypatch)
    (path,) = tmp_path.glob("**/*.nbc")
    path.unlink()
    path.mkdir()
    capfd.readouterr()
    run(source, tmp_path, 3.0, monkeypatch)
    assert ANEW in capfd.readouterr().err


def test_two_processes_at_once_keep_their_own(source, tmp_path, monkeypatch):
    """Each found the cache empty; the files of the second arrive over those of the first."""
    run(source, tmp_path / "first", 3.0, monkeypatch)
    run(source, tmp_path / "second", 5.0, monkeypatch)
    for place in ("first", "second"):
        shutil.copytree(tmp_path / place, tmp_path / "both", dirs_exist_ok=True)
    for factor in (3.0, 5.0):
        assert num_read(run(source, tmp_path / "both", factor, monkeypatch)) == 1


def test_a_full_disk(source, tmp_path, monkeypatch, capfd):
    """A file may have no more than 1,000 bytes: Python ignores the signal, and the write fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        for _ in range(2):
            assert num_read(run(source, tmp_path, 3.0, monkeypatch)) == 0
            said = capfd.readouterr().err
            assert said.count(ANEW) == 1
            assert str(tmp_path) in said
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [path for path in tmp_path.glob("**/*") if path.is_file() and path != source]


@pytest.mark.parametrize("cache", [None, "", "a file"])
def test_no_directory_can_be_written(source, tmp_path, cache):
    """A real process, from a tree without a place for __pycache__, whose home is no directory; also
    for root.
    """
    for name in ("__pycache__", "home", "cache"):
        (source.parent / name).touch()
    source.write_text(LOOPS + MAIN)
    home = {"HOME": str(source.parent / "home"), "XDG_CACHE_HOME": str(source.parent / "home")}
    given = {} if cache is None else {"NUMBA_CACHE_DIR": cache and str(source.parent / "cache")}
    rest = {
        name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", *home)
    }
    environment = rest | home | given | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(source)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[0.0, 3.0, 6.0, 9.0]\n"
    assert done.stderr.count(ANEW) == 1

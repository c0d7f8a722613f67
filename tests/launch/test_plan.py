"""``python -m launch plan`` as it is typed."""

import json
import sys

import pytest

from launch.plan import Request, find_problems, main
from parallel.errors import RunError
from tests.launch.commands import launch, run


def plan(capsys, *words: str) -> str:
    assert main(list(words)) == 0
    return capsys.readouterr().out


def test_it_needs_neither_torch_nor_numpy():
    code = (
        "import sys; from launch.__main__ import main\n"
        "assert main(['plan', '--published']) == 0\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert (
        "196B (V4.1-Flash): 768,022,850 rows x 256 in 2 layers (196.61B parameters)" in done.stdout
    )


def test_a_preset_on_some_ranks(capsys):
    printed = plan(capsys, "tiny", "--ranks", "2", "16")
    assert (
        "tiny: 308,290 rows x 32 in 2 layers (9.9M parameters), 16 rows a token, 4,096 tokens a "
        "step" in printed
    )
    # 154,145 rows of 128 + 260 B
    assert "57.0 MiB" in printed
    assert [line.split()[0] for line in printed.splitlines() if line[:8].strip().isdigit()] == [
        "2",
        "16",
    ] * 2
    assert "Python's standard library" in printed


def test_formats_that_do_not_fit_the_width_are_left_out(capsys):
    printed = plan(capsys, "hybrid-27b", "--ranks", "8")
    (line,) = (line for line in printed.splitlines() if "8.1 GiB" in line)
    assert line.count(" -") == 3
    with pytest.raises(RunError, match=r"table\.rows=fp8 needs rows of a multiple of 32"):
        main(["hybrid-27b", "--rows", "fp8"])


def test_what_does_not_fit_is_marked(capsys):
    printed = plan(
        capsys,
        "--published",
        "--ranks",
        "8",
        "--host_gib",
        "1000",
        "--rows",
        "bf16",
    )
    assert "275.0 GiB!" in printed
    assert "115.9 GiB " in printed
    assert "115.9 GiB!" not in printed


def test_json_is_every_combination(capsys):
    plans = json.loads(
        plan(
            capsys,
            "tiny",
            "--ranks",
            "1",
            "8",
            "--json",
            "--distinct",
            "0.5",
            "--step_s",
            "2",
        )
    )
    assert len(plans) == 2 * 3 * 3
    assert len({(p["ranks"], p["format"], p["optimizer"]) for p in plans}) == 18
    assert all(p["distinct"] == pytest.approx(0.5) and p["step_s"] == 2.0 for p in plans)


def test_growth_of_ones_own_text(capsys, tmp_path):
    """U = T: every id of a micro-batch is distinct but for collisions."""
    report = tmp_path / "report.json"
    report.write_text(
        json.dumps({"growth": [{"order": order, "curve": [0.0, 1.0, 0.0]} for order in (2, 3)]})
    )
    found = json.loads(
        plan(
            capsys,
            "tiny",
            "--ranks",
            "1",
            "--json",
            "--growth",
            str(report),
        )
    )
    assert found[0]["distinct"] == pytest.approx(
        19_290 / 2048 * (1 - (1 - 1 / 19_290) ** 2048), rel=1e-3
    )
    assert str(report) in plan(capsys, "tiny", "--growth", str(report))
    with pytest.raises(RunError, match=r"has no n-grams of orders \[4\]"):
        main(["--published", "--growth", str(report)])
    report.write_text("{}")
    with pytest.raises(RunError, match="is no report of analyze engram"):
        main(["tiny", "--growth", str(report)])


def test_problems_come_together():
    assert find_problems(Request(run="tiny")) == []
    assert find_problems(Request(published=True)) == []
    bad = Request(
        ranks=(0,),
        distinct=1.5,
        step_s=0.0,
        host_gib=-1.0,
    )
    fields = [problem.field for problem in find_problems(bad)]
    assert fields == ["run", "--ranks", "--distinct", "--step_s", "--host_gib"]
    assert find_problems(Request(run="tiny", published=True))[0].field == "run"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("plan", "tinny"), "did you mean tiny?"),
        (("plan", "moe-3b"), "has no Engram tables to plan"),
        (("plan", "absent/run.json"), "cannot be read"),
        (("plan",), "names not exactly one plan"),
    ],
)
def test_bad_input_exits_with_2(words, told):
    done = launch(*words)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr

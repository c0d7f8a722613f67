"""What keeps a prepared dataset from being trained on, from its dataset.json alone. No torch: the
CLI imports it.

``open_data`` of the loop checks the same, and the files themselves, on every rank.
"""

from pathlib import Path

from parallel.errors import Problem, RunError
from parallel.ranges import known, range_problems
from training.data.config import DataConfig
from training.data.files import SPLITS, check_manifest, read_manifest


def data_problems(data: DataConfig, vocab_size: int) -> list[Problem]:
    """All that is wrong with the dataset for a model of ``vocab_size`` tokens, and with the rows
    that are asked for.
    """
    problems = range_problems(data, "data.")
    path = Path(data.path)
    try:
        manifest = read_manifest(path)
        check_manifest(path, manifest)
        counts = {name: int(manifest[name]["tokens"]) for name in SPLITS}
        tokens = int(manifest["vocab_size"])
    except RunError as error:
        return problems + [problem for problem in error.problems if isinstance(problem, Problem)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        rule = f"has a damaged dataset.json ({error})"
        return [
            *problems,
            Problem(
                field="data.path",
                value=path,
                rule=rule,
                fix="prepare it again",
            ),
        ]
    if tokens > vocab_size:
        rule = f"is below the {tokens} tokens of {path}"
        problems.append(
            Problem(
                field="model.vocab_size", value=vocab_size, rule=rule, fix=f"use {tokens} or more"
            )
        )
    return problems + _split_problems(known(data), counts)


def _split_problems(data: DataConfig, counts: dict[str, int]) -> list[Problem]:
    """Splits that are empty, hold nothing to predict, or are shorter than a row."""
    problems = []
    for name, count in counts.items():
        if count < 2:
            rule = (
                f"has {count or 'no'} token{'s' * (count != 1)} in its {name} split: nothing "
                "to predict"
            )
            fix = "prepare it from more documents"
            problems.append(
                Problem(
                    field="data.path",
                    value=data.path,
                    rule=rule,
                    fix=fix,
                )
            )
    if counts["train"] >= 2 and data.seq_length + 1 > counts["train"]:
        rule = f"is longer than the {counts['train']} tokens of the train split of {data.path}"
        fix = f"use at most {counts['train'] - 1}, or prepare more documents"
        problems.append(
            Problem(
                field="data.seq_length",
                value=data.seq_length,
                rule=rule,
                fix=fix,
            )
        )
    return problems

"""Words of the command line that are told all at once: options that are no fields, values of
another type.

What is wrong is left out of what goes to tyro, so that the rest of the configuration is checked as
well.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from decimal import Decimal, InvalidOperation
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from launch.option_names import option_name, what_is_meant
from parallel.errors import Problem
from training.model.layer_table import LAYERS
from training.run_file import dataclass_of

SWITCHES = ("resume", "auto_resume", "overwrite", "help")
LARGEST_EXPONENT = 18  # of a whole number: 1e999999999 has as many digits
KINDS = {int: "a whole number", float: "a number", bool: "True or False"}


def field_types(kind: type, prefix: str = "") -> dict[str, Any]:
    """Types of all fields of a dataclass by their dotted names, nested ones included."""
    found: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for item in fields(kind):
        nested = dataclass_of(hints[item.name])
        if nested:
            found |= field_types(nested, f"{prefix}{item.name}.")
        else:
            found[prefix + item.name] = hints[item.name]
    return found


def read_words(
    words: list[str],
    types: dict[str, Any],
    switches: Sequence[str] = SWITCHES,
    meant: Callable[[str], str] | None = None,
) -> tuple[list[str], list[Problem]]:
    """The words that tyro can read, numbers as it reads them, and what is wrong with the others.

    Args:
        words: options and their values, ``--name value ...`` or ``--name=value``.
        types: of the fields by name.
        switches: names of options without a value.
        meant: for a verb that takes words of its own: what to do about an option that is no field.
            None is training a run.
    """
    kept: list[str] = []
    problems: list[Problem] = []
    known = [*switches, *types]
    for option, values in _options(words, switches):
        name = option_name(option)
        if not option.startswith("--") or name in switches:
            kept += [option, *values]
        elif name not in types:
            fix = what_is_meant(name, known) if meant is None else meant(name)
            problems.append(
                Problem(
                    field="option",
                    value=option,
                    rule="is no field of a run" if meant is None else "is no option",
                    fix=fix,
                )
            )
        else:
            # A second word after an option of one value is the verb's own, as in --step_s 1 tiny.
            surplus = [] if meant is None or _is_tuple(types[name]) else values[1:]
            values = values[: len(values) - len(surplus)]
            read, found = _read_values(name, values, types[name])
            problems += found
            kept += surplus + ([] if found else _written(name, read))
    return kept, problems


def join_values(words: list[str], types: dict[str, Any]) -> list[str]:
    """``--model.pattern -M*E`` as ``--model.pattern=-M*E``: the text of a field may begin with a
    dash.

    Args:
        types: of the fields by name.
    """
    joined: list[str] = []
    for word in words:
        option = joined[-1] if joined else ""
        name = option_name(option)
        takes_text = option.startswith("--") and "=" not in option and types.get(name) is str
        is_pattern = name == "model.pattern" and set(word) <= set(LAYERS)
        if (
            takes_text
            and word.startswith("-")
            and word != "-h"
            and (is_pattern or not word.startswith("--"))
        ):
            joined[-1] = f"{option}={word}"
        else:
            joined.append(word)
    return joined


def _written(name: str, values: list[str]) -> list[str]:
    """An option as argparse reads it: a text that begins with a dash must be in the option's own
    word.
    """
    if len(values) == 1 and values[0].startswith("-"):
        return [f"--{name}={values[0]}"]
    return [f"--{name}", *values]


def _options(words: list[str], switches: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each option with the values after it; a value of ``--name=value`` with its name."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            found.append((option, [value] if equals else []))
        elif found and option_name(found[-1][0]) not in switches:
            found[-1][1].append(word)
        else:
            found.append((word, []))
    return found


def _is_tuple(hint: Any) -> bool:
    return any(get_origin(kind) is tuple for kind in (hint, *get_args(hint)))


def _read_values(name: str, values: list[str], hint: Any) -> tuple[list[str], list[Problem]]:
    choices = [choice for choice in get_args(hint) if choice is not NoneType]
    if NoneType in get_args(hint):
        if [value.lower() for value in values] == ["none"]:
            return ["None"], []
        hint = choices[0]
    elements = get_args(hint) if get_origin(hint) is tuple else (hint,)
    element = elements[0]
    if not values or (Ellipsis not in elements and len(values) != len(elements)):
        rule = f"has {len(values) or 'no'} value{'s' * (len(values) != 1)}"
        fix = f"give it {_description(element)}" + (
            f", {len(elements)} times" if len(elements) > 1 else ""
        )
        return [], [
            Problem(
                field=name,
                value=" ".join(values),
                rule=rule,
                fix=fix,
            )
        ]
    read = [_read(value, element) for value in values]
    wrong = [value for value, good in zip(values, read, strict=True) if good is None]
    problems = [
        Problem(
            field=name,
            value=value,
            rule=f"is not {_description(element)}",
            fix="correct it, or leave it out",
        )
        for value in wrong
    ]
    return [value for value in read if value is not None], problems


def _description(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    return KINDS.get(kind, "one value")


def _read(value: str, kind: Any) -> str | None:
    """The value as tyro reads it; None where it is of another type."""
    if kind is int:
        return _whole(value)
    if kind is float:
        try:
            return repr(float(value))
        except ValueError:
            return None
    if kind is bool:
        return value.capitalize() if value.lower() in ("true", "false") else None
    if get_origin(kind) is Literal:
        return value if value in map(str, get_args(kind)) else None
    return value


def _whole(value: str) -> str | None:
    """1e3 and 1_000 are 1000; 1.5e0 is no whole number."""
    try:
        number = Decimal(value)
    except InvalidOperation:
        return None
    if not number.is_finite() or number.adjusted() > LARGEST_EXPONENT:
        return None
    return str(int(number)) if number == number.to_integral_value() else None

"""What a model must be, beyond the ranges of its fields: the rules of its layers, of its stack, of
its experts and of Engram. No torch in here: the CLI imports it.
"""

from collections.abc import Iterator
from itertools import chain

from parallel.errors import Problem
from parallel.ranges import known, range_problems
from training.model.config import ModelConfig, Rules, model_problem
from training.model.layer_table import LAYERS

# Sizes that are named as a way out; a mistyped number of experts has divisors for years.
MOST_RANKS = 2**16


def model_problems(model: ModelConfig, tp: int, ep: int) -> list[Problem]:
    """Every number outside of its range, and every rule inside the model, and between it and the
    layout, that is broken.

    Args:
        tp: tensor ranks, ``UNKNOWN`` where the layout has another fault.
        ep: expert ranks, likewise.
    """
    outside = range_problems(model, "model.")
    model = known(model)
    unknown = list(_pattern_rules(model))
    kinds = [kind for letter, kind in LAYERS.items() if letter in model.pattern]
    of_layers = chain.from_iterable(kind.rules(model, tp) for kind in kinds)
    has_experts = any(kind.config == "moe" for kind in kinds)
    return [
        *outside,
        *unknown,
        *of_layers,
        *_expert_parallel_rules(model, ep, has_experts),
        *_engram_rules(model),
    ]


def _pattern_rules(model: ModelConfig) -> Rules:
    unknown = sorted(set(model.pattern) - set(LAYERS))
    fault = f"has letters {unknown} that name no layer" if unknown else "is empty"
    if unknown or not model.pattern:
        yield model_problem(
            "pattern",
            repr(model.pattern),
            fault,
            f"use {''.join(LAYERS)}",
        )


def _expert_parallel_rules(model: ModelConfig, ep: int, has_experts: bool) -> Rules:
    num_experts = model.moe.num_experts
    if not has_experts and ep > 1:
        yield Problem(
            field="parallel.ep",
            value=ep,
            rule=f"is above 1, but model.pattern={model.pattern} has no E layer",
            fix="use 1",
        )
    if has_experts and num_experts % ep:
        divisors = ", ".join(str(size) for size in _divisors(num_experts))
        yield Problem(
            field="parallel.ep",
            value=ep,
            rule=f"does not divide model.moe.num_experts={num_experts}",
            fix=f"use {divisors}",
        )


def _divisors(number: int) -> Iterator[int]:
    """The divisors of a number that may be a layout's sizes."""
    return (size for size in range(1, min(number, MOST_RANKS) + 1) if number % size == 0)


def _engram_rules(model: ModelConfig) -> Rules:
    if model.engram is None:
        return
    layers = model.engram.layers
    orders = model.engram.orders
    depth = len(model.pattern)
    if places := [layer for layer in layers if layer >= depth]:
        yield model_problem(
            "engram.layers",
            places,
            f"are outside the {depth} layers of the pattern",
            f"use 0 to {depth - 1}",
        )
    if len(set(layers)) < len(layers):
        yield model_problem(
            "engram.layers",
            layers,
            "names a layer twice",
            "name each once",
        )
    if orders != tuple(range(2, len(orders) + 2)):
        yield model_problem(
            "engram.orders",
            orders,
            "is not 2, 3, ... without a gap",
            "use (2, 3) or (2, 3, 4)",
        )

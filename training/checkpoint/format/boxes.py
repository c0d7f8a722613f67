"""Boxes of a tensor: a flat range of it cut into boxes, and whether boxes cover it exactly once.
Pure arithmetic.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Box:
    """A block of a tensor: where it begins and how far it reaches in each dim."""

    offset: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements in the box."""
        return math.prod(self.sizes)

    def clip(self, dim: int, start: int, stop: int) -> "Box | None":
        """The part with start <= index < stop in ``dim``; None where there is none."""
        start = max(start, self.offset[dim])
        stop = min(stop, self.offset[dim] + self.sizes[dim])
        return self._along(dim, start, stop - start) if start < stop else None

    def shift(self, dim: int, by: int) -> "Box":
        """The same box ``by`` further along ``dim``."""
        return self._along(dim, self.offset[dim] + by, self.sizes[dim])

    def overlaps(self, other: "Box") -> bool:
        """Whether the two share an element."""
        for dim in range(len(self.offset)):
            if self.offset[dim] >= other.offset[dim] + other.sizes[dim]:
                return False
            if other.offset[dim] >= self.offset[dim] + self.sizes[dim]:
                return False
        return True

    def lies_in(self, shape: tuple[int, ...]) -> bool:
        """Whether all of it is inside a tensor of this shape."""
        for first, size, limit in zip(self.offset, self.sizes, shape, strict=True):
            if first < 0 or first + size > limit:
                return False
        return True

    def split(self, max_numel: int) -> Iterator["Box"]:
        """The box in parts of at most ``max_numel`` elements, along its outermost dims."""
        if self.numel <= max_numel:
            yield self
            return
        dim = next(dim for dim, size in enumerate(self.sizes) if size > 1)
        start = self.offset[dim]
        size = self.sizes[dim]
        step = max(1, max_numel * size // self.numel)
        for first in range(start, start + size, step):
            part = self._along(dim, first, min(step, start + size - first))
            yield from part.split(max_numel)

    def _along(self, dim: int, offset: int, size: int) -> "Box":
        head = slice(None, dim)
        tail = slice(dim + 1, None)
        return replace(
            self,
            offset=(*self.offset[head], offset, *self.offset[tail]),
            sizes=(*self.sizes[head], size, *self.sizes[tail]),
        )


def range_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Elements [start, stop) of a C-contiguous tensor as boxes, in memory order: one after another
    they are the range.

    At most 2 * ndim - 1 boxes: an incomplete first row, whole rows, an incomplete last row,
    recursively.
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield Box((start,), (stop - start,))
        return
    row = math.prod(shape[1:])
    first = -(-start // row)
    last = stop // row
    if start < first * row:
        yield from _in_row(shape, first - 1, start, min(stop, first * row))
    if first < last:
        yield Box((first, *[0] * (len(shape) - 1)), (last - first, *shape[1:]))
    if first <= last and last * row < stop:
        yield from _in_row(shape, last, last * row, stop)


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Box]:
    begin = row * math.prod(shape[1:])
    for box in range_boxes(shape[1:], start - begin, stop - begin):
        yield Box((row, *box.offset), (1, *box.sizes))


def cover_problem(shape: tuple[int, ...], boxes: Iterable[Box]) -> str | None:
    """Why ``boxes`` are not every element of a tensor exactly once; None if they are."""
    boxes = sorted(boxes, key=lambda box: box.offset)
    whole = Box((0,) * len(shape), tuple(shape))
    # Swept along the dim that is cut the most, where the fewest boxes lie beside one another.
    cuts = [len({box.offset[dim] for box in boxes}) for dim in range(len(shape))]
    sweep = cuts.index(max(cuts)) if cuts else 0
    beside: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.offset[sweep]):
        if not box.lies_in(shape):
            return f"{box} lies outside the shape {list(shape)}"
        beside = [
            other
            for other in beside
            if other.offset[sweep] + other.sizes[sweep] > box.offset[sweep]
        ]
        for other in beside:
            if box.overlaps(other):
                return f"{box} and {other} overlap"
        beside.append(box)
    missing = whole.numel - sum(box.numel for box in boxes)
    return f"{missing} of {whole.numel} elements are missing" if missing else None

"""What the benchmarks time, and what ``kernels.compile_all`` compiles: each op on the shapes of
real models.

Every op's ``bench.py`` lists its cases of one size and dtype in ``cases()``.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.timing import gradients, print_table

Op = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Size:
    """Widths of one model: the presets' names, and one like Nemotron 3 Nano (its published
    config.json).
    """

    name: str
    batch: int
    """Rows of ``length`` tokens that a step's micro-batch has on one card."""
    length: int
    d_model: int
    heads: int
    groups: int
    head_dim: int = 64
    state: int = 128
    experts: int
    top_k: int
    expert_dim: int
    vocab: int
    streams: int = 1
    decoding: tuple[int, ...] = (1, 32, 256)
    """Requests that take a decoding step together."""

    @property
    def tokens(self) -> int:
        """Tokens of a step's micro-batch."""
        return self.batch * self.length

    def rows(self, tokens: int) -> tuple[int, int]:
        """Rows and their length of so many tokens: whole rows, or a part of one."""
        return max(1, tokens // self.length), min(self.length, tokens)


SMALL = Size(
    name="small",
    batch=8,
    length=1024,
    d_model=512,
    heads=16,
    groups=2,
    experts=16,
    top_k=2,
    expert_dim=512,
    vocab=8192,
)
MOE_3B = Size(
    name="moe-3b",
    batch=4,
    length=4096,
    d_model=1280,
    heads=40,
    groups=4,
    experts=72,
    top_k=6,
    expert_dim=736,
    vocab=129_280,
    streams=4,
)
NEMOTRON = Size(
    name="nemotron-3-nano",
    batch=2,
    length=8192,
    d_model=2688,
    heads=64,
    groups=8,
    experts=128,
    top_k=6,
    expert_dim=1856,
    vocab=131_072,
)
SIZES = (SMALL, MOE_3B, NEMOTRON)

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2, torch.int64: 0.0}
"""Largest relative RMSE, of the output and every gradient, at which a speed means anything."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op, one set of shapes: the same set-up for speed, memory, the check and the compiler."""

    op: str
    shapes: str
    """As the table shows them."""
    make: Callable[[int, torch.dtype, str], Sequence[Tensor]]
    """(batch rows or tokens, dtype, device) -> the op's inputs; those that are leaves wanting
    gradients get them.
    """
    full: int
    """What ``make`` gets where speed is measured."""
    tiny: int
    """What it gets where the kernels are interpreted or only compiled."""
    ours: Op
    exact: Op
    """Plain PyTorch on the same inputs: the oracle on a card, and a peer once it went through
    ``torch.compile``.
    """
    bytes_moved: tuple[int, int]
    """Least bytes of memory that forward, and forward with backward, can move at ``full``."""
    flops: tuple[int, int]
    """Floating-point operations of the same."""
    dtype: torch.dtype
    reference: Op | None = None
    """The oracle and a peer on a CPU: the plain formula, where ``exact`` is our own path in
    PyTorch's operations.
    """
    peers: dict[str, Callable[[], Op]] = field(default_factory=dict)
    """On a card: loaders of other people's op with the signature of ``ours``; ImportError where it
    is not installed.
    """
    cpu_peers: dict[str, Callable[[], Op]] = field(default_factory=dict)
    """The same on a CPU."""
    composed: bool = False
    """Made of ops that have cases of their own, and that need one another's values: not for the
    compiler.
    """
    loose: float = 0.0
    """A limit of the error above that of its dtype."""

    @property
    def limit(self) -> float:
        """Largest error at which a speed means anything."""
        return max(self.loose, LIMITS[self.dtype])

    def forward(self, op: Op, inputs: Sequence[Tensor]) -> Tensor:
        """Call the op alone, without gradients."""
        with torch.no_grad():
            return op(*inputs)

    def forward_backward(self, op: Op, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Output and gradients of all leaves; the forward alone where there is none."""
        leaves = [x for x in inputs if x.requires_grad]
        if not leaves:
            return (self.forward(op, inputs),)
        return gradients(lambda *_: op(*inputs), leaves)


def leaves(*tensors: Tensor, dtype: torch.dtype, device: str) -> list[Tensor]:
    """The tensors on a device, wanting gradients."""
    return [tensor.to(device, dtype).requires_grad_() for tensor in tensors]


def in_fp32(op: Op) -> Op:
    """The formula on 16-bit inputs as mixed precision has it: computed in fp32, rounded once."""

    def run(*inputs: Tensor) -> Tensor:
        wide = [x.float() if x.is_floating_point() else x for x in inputs]
        return op(*wide).to(inputs[0].dtype)

    return run


def documents(batch: int, length: int, device: str) -> Tensor:
    """seq_idx (B, L) int32 of rows of about eight documents."""
    return (torch.arange(length, device=device) * 8 // length).int().repeat(batch, 1)


def elements(*tensors: Any) -> int:
    """How many values the tensors hold together."""
    return sum(tensor.numel() for tensor in tensors)


def of_sizes(cases: Callable[[Size, torch.dtype], Iterable[Case]]) -> Iterator[Case]:
    """An op's cases of all sizes in bf16."""
    for size in SIZES:
        yield from cases(size, torch.bfloat16)


def sweep_constants(launchers: ModuleType, cases: Iterable[Case], **choices: Sequence[int]) -> None:
    """Time every combination of the launchers' constants on a card, and print each case's five
    best.

    Args:
        launchers: an op's ``triton.py``; its constants are what they were when this returns.
        cases: what to time, forward and with backward.
        choices: values of each constant, by its name.
    """
    from triton.testing import do_bench

    fixed = {name: getattr(launchers, name) for name in choices}
    rows = [["case", *choices, "forward, ms", "forward+backward, ms"]]
    try:
        for case in cases:
            inputs = case.make(case.full, case.dtype, "cuda")
            taken = []
            for values in itertools.product(*choices.values()):
                vars(launchers).update(zip(choices, values, strict=True))
                times = [
                    do_bench(partial(run, case.ours, inputs))
                    for run in (case.forward, case.forward_backward)
                ]
                taken.append((times, values))
            taken.sort(key=lambda row: row[0][1])
            rows += [
                [case.shapes, *map(str, values), *(f"{ms:.4f}" for ms in times)]
                for times, values in taken[:5]
            ]
    finally:
        vars(launchers).update(fixed)
    print_table(rows)

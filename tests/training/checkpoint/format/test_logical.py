"""A rank's share of a parameter, told in boxes of the global tensor."""

import math
from types import MappingProxyType

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.mesh import Mesh
from parallel.mesh_plan import ParallelConfig, plan_mesh
from parallel.placement import Part, PlacedParameter, Placement, constant
from training.checkpoint.format.boxes import cover_problem
from training.checkpoint.format.logical import LogicalTensor, _add_fragment


@st.composite
def placements(draw) -> tuple[Placement, int]:
    """A placement of 1 to 3 packed parts, cut along any dim, and a number of tensor ranks that it
    allows.
    """
    ranks = draw(st.sampled_from([1, 2, 4]))
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    dim = draw(st.integers(0, len(shape) - 1))
    units = draw(st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=3))
    parts = tuple(
        Part(name=f"p{i}" if len(units) > 1 else "", size=n * draw(st.integers(1, 2)), units=n)
        for i, n in enumerate(units)
    )
    shape[dim] = sum(part.size for part in parts)
    axis = draw(st.sampled_from(["tp", None])) if len(parts) == 1 else "tp"
    return Placement(
        shape=tuple(shape), init=constant(0.0), axis=axis, dim=dim, parts=parts if axis else ()
    ), ranks


@settings(max_examples=150, deadline=None)
@given(placements(), st.data())
def test_fragments_of_any_cut_reassemble(drawn, data):
    """Each tensor rank's flat parameter, cut anywhere into ZeRO fragments, gives every global
    element exactly once.
    """
    placement, num_ranks = drawn
    plan = plan_mesh(ParallelConfig(tp=num_ranks), num_ranks)
    parts = placement.parts or (Part(size=placement.shape[placement.dim], units=1),)
    whole = torch.arange(math.prod(placement.shape), dtype=torch.float32).view(placement.shape)
    expected = dict(
        zip(
            [part.name for part in parts],
            whole.split([p.size for p in parts], placement.dim),
            strict=True,
        )
    )
    tensors = {
        "w" + (f".{name}" if name else ""): LogicalTensor(tuple(values.shape), torch.float32)
        for name, values in expected.items()
    }
    for rank in range(num_ranks):
        mesh = Mesh(plan, rank, MappingProxyType({}))
        pieces = [
            expected[piece.part.name].narrow(placement.dim, piece.start, piece.size)
            for piece in placement.slices(mesh)
        ]
        parameter = PlacedParameter(torch.cat(pieces, placement.dim))
        parameter.placement = placement
        assert tuple(parameter.shape) == placement.local_shape(mesh)
        flat = parameter.detach().flatten()
        cuts = sorted(data.draw(st.integers(0, flat.numel())) for _ in range(2))
        for start, stop in zip([0, *cuts], [*cuts, flat.numel()], strict=True):
            _add_fragment(
                tensors,
                "w",
                parameter,
                start,
                flat[start:stop],
                mesh,
            )
    for name, tensor in tensors.items():
        assert (
            cover_problem(tensor.shape, [chunk.box for chunk in tensor.chunks if chunk.writes])
            is None
        )
        for chunk in tensor.chunks:  # copies, too
            values = expected[name.partition(".")[2]]
            place = tuple(
                slice(a, a + n) for a, n in zip(chunk.box.offset, chunk.box.sizes, strict=True)
            )
            assert torch.equal(chunk.values, values[place])

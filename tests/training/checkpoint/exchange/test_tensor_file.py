"""Files of safetensors that are written in blocks."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from training.checkpoint.exchange.tensor_file import write_tensor_file


@settings(deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1).filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.lists(st.integers(0, 5), min_size=1, max_size=3),
            st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int32]),
        ),
        max_size=4,
    ),
    st.integers(1, 3),
)
def test_the_library_reads_what_is_written_in_blocks(tmp_path_factory, kinds, step):
    tensors = {name: (torch.randn(shape) * 100).to(dtype) for name, (shape, dtype) in kinds.items()}
    path = tmp_path_factory.mktemp("files") / "x.safetensors"
    shapes = {name: (tuple(values.shape), values.dtype) for name, values in tensors.items()}
    write_tensor_file(
        path, shapes, ((name, values.split(step)) for name, values in tensors.items())
    )
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(
        torch.equal(read[name], values) and read[name].dtype == values.dtype
        for name, values in tensors.items()
    )

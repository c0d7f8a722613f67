"""What ``inspect`` says of a checkpoint, against plain DCP and the counts of the model."""

from tests.helpers.saved import read_plainly
from tests.helpers.tiny import made_up_token_map
from tests.training.checkpoint.two_ranks import CONFIG
from training.checkpoint.format.storage import FORMAT
from training.checkpoint.tools.reader import Reader
from training.checkpoint.tools.summary import as_json, folded_lines, kind_of, sizes_by_kind
from training.engram.memory import engram_hashes
from training.plan.parameters import count_parameters


def test_sizes_are_those_of_the_model(path):
    reader = Reader(path)
    sizes = {kind: elements for kind, (_, elements, _) in sizes_by_kind(reader.tensors).items()}
    count = count_parameters(CONFIG.model)
    rows = sum(
        spec.num_rows for spec in engram_hashes(CONFIG.model.engram, made_up_token_map()).values()
    )
    assert (
        sizes["parameters"]
        == sizes["first moments"]
        == sizes["second moments"]
        == count.total - count.engram_table
    )
    assert sizes["Engram rows"] == rows * 8
    assert sizes["Engram state"] == rows * (2 * 8 + 1)
    assert sizes["router biases"] == 2 * 4
    assert sum(total for _, _, total in sizes_by_kind(reader.tensors).values()) == sum(
        values.nbytes for values in read_plainly(path).values()
    )


def test_json_lists_every_tensor(path):
    told = as_json(Reader(path))
    plain = read_plainly(path)
    assert (told["step"], told["weights_only"], told["format"]) == (2, False, FORMAT)
    assert told["layout"]["world"] == told["layout"]["tp"] == 2
    shapes = {name: (tensor["shape"], tensor["dtype"]) for name, tensor in told["tensors"].items()}
    assert shapes == {name: (list(v.shape), str(v.dtype)[6:]) for name, v in plain.items()}


def test_folding_loses_nothing(path):
    tensors = Reader(path).tensors
    lines = folded_lines(Reader(path))
    assert sum(line.num_tensors for line in lines) == len(tensors)
    assert sum(line.num_bytes for line in lines) == sum(
        tensor.num_bytes for tensor in tensors.values()
    )
    shown = {(line.name, line.layers): (line.shape, line.states) for line in lines}
    three = ("fp32", "exp_avg", "exp_avg_sq")
    assert shown["layers.*.mixer.in_proj.weight.{z,x,B,C,dt}", (0,)] == (
        "[64+64+12+12+8, 32]",
        three,
    )
    assert shown["layers.*.mixer.experts.down", (1, 6)] == ("[4, 24, 32]", three)
    assert shown["layers.*.norm", tuple(range(7))] == ("[32]", three)
    assert len(lines) < len(tensors) / 4
    assert all(kind_of(name) != "other" for name in tensors)

"""DCP's ``.metadata`` without running a stranger's code.

It is the one pickle of a checkpoint: names, shapes, dtypes, and where in which file each chunk
lies. A pickle may call anything that Python can import; this reader imports the classes that those
descriptions are made of, and nothing else.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from training.checkpoint.format.problems import checkpoint_problem

METADATA = ".metadata"
DESCRIPTIONS = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}


class _ForeignCode(Exception):
    """A pickle asks for something that describes no tensor."""


class _Descriptions(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in DESCRIPTIONS.get(module, ()):
            raise _ForeignCode(f"{module}.{name}")
        return super().find_class(module, name)


class SafeReader(dcp.FileSystemReader):
    """DCP's reader, which would unpickle anything; tensors themselves it loads with
    ``weights_only`` already.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata by ``read_metadata`` below, which executes nothing."""
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_metadata(path: Path) -> Metadata:
    """The metadata of the checkpoint in ``path``; nothing of it is executed.

    Raises:
        RunError: it is missing or damaged, or asks for code.
    """
    try:
        with open(path / METADATA, "rb") as file:
            metadata = _Descriptions(file).load()
    except FileNotFoundError:
        raise checkpoint_problem(path, f"is damaged: {METADATA} is missing") from None
    except _ForeignCode as error:
        rule = f"is refused: {METADATA} asks for {error}, which describes no tensor"
        raise checkpoint_problem(path, rule, "do not load it: it was made to run code") from None
    except Exception as error:  # what a damaged pickle raises is anything
        raise checkpoint_problem(
            path, f"is damaged: {METADATA} cannot be read ({error})"
        ) from error
    if not isinstance(metadata, Metadata):
        raise checkpoint_problem(path, f"is damaged: {METADATA} holds a {type(metadata).__name__}")
    return metadata

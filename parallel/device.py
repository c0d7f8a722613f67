"""The only file that knows CUDA by name: which device this process computes on, and its capabilities."""

import torch


def local_device(local_rank: int = 0) -> torch.device:
    """This process's card by local rank, or the CPU where there is none."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def backend(device: torch.device) -> str:
    """The collective backends of a run on this device: gloo moves host tensors, nccl those of cards."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def device_name(device: torch.device) -> str:
    """The model of a device, as its vendor spells it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

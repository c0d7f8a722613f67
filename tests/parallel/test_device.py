"""Copies to and from a device, and what it computes in."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from parallel import device as devices
from parallel.device import DeviceQueue, choose_dtype, tensors_in, to_device, to_host
from training import compute_dtype

CPU = torch.device("cpu")


@dataclass
class Parts:
    one: torch.Tensor
    more: dict[int, list[torch.Tensor]]
    name: str


def test_tensors_in_finds_all():
    a, b, c = (torch.ones(n) for n in (1, 2, 3))
    found = list(tensors_in([(a, "x"), Parts(b, {0: [c, a]}, "y"), None, {"z": {"w": b}}]))
    assert [len(tensor) for tensor in found] == [1, 2, 3, 1, 2]


def test_without_a_card_nothing_is_copied_and_nothing_waits():
    tensor = torch.ones(3)
    queue = DeviceQueue(CPU)
    assert to_device(tensor, CPU) is tensor
    assert to_host(tensor) is tensor
    assert queue.mark() is None
    with queue.after(None):
        queue.borrow([tensor])
    queue.wait(None)


CARDS = {
    "V100": ((7, 0), "fp32"),
    "T4": ((7, 5), "fp32"),
    "A100": ((8, 0), "bf16"),
    "H200": ((9, 0), "bf16"),
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_by_its_compute_capability(monkeypatch, name):
    capability, dtype = CARDS[name]
    card = SimpleNamespace(
        get_device_capability=lambda device: capability, get_device_name=lambda device: name
    )
    monkeypatch.setattr(devices.torch, "cuda", card)
    choice = choose_dtype(torch.device("cuda", 0))
    assert compute_dtype.name_of(choice) == dtype
    assert choice.reason == f"{name}, compute capability {capability[0]}.{capability[1]}"

"""The only file that knows CUDA by name: which device this process computes on, how data get there,
beside what.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass

import torch

from kernels.cpu_dtype import DtypeChoice, choose_cpu_dtype


def local_device(local_rank: int = 0) -> torch.device:
    """This process's card by local rank, or the CPU where there is none."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def backend(device: torch.device) -> str:
    """The collective backends of a run on this device: gloo moves host tensors, nccl those of
    cards.
    """
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def device_name(device: torch.device) -> str:
    """The model of a device, as its vendor spells it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def choose_dtype(device: torch.device) -> DtypeChoice:
    """The compute type that ``device`` does well: bf16 where it has the hardware, else fp32."""
    if device.type != "cuda":
        return choose_cpu_dtype()
    major, minor = torch.cuda.get_device_capability(device)
    dtype = torch.bfloat16 if major >= 8 else torch.float32
    return DtypeChoice(dtype, f"{device_name(device)}, compute capability {major}.{minor}")


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` on ``device``. From the host to a card it goes by page-locked memory, and nobody
    waits for the copy.

    PyTorch's allocator of that memory gives it to nobody else before the calling thread's stream
    has done the copy.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in host memory; from a card in page-locked memory, and the host waits for the
    calling thread's stream.

    A host tensor is given back as it is.
    """
    if tensor.device.type != "cuda":
        return tensor.cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return host


class HostCopy:
    """A tensor's values on their way to host memory: whoever reads them waits for them, and for
    nothing that the device was given later.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        """Begin to copy, after what the calling thread's stream has been given."""
        self._device = tensor.device
        self._arrived = None
        if tensor.device.type != "cuda":
            self._host = tensor.detach().clone()
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor.detach(), non_blocking=True)
        self._arrived = torch.cuda.current_stream(self._device).record_event()

    def read(self) -> torch.Tensor:
        """The values, once they are there; any thread may ask, any number of times."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host

    def value(self) -> float:
        """``read`` of a single one."""
        return float(self.read())


class Elapsed:
    """How long stretches of work took. On a card their ends may not have been reached."""

    def __init__(
        self, seconds: float, spans: "Sequence[tuple[torch.cuda.Event, torch.cuda.Event]]" = ()
    ) -> None:
        self._seconds = seconds
        self._spans = spans

    def seconds(self) -> float:
        """All of it, once the card has come to the ends."""
        total = self._seconds
        for begin, end in self._spans:
            end.synchronize()
            total += begin.elapsed_time(end) / 1000
        return total

    @classmethod
    def total(cls, parts: "Sequence[Elapsed]") -> "Elapsed":
        """Of several together."""
        spans = [span for part in parts for span in part._spans]
        return cls(sum(part._seconds for part in parts), spans)


class Stopwatch:
    """Time of stretches of work where it is done: on a CPU by the host's clock, on a card between
    two events of the stream, so that what was queued before is not part of it and nobody waits.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._spans: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def measure(self, device: torch.device) -> Iterator[None]:
        """The work on ``device`` inside counts."""
        if device.type != "cuda":
            begin = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begin
            return
        stream = torch.cuda.current_stream(device)
        first = stream.record_event(torch.cuda.Event(enable_timing=True))
        yield
        last = stream.record_event(torch.cuda.Event(enable_timing=True))
        self._spans.append((first, last))
        self._add_ended()

    def take(self) -> Elapsed:
        """What has been measured since the last call."""
        taken = Elapsed(self._seconds, list(self._spans))
        self._seconds = 0.0
        self._spans.clear()
        return taken

    def _add_ended(self) -> None:
        """No events are kept of what the card has left behind."""
        while self._spans and self._spans[0][1].query():
            begin, end = self._spans.popleft()
            self._seconds += begin.elapsed_time(end) / 1000


class DeviceQueue:
    """The stream on which a thread beside the program gives its device work to a card. Without a
    card: nothing.

    A thread's stream is the card's default one unless it is told otherwise: its copies would wait
    for the model's kernels, and kernels for its exchange with other ranks, in an order that differs
    from rank to rank.

    A mark is a place in what a stream has been given. Work begins after the program's mark at the
    time it was asked for, and the program's own work goes on after the mark of what it uses. So
    what a job reads and writes is as if the program itself had given it to the card, and the host
    never waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def mark(self) -> "torch.cuda.Event | None":
        """Where the calling thread's stream is."""
        return (
            None if self._stream is None else torch.cuda.current_stream(self._device).record_event()
        )

    @contextmanager
    def after(self, mark: "torch.cuda.Event | None") -> Iterator[None]:
        """The calling thread's device work inside goes to the queue, and begins after ``mark``."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):  # and its device: a thread begins on the first card
            self.wait(mark)
            yield

    def wait(self, mark: "torch.cuda.Event | None") -> None:
        """The calling thread's stream goes on after ``mark``; the host does not wait."""
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)

    def borrow(self, values: object) -> None:
        """The calling thread's stream will use the tensors in ``values``, made on another stream.

        Their memory is given to nobody else before that is done, even if they are freed at once.
        """
        if self._stream is not None:
            for tensor in tensors_in(values):
                if tensor.is_cuda:
                    tensor.record_stream(torch.cuda.current_stream(self._device))


def tensors_in(values: object) -> Iterator[torch.Tensor]:
    """All tensors in nested mappings, lists, tuples and dataclasses."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, Mapping):
        yield from tensors_in(list(values.values()))
    elif is_dataclass(values):
        yield from tensors_in(vars(values))


def lock_pages(address: int, num_bytes: int) -> None:
    """Lock pages of this process's memory: they are never swapped, and cards may copy from and to
    them directly.

    Raises:
        RuntimeError: CUDA refuses, with its reason.
    """
    result = int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 1))  # 1: for all cards
    if result:
        raise torch.cuda.CudaError(result)


def unlock_pages(address: int) -> None:
    """Undo ``lock_pages``. What CUDA says to that is of no use: it may have ended before."""
    torch.cuda.cudart().cudaHostUnregister(address)

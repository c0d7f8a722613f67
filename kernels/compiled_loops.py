"""Loops compiled by numba, kept in a cache between processes where a directory can be written.

numba's own cache ends the program where no directory can be written, the disk is full or a file is
damaged, and two processes that compile different forms of a loop at once may each keep the other's.
Here a form has a file of its own, with a checksum; what cannot be read or kept is compiled again,
and a line says so.
"""

# numba has types of its own
# mypy: ignore-errors

import hashlib
import os
import pickle
import sys
import uuid
from functools import cache
from pathlib import Path

import numba
import torch.distributed as dist
from numba.core.caching import FunctionCache, NullCache
from numba.core.serialize import dumps

EACH_START = (
    "they are compiled at each start; set NUMBA_CACHE_DIR to a directory that can be written"
)
_DIGEST_BYTES = hashlib.sha256().digest_size


def compile_loop(**options):
    """Decorate a function as ``numba.njit(**options)`` does, with the interpreter lock released and
    the form cached.
    """

    def decorate(function):
        loop = numba.njit(nogil=True, **options)(function)
        try:
            loop._cache = LoopCache(function)
        except RuntimeError:  # no directory at all can be written
            loop._cache = Uncached()
        return loop

    return decorate


class LoopCache(FunctionCache):
    """numba's cache of one function, which never ends the program."""

    def __init__(self, function):
        super().__init__(function)
        stamp = (self._impl.locator.get_source_stamp(), neighbours_stamp(function))
        self._cache_file = LoopFiles(Path(self._cache_path), self._impl.filename_base, stamp)

    def load_overload(self, sig, target_context):
        """The compiled form of a signature, or None: numba compiles it then."""
        try:
            found = super().load_overload(sig, target_context)
        except Exception:  # whatever a file that does not fit makes of itself
            found = None
        if found is None:
            tell_once("compiling loops for this CPU: a few seconds, at the first start only")
        return found

    def save_overload(self, sig, data):
        """Keep a compiled form, if that is possible."""
        try:
            super().save_overload(sig, data)
        except OSError as error:
            tell_once(
                f"{self._cache_path} keeps no compiled loops ({error.strerror}): {EACH_START}"
            )


def neighbours_stamp(function):
    """SHA-256 of the sources that a function may inline from: those of its folder, and prefetching.

    numba's own stamp is of the function's file: what it inlines from another could change unseen.
    """
    folder = Path(function.__code__.co_filename).parent
    paths = [*sorted(folder.glob("*.py")), Path(__file__).with_name("prefetch.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


class Uncached(NullCache):
    """In place of a cache where no directory can be written."""

    def load_overload(self, sig, target_context):
        """Load nothing: nothing is kept."""
        tell_once(
            f"compiling loops for this CPU: a few seconds. No directory can keep them: {EACH_START}"
        )


class LoopFiles:
    """One file for each form of a function: a SHA-256 of the rest, then what numba makes of it."""

    def __init__(self, directory, base, stamp):
        self._directory = directory
        self._base = base
        self._stamp = stamp

    def load(self, key):
        """What was saved under ``key``; None where nothing was, or it is damaged."""
        try:
            content = self._path(key).read_bytes()
        except OSError:
            return None
        digest = content[:_DIGEST_BYTES]
        rest = content[_DIGEST_BYTES:]
        return pickle.loads(rest) if hashlib.sha256(rest).digest() == digest else None

    def save(self, key, data):
        """Replace the file of ``key`` at once or not at all."""
        rest = dumps(data)
        path = self._path(key)
        temporary = path.with_suffix(f".{uuid.uuid4().hex[:16]}")
        try:
            temporary.write_bytes(hashlib.sha256(rest).digest() + rest)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def _path(self, key):
        """Named by the signature, the processor, the code with what it closes over, the source and
        numba's version.
        """
        name = hashlib.sha256(repr((key, self._stamp, numba.__version__)).encode()).hexdigest()
        return self._directory / f"{self._base}.{name[:24]}.nbc"


@cache
def tell_once(line):
    """Say a line on stderr: once, and of a run's processes the first alone."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
        print(line, file=sys.stderr, flush=True)

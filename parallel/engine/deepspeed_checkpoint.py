"""DeepSpeed's own checkpoints, the peer of our benchmarks; a run never makes one."""

from pathlib import Path
from typing import Any

from parallel.engine.deepspeed import ZeroEngine
from parallel.engine.protocol import Engine


def save_deepspeed_checkpoint(engine: Engine, directory: Path, tag: str) -> None:
    """Write ``directory/tag`` as DeepSpeed does. Collective over world."""
    theirs = _deepspeed_engine(engine)
    theirs.save_checkpoint(str(directory), tag)


def load_deepspeed_checkpoint(
    engine: Engine,
    directory: Path,
    tag: str,
    *,
    is_universal: bool = False,
) -> None:
    """Read ``directory/tag`` as DeepSpeed does. Collective over world.

    Args:
        is_universal: it has been converted to the format that any layout reads.
    """
    theirs = _deepspeed_engine(engine)
    theirs._config.load_universal_checkpoint = is_universal
    theirs.load_checkpoint(str(directory), tag)


def _deepspeed_engine(engine: Engine) -> Any:
    assert isinstance(engine, ZeroEngine), "no other engine has checkpoints of its own"
    return engine._engine

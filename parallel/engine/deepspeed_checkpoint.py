"""DeepSpeed's own checkpoints, the peer of our benchmarks; a run never makes one."""

from pathlib import Path

from parallel.engine.deepspeed import ZeroEngine
from parallel.engine.protocol import Engine


def save_deepspeed_checkpoint(engine: Engine, directory: Path, tag: str) -> None:
    """Write ``directory/tag`` as DeepSpeed does. Collective over world."""
    assert isinstance(engine, ZeroEngine), "only DeepSpeed's engine has checkpoints of its own"
    engine._engine.save_checkpoint(str(directory), tag)


def load_deepspeed_checkpoint(
    engine: Engine, directory: Path, tag: str, *, is_universal: bool = False
) -> None:
    """Read ``directory/tag`` as DeepSpeed does. Collective over world.

    Args:
        is_universal: it has been converted to the format that any layout reads.
    """
    assert isinstance(engine, ZeroEngine), "only DeepSpeed's engine has checkpoints of its own"
    engine._engine._config.load_universal_checkpoint = is_universal
    engine._engine.load_checkpoint(str(directory), tag)

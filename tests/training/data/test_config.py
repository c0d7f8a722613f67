"""What ``prepare`` is asked to do, as it may be written."""

from dataclasses import replace

from tests.training.data.reading import small


def test_one_source_may_be_a_string(tmp_path):
    config = small(tmp_path, "a", "b")
    assert config == replace(config, source=(str(tmp_path / "docs.jsonl"),))

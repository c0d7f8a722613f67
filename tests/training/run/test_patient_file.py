"""Records outlive a disk that is full for a while."""

import json
import resource

import pytest

from training.run.patient_file import PatientFile

RECORD = {"step": 1, "loss": 3.0, "grad_norm": 1.0, "lr": 0.1}


def _full(path):
    """No file of this process grows past 100 bytes."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, former[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, former)


def _gone(path):
    """The directory is away, as a file system that is not mounted."""
    away = path.parent.with_name("away")
    path.parent.rename(away)
    return lambda: away.rename(path.parent)


def _a_device(path):
    """The file is a device that is full."""
    kept = path.with_suffix(".kept")
    path.rename(kept)
    path.symlink_to("/dev/full")
    return lambda: kept.replace(path)


@pytest.mark.parametrize("spoil", [_full, _gone, _a_device])
def test_lines_are_kept_until_they_can_be_written(spoil, tmp_path):
    told = []
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    file = PatientFile(path, told.append)
    lines = [json.dumps(RECORD | {"step": step}) for step in range(1, 8)]
    file.write(lines[0])
    file._drop_handle()  # as after any other error: the file is opened anew
    mend = spoil(path)
    try:
        for line in lines[1:5]:
            file.write(line)
    finally:
        mend()
    assert len(told) == 1
    assert "cannot be written" in told[0]
    for line in lines[5:]:
        file.write(line)
    file.close()
    assert path.read_text().splitlines() == lines
    assert told[1:] == [f"{path} is written again, nothing is missing"]


def test_what_could_never_be_written_is_told(tmp_path):
    told = []
    file = PatientFile(tmp_path / "nowhere" / "metrics.jsonl", told.append)
    for step in (1, 2, 3):
        file.write(str(step))
    file.close()
    assert "cannot be written" in told[0]
    assert told[1:] == [
        f"{tmp_path}/nowhere/metrics.jsonl lacks its last 3 lines: they could not be written"
    ]

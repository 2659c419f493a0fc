"""Checkpoints are whole or absent, prune themselves, and are found again."""

import json
from pathlib import Path

import pytest
import torch

from transformer_ext.files import FileError
from transformer_ext.training.checkpoint import Checkpoints


def _write(directory: Path) -> None:
    (directory / "config.json").write_text("{}")


def test_saves_and_loads(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    tensors = {"first_moment.a": torch.randn(3, 2), "steps.a": torch.tensor(4.0)}
    path = checkpoints.save(4, _write, tensors, {"progress": {"epoch": 1}}, best=[4])
    assert path.name == "step-4"
    assert {p.name for p in path.iterdir()} == {
        "config.json",
        "training.json",
        "training.safetensors",
    }
    loaded, state = checkpoints.load(4)
    assert set(loaded) == set(tensors)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert state["step"] == 4 and state["progress"] == {"epoch": 1}
    assert checkpoints.pointed("last") == checkpoints.pointed("best") == checkpoints.last() == 4


def test_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (2, 4, 8, 16, 100):
        checkpoints.save(step, _write, {}, {}, best=[4] if step >= 4 else [])
    assert checkpoints.steps() == [4, 16, 100]
    assert checkpoints.pointed("best") == 4 and checkpoints.pointed("last") == 100
    assert [p.name for p in checkpoints.newest(2)] == ["step-16", "step-100"]


def test_a_crash_while_writing_leaves_the_former_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, _write, {}, {})

    def crash(directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(2, crash, {}, {})
    assert checkpoints.steps() == [1] and checkpoints.pointed("last") == 1
    checkpoints.save(2, _write, {}, {})
    assert checkpoints.steps() == [1, 2]
    assert not list(tmp_path.glob("*.tmp-*"))


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, _write, {}, {"progress": 1})
    checkpoints.save(1, _write, {}, {"progress": 2})
    assert checkpoints.load(1)[1]["progress"] == 2


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.last() is None and checkpoints.pointed("best") is None
    with pytest.raises(FileError, match="step-3"):
        checkpoints.load(3)
    path = checkpoints.save(3, _write, {}, {}) / "training.json"
    path.write_text(json.dumps({"format_version": 99}))
    with pytest.raises(FileError, match="format_version is 99"):
        checkpoints.load(3)
    with pytest.raises(ValueError, match="keep_checkpoints"):
        Checkpoints(tmp_path, keep=0)

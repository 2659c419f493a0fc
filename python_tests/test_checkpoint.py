"""Checkpoints are whole or absent, prune themselves, and are found again."""

import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from killing import end_of, forked, killed_before

from transformer_ext import files
from transformer_ext.files import FileError, WriteError
from transformer_ext.training import checkpoint
from transformer_ext.training.checkpoint import Checkpoints


def _write(directory: Path) -> None:
    (directory / "config.json").write_text("{}")


def test_saves_and_loads(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    tensors = {"first_moment.a": torch.randn(3, 2), "steps.a": torch.tensor(4.0)}
    path = checkpoints.save(4, _write, tensors, {"progress": {"epoch": 1}}, best=[4])
    assert path.name == "step-4"
    assert {p.name for p in path.iterdir()} == {
        "checksums.json",
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


def _save(checkpoints: Checkpoints, step: int, best: bool = False) -> None:
    tensors = {"first_moment.a": torch.full((50, 20), float(step)), "steps.a": torch.tensor(step)}
    checkpoints.save(step, _write, tensors, {"progress": {"epoch": step}}, best=[step] * best)


def _content(checkpoints: Checkpoints, step: int) -> tuple[float, int]:
    tensors, state = checkpoints.load(step)
    return float(tensors["first_moment.a"].mean()), state["progress"]["epoch"]


def test_killed_between_any_two_operations_on_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The page cache outlives a process that is killed, and the disk takes most of the time.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    outcomes = []
    for step in (1, 2, 3):
        _save(Checkpoints(tmp_path / "begun", keep=2), step, best=step == 1)
    for cut in range(1000):
        folder = tmp_path / str(cut)
        shutil.copytree(tmp_path / "begun", folder)
        checkpoints = Checkpoints(folder, keep=2)
        died = killed_before(cut, folder, lambda: _save(Checkpoints(folder, keep=2), 4, best=True))  # noqa: B023
        found = checkpoints.last_good(pytest.fail)
        assert found in (3, 4)
        outcomes.append(found)
        for step in checkpoints.steps():
            checkpoints.verify(step)
            assert _content(checkpoints, step) == (step, step)
        assert checkpoints.pointed("last") in ({3} if found == 3 else {3, 4})
        assert checkpoints.pointed("best") in ({1} if found == 3 else {1, 4})
        # The next one clears what was left behind.
        _save(checkpoints, 5)
        assert checkpoints.pointed("last") == 5 and not list(folder.glob("*.tmp-*"))
        shutil.rmtree(folder)
        if died == 0:
            break
        assert died == -signal.SIGKILL
    assert cut > 30
    # Once it is there it stays.
    assert outcomes == sorted(outcomes) and set(outcomes) == {3, 4}


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


_DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "cut off": lambda path, other: os.truncate(path, path.stat().st_size - 2),
    "empty": lambda path, other: os.truncate(path, 0),
    "altered": lambda path, other: _flip(path),
    "longer": lambda path, other: path.write_bytes(path.read_bytes() + b"x"),
    "removed": lambda path, other: path.unlink(),
    "of another step": lambda path, other: path.write_bytes(other.read_bytes()),
    "a folder": lambda path, other: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", _DAMAGES)
@pytest.mark.parametrize(
    "name", ["config.json", "training.safetensors", "training.json", "checksums.json"]
)
def test_a_damaged_file_is_named_and_the_last_good_checkpoint_found(
    tmp_path: Path, name: str, damage: str
) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (10, 20, 30):
        _save(checkpoints, step)
    if name == "config.json":  # The same in every step, so let one differ.
        (tmp_path / "other").write_text('{"other": 1}')
        other = tmp_path / "other"
    else:
        other = tmp_path / "step-20" / name
    damaged = tmp_path / "step-30" / name
    _DAMAGES[damage](damaged, other)
    told: list[str] = []
    assert checkpoints.last_good(told.append) == 20
    assert len(told) == 1 and str(damaged) in told[0], told
    # It is no longer in the way, and goes when its step is saved anew.
    assert checkpoints.set_aside_after(20) == [tmp_path / "step-30.damaged"]
    assert checkpoints.steps() == [10, 20] and checkpoints.last() == 20
    _save(checkpoints, 30)
    assert not (tmp_path / "step-30.damaged").exists() and checkpoints.last_good(told.append) == 30
    assert len(told) == 1


def test_a_checkpoint_under_the_name_of_another_step_is_no_good(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    _save(checkpoints, 10)
    shutil.copytree(tmp_path / "step-10", tmp_path / "step-20")
    told: list[str] = []
    assert checkpoints.last_good(told.append) == 10
    assert told == [f"{tmp_path / 'step-20' / 'checksums.json'}: is of the checkpoint of step 10"]


def test_no_good_checkpoint_is_an_error_and_none_at_all_is_not(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.last_good() is None
    for step in (10, 20):
        _save(checkpoints, step)
        _flip(tmp_path / f"step-{step}" / "training.safetensors")
    with pytest.raises(FileError, match="no checkpoint is left to go on from") as error:
        checkpoints.last_good()
    assert "step-10" in str(error.value) and "step-20" in str(error.value)


def test_a_missing_last_checkpoint_is_told(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (10, 20):
        _save(checkpoints, step)
    shutil.rmtree(tmp_path / "step-20")
    told: list[str] = []
    assert checkpoints.last_good(told.append) == 10
    assert "step-20" in told[0] and "missing" in told[0]
    shutil.rmtree(tmp_path / "step-10")
    with pytest.raises(FileError, match="step-20: is missing"):
        checkpoints.last_good()


def _unchanged(checkpoints: Checkpoints, step: int) -> None:
    assert checkpoints.last_good(pytest.fail) == step == checkpoints.pointed("last")
    assert not list(checkpoints.directory.glob("*.tmp-*"))


def test_a_file_that_may_not_grow_is_named_with_its_size(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    _save(checkpoints, 1)

    def grow() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        with pytest.raises(WriteError) as error:
            _save(checkpoints, 2)
        assert error.value.errno == errno.EFBIG
        path = str(error.value.filename)
        assert path.startswith(str(tmp_path / "step-2")) and path.endswith("training.safetensors")
        assert "needs 4,1" in str(error.value) and "2,000: ulimit -f)" in str(error.value)
        return 0

    assert end_of(forked(grow)) == 0
    _unchanged(checkpoints, 1)


@pytest.mark.parametrize(
    "reason", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO]
)
def test_an_error_of_any_operation_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    checkpoints = Checkpoints(tmp_path)
    _save(checkpoints, 1)
    fsync, write, mkdir, rename = os.fsync, files._write, Path.mkdir, os.rename

    def failing(module: object, name: str, original: Callable[..., object], at: int) -> None:
        calls = iter(range(1000))

        def call(*arguments: object, **keywords: object) -> object:
            if next(calls) == at:
                raise OSError(reason, os.strerror(reason))
            return original(*arguments, **keywords)

        monkeypatch.setattr(module, name, call)

    for module, name, original, most in (
        (os, "fsync", fsync, 11),
        (files, "_write", write, 6),
        (Path, "mkdir", mkdir, 2),
        (os, "rename", rename, 1),
    ):
        for at in range(most):
            failing(module, name, original, at)
            with pytest.raises(WriteError) as error:
                _save(checkpoints, 2)
            assert error.value.errno == reason
            text = str(error.value)
            assert str(tmp_path) in text and os.strerror(reason) in text, text
            monkeypatch.undo()
            assert not list(tmp_path.glob("*.tmp-*"))
            # An error after the renaming is one of the pointer.
            found = checkpoints.last_good(pytest.fail)
            renamed_after = {"fsync": 8, "_write": 5}.get(name, most)
            assert found == (2 if at >= renamed_after else 1), (name, at)
            if found == 2:
                shutil.rmtree(tmp_path / "step-2")
                checkpoints.settle(1, [])
    _save(checkpoints, 2)
    _unchanged(checkpoints, 2)


def test_a_disk_without_space_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    _save(checkpoints, 1)
    monkeypatch.setattr(checkpoint, "free_bytes", lambda path: 4000)
    monkeypatch.setattr(files, "free_bytes", lambda path: 4000)
    monkeypatch.setattr(checkpoint, "atomic_directory", lambda *a, **k: pytest.fail("written"))
    with pytest.raises(WriteError) as error:
        _save(checkpoints, 2)
    assert str(error.value) == (
        f"{tmp_path / 'step-2'}: cannot be written: {os.strerror(errno.ENOSPC)} "
        "(it needs 4,008 bytes, 4,000 are free on its disk)"
    )
    _unchanged(checkpoints, 1)


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

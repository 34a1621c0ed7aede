"""Files that are replaced as a whole, and locks: what a kill, a full disk or a second process leaves."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.full_disk import largest_file

import pathnet
from pathnet import files
from pathnet.files import locked, remove_leftovers, replacing


def write(path: Path, content: bytes, consequence: str = "") -> None:
    with replacing(path, "run", consequence) as file:
        file.write(content)


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"first", b"second, and longer", b""):
        write(path, content)
        assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write(tmp_path / "replaced", b"x")
    assert (tmp_path / "replaced").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("failure", [ValueError("x"), KeyboardInterrupt(), SystemExit(1)], ids=repr)
def test_a_failure_on_the_way_leaves_the_file_of_before(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(type(failure)), replacing(path, "run") as file:
        file.write(b"half")
        raise failure
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_what_a_full_disk_does_not_take_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with largest_file(1000), pytest.raises(OSError) as failure:
        write(path, bytes(5000), "3 rows are lost")
    assert str(failure.value) == f"run: {path} cannot be written (File too large); 3 rows are lost"
    assert failure.value.errno == errno.EFBIG
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_to_bring_it_to_the_disk_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, "fsync", full) if call == "fsync" else (Path, "replace", full)))
    with pytest.raises(OSError) as failure:
        write(tmp_path / "file", b"x")
    assert str(failure.value) == f"run: {tmp_path / 'file'} cannot be written (No space left on device)"
    assert not list(tmp_path.iterdir())


def test_file_and_folder_are_brought_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path / "file", b"x")
    assert len(synced) == 2 and files.TEMPORARY.fullmatch(Path(synced[0]).name) and synced[1] == str(tmp_path)


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path, "run") as first:
        first.write(b"first")
        write(path, b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"^run: .*nowhere/file cannot be written \(No such file or directory\)$"):
        write(tmp_path / "nowhere" / "file", b"x")


def test_leftovers_are_what_this_library_left_for_the_target(tmp_path: Path) -> None:
    strangers = ["notes.tmp", "file.tmp", ".file.0123.pathnet-temporary", ".other.0123456789ab.pathnet-temporary"]
    for name in (*strangers, ".file.0123456789ab.pathnet-temporary"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, "file")
    assert {file.name for file in tmp_path.iterdir()} == set(strangers)


def test_a_lock_is_held_once_and_let_go_of(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    for keep in (True, False):
        with locked(lock, "run", "writing", keep):
            with pytest.raises(ValueError, match="^run: another process is writing$"), locked(lock, "run", "writing"):
                pass
            assert lock.exists()
        assert lock.exists() == keep


def test_a_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    script = f"""
import os, pathlib, signal, sys
sys.path.insert(0, {str(Path(pathnet.__file__).parent.parent)!r})
from pathnet.files import locked
with locked(pathlib.Path({str(tmp_path / "lock")!r}), "run", "writing", keep=False):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == -9
    assert (tmp_path / "lock").exists()
    with locked(tmp_path / "lock", "run", "writing", keep=False):
        pass


def test_a_lock_that_its_holder_removed_meanwhile_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, flock, calls = tmp_path / "lock", files.fcntl.flock, 0

    def late(descriptor: int, how: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            lock.unlink()
        flock(descriptor, how)

    monkeypatch.setattr(files.fcntl, "flock", late)
    with locked(lock, "run", "writing"):
        assert lock.exists() and calls == 2


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "pipe"])
def test_a_lock_that_is_something_else_is_refused_untouched(tmp_path: Path, kind: str) -> None:
    lock, target = tmp_path / ".lock", tmp_path / "target"
    if kind == "link":
        target.write_text("precious")
    if "link" in kind:
        lock.symlink_to(target)
    elif kind == "folder":
        lock.mkdir()
    else:
        os.mkfifo(lock)
    message = "^run: expected a lock file at .*, got a link, a folder or a device"
    with pytest.raises(ValueError, match=message), locked(lock, "run", "writing"):
        pass
    assert not target.exists() or target.read_text() == "precious"


def test_a_lock_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("of somebody")
    with locked(tmp_path / ".lock", "run", "writing"):
        pass
    assert (tmp_path / ".lock").read_text() == "of somebody"

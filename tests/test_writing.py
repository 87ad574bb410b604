"""At any moment the old file or the whole new one is there."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deadcheck.errors import UsageError
from deadcheck.writing import check_target, write_safely, write_text


def content(text: str) -> object:
    return lambda path: path.write_text(text)


def test_a_new_file_has_the_usual_mode(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        write_safely(tmp_path / "new", content("it"))  # type: ignore[arg-type]
    finally:
        os.umask(mask)

    assert (tmp_path / "new").read_text() == "it"
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_an_old_file_keeps_its_mode_and_its_link(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "old").chmod(0o604)
    (tmp_path / "link").symlink_to("old")
    write_safely(tmp_path / "link", content("new"))  # type: ignore[arg-type]

    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "old").read_text() == "new"
    assert (tmp_path / "old").stat().st_mode & 0o777 == 0o604


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("other")])
def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, error: Exception) -> None:
    (tmp_path / "it").write_text("old")

    def write(path: Path) -> None:
        path.write_text("half")
        raise error

    with pytest.raises((UsageError, ValueError), match=r"No space left on device; choose another place|other"):
        write_safely(tmp_path / "it", write)
    assert (tmp_path / "it").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["it"]


@pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
def test_each_step_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    (tmp_path / "it").write_text("old")

    def fail(*given: object, **named: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(UsageError, match=r"cannot write .*Input/output error"):
        write_safely(tmp_path / "it", content("new"))  # type: ignore[arg-type]
    assert (tmp_path / "it").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["it"]


def test_an_interrupt_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "it").write_text("old")

    def write(path: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safely(tmp_path / "it", write)
    assert [p.name for p in tmp_path.iterdir()] == ["it"]


def test_killed_at_any_moment_the_old_or_the_new_file_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "it"
    old, new = "o" * 200_000, "n" * 200_000
    code = (
        "import sys\nfrom pathlib import Path\nfrom deadcheck.writing import write_safely\n"
        f"print('ready', flush=True)\nwhile True:\n    for letter in 'no':\n"
        f"        write_safely(Path({str(target)!r}), lambda path: path.write_text(letter * 200_000))\n"
    )
    seen = set()
    for attempt in range(12):
        target.write_text(old)
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.003 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        text = target.read_text()

        assert text in (old, new)
        seen.add(text)
    assert len(seen) == 2


def test_what_must_not_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    model = tmp_path / "net.pt"
    model.write_text("model")
    (tmp_path / "link.pt").symlink_to("net.pt")
    os.link(model, tmp_path / "hard.pt")
    os.mkfifo(tmp_path / "pipe")
    for path, force, message in (
        (model, True, "is the model itself, which is never written over"),
        (tmp_path / "." / "net.pt", True, "is the model itself"),
        (tmp_path / "link.pt", True, "is the model itself"),
        (tmp_path / "hard.pt", True, "is the model itself"),
        (tmp_path, True, "is a folder; name a file in it"),
        (tmp_path / "no" / "such.pt", True, "does not exist; create it first"),
        (tmp_path / "pipe", True, "is no regular file"),
    ):
        with pytest.raises(UsageError, match=message):
            check_target(path, force=force, source=model)
    (tmp_path / "other.pt").write_text("other")
    with pytest.raises(UsageError, match="exists already; name another file, or write over it with --force"):
        check_target(tmp_path / "other.pt", force=False, source=model)
    check_target(tmp_path / "other.pt", force=True, source=model)
    check_target(tmp_path / "fresh.pt", force=False, source=model)


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "grün\n")

    assert os.read(reader, 100) == "grün\n".encode()
    assert pipe.is_fifo()
    os.close(reader)

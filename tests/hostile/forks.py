"""Runs the command line in forked children of one process that has torch loaded, and says how each of them ended.

A child has limits of its own on memory and time, so one that dies, hangs or takes the memory is a result, not an end.
Run as a program, it reads a job a line from stdin and answers each with a line on stdout.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import select
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
ADDRESS_SPACE = 3 << 30
"""Bytes that a child may map beyond what the parent has; more is a MemoryError in it."""


@dataclass(frozen=True)
class Run:
    """How one child ended."""

    code: int
    """Exit code; negative for the signal that killed it."""

    out: str
    err: str
    seconds: float
    """Time that it computed, which other processes of the machine do not change."""

    peak: int
    """Most KiB of memory that it held."""


class Server:
    """The parent process, started anew; close it, or leave the ``with``."""

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.forks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(environment or {})},
        )
        self.bare = self.run(["--version"]).peak
        """KiB that a child holds which does nothing."""

    def run(self, argv: Iterable[object], *, cwd: Path = ROOT, seconds: float = 60, as_nobody: bool = False) -> Run:
        """Run ``deadcheck`` with these arguments; as nobody, since root may read every file."""
        return self._ask({"argv": [*map(str, argv)], "cwd": str(cwd), "seconds": seconds, "as_nobody": as_nobody})

    def loads(self, loader: str, path: Path, *, seconds: float = 60) -> Run:
        """Open a file as the unsafe function of that name does: to see that a payload would run."""
        return self._ask({"loader": loader, "path": str(path), "cwd": str(path.parent), "seconds": seconds})

    def _ask(self, job: dict[str, Any]) -> Run:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return Run(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the parent process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


def in_a_child(work: Callable[[], None], *, cwd: str, seconds: float) -> Run:
    """Run something in a forked child with its output caught."""
    with tempfile.TemporaryFile("w+b") as out, tempfile.TemporaryFile("w+b") as err:
        child = os.fork()
        if child == 0:
            _begin(out.fileno(), err.fileno(), cwd)
            work()
            os._exit(0)
        status, usage = _wait(child, seconds)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    return Run(os.waitstatus_to_exitcode(status), texts[0], texts[1], usage.ru_utime + usage.ru_stime, usage.ru_maxrss)


def _begin(out: int, err: int, cwd: str) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (out, 1), (err, 2)):
        os.dup2(source, target)
    os.chdir(cwd)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESS_SPACE,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _wait(child: int, seconds: float) -> tuple[int, resource.struct_rusage]:
    """Wait for a child, and kill it when its time is over."""
    handle = os.pidfd_open(child)
    try:
        if not select.select([handle], [], [], seconds)[0]:
            os.kill(child, 9)
        _, status, usage = os.wait4(child, 0)
    finally:
        os.close(handle)
    return status, usage


def command(argv: list[str], *, as_nobody: bool) -> Callable[[], None]:
    """Return what runs the command line, as the console script does, and ends the process."""

    def work() -> None:
        from deadcheck.cli import main

        if as_nobody and os.geteuid() == 0:
            os.seteuid(65534)
        sys.argv = ["deadcheck", *argv]
        code: Any = 1
        try:
            main()
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)

    return work


def _warm(argv: list[str]) -> None:
    from deadcheck.cli import main

    sys.argv, held = ["deadcheck", *argv], sys.stderr
    with open(os.devnull, "w") as sys.stderr, contextlib.suppress(SystemExit):
        main()
    sys.stderr = held


def loader(name: str, path: str) -> Callable[[], None]:
    """Return what opens a file without any care."""

    def work() -> None:
        import pickle

        import numpy as np
        import torch
        import yaml

        def pickled(path: str) -> None:
            with open(path, "rb") as file:
                pickle.load(file)

        loaders: dict[str, Callable[[], Any]] = {
            "pickle": lambda: pickled(path),
            "torch": lambda: torch.load(path, weights_only=False),
            "export": lambda: torch.export.load(path).module()(torch.ones(2, 4)),
            "script": lambda: torch.jit.load(path)(torch.ones(2, 4)),
            "numpy": lambda: np.load(path, allow_pickle=True),
            "npz": lambda: [*np.load(path, allow_pickle=True).values()],
            "yaml": lambda: yaml.load(Path(path).read_text(), Loader=yaml.UnsafeLoader),
        }
        try:
            loaders[name]()
        except Exception as error:
            print(type(error).__name__, str(error)[:500], file=sys.stderr)

    return work


def serve() -> None:
    """Answer jobs until there are no more."""
    import torch
    import torch.export.pt2_archive._package  # takes seconds, which every child would pay

    import deadcheck.cli
    import deadcheck.formats
    import deadcheck.inspection
    import deadcheck.pipeline
    import deadcheck.reports  # noqa: F401 (children find all of it loaded)

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for verb in ("scan", "inspect"):  # loads what a command loads
        _warm([verb, "/nowhere"])
    gc.freeze()  # a collection in a child would copy every page that it walks
    for line in sys.stdin:
        job = json.loads(line)
        work = command(job["argv"], as_nobody=job["as_nobody"]) if "argv" in job else loader(job["loader"], job["path"])
        run = in_a_child(work, cwd=job["cwd"], seconds=job["seconds"])
        answers.write(json.dumps(vars(run)) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()

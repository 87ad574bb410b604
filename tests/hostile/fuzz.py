"""Changes valid files of every kind at random and sees that no command hangs, dies, takes the memory or loses its way.

``python -m tests.hostile.fuzz --count 20000 --seed 0`` names each input that does, and keeps it with ``--keep FOLDER``.
Each input is run in a forked child, with limits of its own on memory and time.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hostile.cases import ARCH
from tests.hostile.corpus import named
from tests.hostile.forks import Run, in_a_child
from tests.hostile.mutations import changed

CODES = frozenset((0, 1, 2, 3, 4))
CPU_SECONDS = 10
WALL_SECONDS = 120
MIB = 1024
"""The most that a child may take beyond a bare one."""

LARGEST = 4 << 20
"""Bytes of an input."""

MARKER = Path("marker")


@dataclass(frozen=True)
class Source:
    """A valid small file, and the commands that take it."""

    name: str
    data: bytes
    commands: tuple[tuple[str, ...], ...]
    """Arguments, with FILE for the changed file."""


MODEL = (("scan", "FILE", "--data", "good.npy"), ("inspect", "FILE"))
WEIGHTS = (("scan", "FILE", "--data", "good.npy", "--arch", "arch.py:net"), ("inspect", "FILE", "-f", "json"))
DATA = (("scan", "good.pt", "--data", "FILE"),)
SETTINGS = (("scan", "good.pt", "--data", "good.npy", "--config", "FILE"), ("config", "validate", "FILE"))
FOLDER = (("scan", ".", "--data", "good.npy", "--arch", "arch.py:net"), ("inspect", "."))
REPORT = (
    ("report", "FILE"),
    ("gate", "--report", "FILE"),
    ("gate", "good.pt", "--data", "good.npy", "--baseline", "FILE"),
    ("diff", "FILE", "good.json"),
)
PART = (("merge", "FILE"), ("scan", "good.pt", "--data", "good.npy", "--checkpoint", "FILE"))


def _bytes(save: Callable[[Any], object]) -> bytes:
    held = io.BytesIO()
    save(held)
    return held.getvalue()


def _case(name: str) -> bytes:
    """Return a file of the corpus."""
    path = named(name).make(Path(), MARKER)
    data = path.read_bytes()
    path.unlink()
    return data


def _modules() -> Iterator[tuple[str, Any]]:
    import torch
    from torch import nn

    yield "sequential", nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    yield "convolution", nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.GELU())
    yield "lstm", nn.Sequential(nn.LSTM(4, 3, batch_first=True))
    yield "encoder", nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))
    pruned = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    torch.nn.utils.prune.l1_unstructured(pruned[0], "weight", 0.5)  # type: ignore[no-untyped-call]
    yield "pruned", pruned
    yield "weight-norm", nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(4, 3)), nn.ReLU())
    yield "parallel", nn.DataParallel(nn.Sequential(nn.Linear(4, 3), nn.ReLU()))
    yield "quantised", torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), {nn.Linear})


def sources() -> list[Source]:
    """Return one valid file of every kind that a command takes."""
    import numpy as np
    import safetensors.torch
    import torch
    from torch import nn

    from deadcheck.config import FILE_NAME

    torch.manual_seed(0)
    root = Path(__file__).parent.parent.parent
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    state, x = net.state_dict(), np.ones((8, 4), np.float32)
    odd = [torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr(), torch.ones(2, dtype=torch.complex64).conj(),
           torch.quantize_per_channel(torch.ones(3, 2), torch.ones(3), torch.zeros(3), 0, torch.qint8)]  # fmt: skip
    out = [Source(f"{name}.pt", _bytes(lambda f, m=module: torch.save(m, f)), MODEL) for name, module in _modules()]
    out += [
        Source("legacy.pt", _bytes(lambda f: torch.save(net, f, _use_new_zipfile_serialization=False)), MODEL),
        Source("module-and-arch.pt", _bytes(lambda f: torch.save(net, f)), WEIGHTS),
        Source("protocol.pt", _bytes(lambda f: torch.save(state, f, pickle_protocol=4)), WEIGHTS),
        Source("state.pt", _bytes(lambda f: torch.save(state, f)), WEIGHTS),
        Source("legacy-state.pt", _bytes(lambda f: torch.save(state, f, _use_new_zipfile_serialization=False)), WEIGHTS),
        Source("odd-tensors.pt", _bytes(lambda f: torch.save({"state_dict": state, "odd": odd}, f)), WEIGHTS),
        Source("checkpoint.pt", _bytes(lambda f: torch.save({"state_dict": state, "epoch": 3, "args": argparse.Namespace(a=1)}, f)),
             WEIGHTS),
        Source("weights.safetensors", safetensors.torch.save(state), WEIGHTS),
        Source("model.pt2", _case("pt2-guards"), MODEL),
        Source("scripted.pt", _bytes(lambda f: torch.jit.save(torch.jit.script(net), f)), MODEL),
        Source("traced.pt", _bytes(lambda f: torch.jit.save(torch.jit.trace(net, torch.ones(2, 4)), f)), MODEL),
        Source("evil.pt", _case("pickle-global-in-zip"), MODEL),
        Source("evil.pt2", _case("pt2-sample-pickle"), MODEL),
        Source("x.npy", _bytes(lambda f: np.save(f, x)), DATA),
        Source("x.npz", _bytes(lambda f: np.savez(f, x=x)), DATA),
        Source("packed.npz", _bytes(lambda f: np.savez_compressed(f, x=x)), DATA),
        Source("x.pt", _bytes(lambda f: torch.save({"x": torch.ones(8, 4), "y": torch.ones(8)}, f)), DATA),
        Source("batches.pt", _bytes(lambda f: torch.save([torch.ones(2, 4), torch.ones(3, 4)], f)), DATA),
        Source("x.safetensors", safetensors.torch.save({"x": torch.ones(8, 4)}), DATA),
        Source("config.json", json.dumps({"model_type": "x", "architectures": ["X"], "hidden_act": "relu"}).encode(), FOLDER),
        Source("model.safetensors", safetensors.torch.save(state), FOLDER),
        Source("model.safetensors.index.json", json.dumps({"weight_map": {"a": "model.safetensors"}}).encode(), FOLDER),
        Source(FILE_NAME, (root / "configs" / "default.yaml").read_bytes(), SETTINGS),
        Source("strict.yaml", (root / "configs" / "ci-strict.yaml").read_bytes(), SETTINGS),
        Source("pyproject.toml", b"[tool.deadcheck.scan]\nseed = 5\n[tool.deadcheck.thresholds]\ntau = 0.1\n", SETTINGS),
        Source("report.json", Path("good.json").read_bytes(), REPORT),
        Source("scan.part", Path("good.part").read_bytes(), PART),
    ]  # fmt: skip
    return out


def prepare() -> None:
    """Write the files that the commands need beside the changed one, and load all that they load."""
    import numpy as np
    import torch
    from torch import nn

    torch.manual_seed(0)
    torch.set_num_threads(1)
    Path("arch.py").write_text(ARCH)
    torch.save(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), "good.pt")
    np.save("good.npy", np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32))
    for argv in (
        ("scan", "good.pt", "--data", "good.npy", "-o", "json=good.json", "--per-unit"),
        ("scan", "good.pt", "--data", "good.npy", "--checkpoint", "good.part"),
        ("inspect", "good.pt"),
    ):
        code, _, err = _called(argv)
        assert code == 0, err


def _called(argv: Sequence[str]) -> tuple[Any, str, str]:
    """Run a command in this process; return its exit code, stdout and stderr."""
    from deadcheck.cli import main

    sys.argv = ["deadcheck", *argv]
    code: Any = "no exit"
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main()
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
    return (0 if code is None else code), out.getvalue(), err.getvalue()


def run_input(source: Source) -> Run:
    """Run the commands that take a changed file, in a child."""

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (3 * CPU_SECONDS, 3 * CPU_SECONDS))
        answers = []
        for command in source.commands:
            argv = [word.replace("FILE", source.name) for word in command]
            began = time.process_time()
            code, out, err = _called(argv)
            answers.append({"argv": argv, "code": code, "said": bool(out or err), "err": err[-2000:], "lines": err.count("\n"),
                            "failed": "Traceback" in out + err or "internal error" in err,
                            "seconds": time.process_time() - began})  # fmt: skip
        os.write(1, json.dumps(answers).encode())

    return in_a_child(work, cwd=".", seconds=WALL_SECONDS)


def faults(run: Run, bare: int) -> list[str]:
    """Return what is wrong with how a child ended; nothing where all is well."""
    if run.code != 0:
        return [f"the process died ({run.code}): {run.err[-300:]}"]
    found = [f"took {(run.peak - bare) // 1024} MiB"] if (run.peak - bare) // 1024 > MIB else []
    if MARKER.exists():
        MARKER.rmdir()
        found.append("ran code of the file")
    for answer in json.loads(run.out):
        code, err = answer["code"], answer["err"]
        wrong = {
            f"exit code {code}": code not in CODES,
            "a crash": answer["failed"],
            "not a word": code not in (0, 1) and not answer["said"],
            "an error, and all is well": code in (0, 1) and "Error" in err,
            f"{answer['lines']} lines of error": answer["lines"] > 40,
            f"{answer['seconds']:.0f} s": answer["seconds"] > CPU_SECONDS,
        }
        found += [f"{' '.join(answer['argv'])}: {what}: {err[-400:].strip()}" for what, is_so in wrong.items() if is_so]
    return found


class Fuzzer:
    """Makes and runs inputs in the working directory, which must be empty, and remembers how they ended."""

    def __init__(self, seed: int, *, keep: Path | None = None, only: str = "") -> None:
        prepare()
        every = sources()
        self.files = [file for file in every if only in file.name]
        self._others = [file.data for file in every]
        self._folder = {file.name: file.data for file in every if file.commands is FOLDER}
        self._seed, self._keep = seed, keep
        gc.freeze()  # a collection in a child would copy every page that it walks
        self.bare = in_a_child(lambda: None, cwd=".", seconds=60).peak
        self.codes: Counter[str] = Counter()
        self.slowest = 0.0
        self.largest = 0
        self.faults = 0
        for file in self.files:  # a file that no command takes would test nothing
            answers = json.loads(self._answered(file, file.data).out)
            assert all(answer["code"] != 2 for answer in answers), answers

    def _answered(self, file: Source, data: bytes) -> Run:
        beside = self._folder if file.commands is FOLDER else {}
        for name, content in {**beside, file.name: data}.items():
            Path(name).write_bytes(content)
        run = run_input(file)
        for name in {file.name, *beside}:
            Path(name).unlink()
        return run

    def run(self, number: int) -> None:
        """Make the input of that number, run it, and print what is wrong with how it ended."""
        rng = random.Random(f"{self._seed}:{number}")
        file = self.files[number % len(self.files)]
        data = file.data
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            data = changed(rng, data, self._others, file.name)[:LARGEST]
        run = self._answered(file, data)
        self.largest = max(self.largest, run.peak - self.bare)
        if run.code == 0:
            answers = json.loads(run.out)
            self.codes.update(f"{answer['argv'][0]} {answer['code']}" for answer in answers)
            self.slowest = max(self.slowest, *(answer["seconds"] for answer in answers))
        for fault in faults(run, self.bare):
            self.faults += 1
            print(f"{self._seed}:{number} {file.name}: {fault}", flush=True)
            if self._keep is not None:
                self._keep.mkdir(parents=True, exist_ok=True)
                (self._keep / f"{self._seed}-{number}-{file.name}").write_bytes(data)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the inputs that failed")
    parser.add_argument("--only", default="", help="part of the name of the files to change")
    given = parser.parse_args()
    keep = None if given.keep is None else given.keep.resolve()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        fuzzer = Fuzzer(given.seed, keep=keep, only=given.only)
        for number in range(given.count):
            fuzzer.run(number)
            if number % 1000 == 999:
                print(f"{number + 1} inputs, {fuzzer.faults} faults", file=sys.stderr, flush=True)
        os.chdir("/")
    print(f"{given.count} inputs from {len(fuzzer.files)} files in {time.monotonic() - began:.0f} s: "
          f"{fuzzer.faults} faults, at most {fuzzer.slowest:.1f} s and {fuzzer.largest // 1024} MiB")  # fmt: skip
    print(", ".join(f"{what}: {count}" for what, count in sorted(fuzzer.codes.items())))
    return 1 if fuzzer.faults else 0


if __name__ == "__main__":
    sys.exit(main())

"""Changes valid files of every kind at random and sees that no command hangs, dies, takes the memory or loses its way.

``python -m tests.hostile.fuzz --count 20000 --seed 0`` names each input that does, and keeps it with ``--keep FOLDER``.
Each input is run in a forked child, with limits of its own on memory and time.
"""

from __future__ import annotations

import argparse
import contextlib
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

from tests.hostile import evil_pickles, evil_programs
from tests.hostile.cases import ARCH
from tests.hostile.forks import Run, in_a_child
from tests.hostile.mutations import changed

CODES = frozenset((0, 1, 2, 3, 4))
CPU_SECONDS = 10
WALL_SECONDS = 120
MIB = 1024  # the most that a child may take beyond a bare one


@dataclass(frozen=True)
class Seed:
    """A valid small file, and the commands that take it."""

    name: str
    data: bytes
    commands: tuple[tuple[str, ...], ...]
    """Arguments, with FILE for the changed file."""


MODEL = (("scan", "FILE", "--data", "good.npy"), ("inspect", "FILE"))
WEIGHTS = (("scan", "FILE", "--data", "good.npy", "--arch", "arch.py:net"), ("inspect", "FILE", "-f", "json"))
DATA = (("scan", "good.pt", "--data", "FILE"),)
SETTINGS = (("scan", "good.pt", "--data", "good.npy", "--config", "FILE"), ("config", "check", "FILE"))
FOLDER = (("scan", ".", "--data", "good.npy", "--arch", "arch.py:net"), ("inspect", "."))
REPORT = (
    ("report", "FILE"),
    ("gate", "good.pt", "--data", "good.npy", "--baseline", "FILE"),
    ("diff", "FILE", "good.json"),
)


def _bytes(save: Callable[[Any], object]) -> bytes:
    held = io.BytesIO()
    save(held)
    return held.getvalue()


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


def seeds() -> list[Seed]:
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
    sparse = {**state, "s": torch.eye(3).to_sparse(), "c": torch.eye(3).to_sparse_csr(),
              "q": torch.quantize_per_channel(torch.ones(3, 2), torch.ones(3), torch.zeros(3), 0, torch.qint8)}  # fmt: skip
    program = evil_programs._good()
    payload = dict(program)
    evil_programs._put(evil_programs.SAMPLE, evil_programs._evil)(payload, Path("marker"))
    out = [Seed(f"{name}.pt", _bytes(lambda f, m=module: torch.save(m, f)), MODEL) for name, module in _modules()]
    out += [
        Seed("legacy.pt", _bytes(lambda f: torch.save(net, f, _use_new_zipfile_serialization=False)), MODEL),
        Seed("protocol.pt", _bytes(lambda f: torch.save(state, f, pickle_protocol=4)), WEIGHTS),
        Seed("state.pt", _bytes(lambda f: torch.save(state, f)), WEIGHTS),
        Seed("legacy-state.pt", _bytes(lambda f: torch.save(state, f, _use_new_zipfile_serialization=False)), WEIGHTS),
        Seed("odd-tensors.pt", _bytes(lambda f: torch.save(sparse, f)), WEIGHTS),
        Seed("checkpoint.pt", _bytes(lambda f: torch.save({"state_dict": state, "epoch": 3, "args": argparse.Namespace(a=1)}, f)),
             WEIGHTS),
        Seed("weights.safetensors", safetensors.torch.save(state), WEIGHTS),
        Seed("model.pt2", evil_programs.zipped(program, folder="model/"), MODEL),
        Seed("scripted.pt", _bytes(lambda f: torch.jit.save(torch.jit.script(net), f)), MODEL),
        Seed("traced.pt", _bytes(lambda f: torch.jit.save(torch.jit.trace(net, torch.ones(2, 4)), f)), MODEL),
        Seed("evil.pt", evil_pickles._in_zip(evil_pickles._FUNCTIONS["builtins-exec"])(Path("marker")), MODEL),
        Seed("evil.pt2", evil_programs.zipped(payload, folder="model/"), MODEL),
        Seed("x.npy", _bytes(lambda f: np.save(f, x)), DATA),
        Seed("x.npz", _bytes(lambda f: np.savez(f, x=x)), DATA),
        Seed("packed.npz", _bytes(lambda f: np.savez_compressed(f, x=x)), DATA),
        Seed("x.pt", _bytes(lambda f: torch.save({"x": torch.ones(8, 4), "y": torch.ones(8)}, f)), DATA),
        Seed("batches.pt", _bytes(lambda f: torch.save([torch.ones(2, 4), torch.ones(3, 4)], f)), DATA),
        Seed("x.safetensors", safetensors.torch.save({"x": torch.ones(8, 4)}), DATA),
        Seed("config.json", json.dumps({"model_type": "x", "architectures": ["X"], "hidden_act": "relu"}).encode(), FOLDER),
        Seed("model.safetensors", safetensors.torch.save(state), FOLDER),
        Seed("model.safetensors.index.json", json.dumps({"weight_map": {"a": "model.safetensors"}}).encode(), FOLDER),
        Seed(FILE_NAME, (root / "configs" / "default.yaml").read_bytes(), SETTINGS),
        Seed("strict.yaml", (root / "configs" / "ci-strict.yaml").read_bytes(), SETTINGS),
        Seed("pyproject.toml", b"[tool.deadcheck.scan]\nseed = 5\n[tool.deadcheck.thresholds]\ntau = 0.1\n", SETTINGS),
        Seed("report.json", Path("good.json").read_bytes(), REPORT),
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


def run_input(seed: Seed, data: bytes, folder: Path) -> Run:
    """Write a changed file and run the commands that take it, in a child."""
    (folder / seed.name).write_bytes(data)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (3 * CPU_SECONDS, 3 * CPU_SECONDS))
        answers = []
        for command in seed.commands:
            argv = [word.replace("FILE", seed.name) for word in command]
            began = time.process_time()
            code, out, err = _called(argv)
            answers.append({"argv": argv, "code": code, "out": out[-300:], "err": err[-2000:], "lines": err.count("\n"),
                            "failed": "Traceback" in out + err or "internal error" in err,
                            "seconds": time.process_time() - began})  # fmt: skip
        os.write(1, json.dumps(answers).encode())

    return in_a_child(work, cwd=str(folder), seconds=WALL_SECONDS)


def faults(run: Run, bare: int, marker: Path) -> list[str]:
    """Return what is wrong with how a child ended; nothing where all is well."""
    if run.code != 0:
        return [f"the process died ({run.code}): {run.err[-300:]}"]
    found = [f"took {(run.peak - bare) // 1024} MiB"] if (run.peak - bare) // 1024 > MIB else []
    if marker.exists():
        marker.rmdir()
        found.append("ran code of the file")
    for answer in json.loads(run.out):
        what = " ".join(answer["argv"])
        if answer["code"] not in CODES:
            found.append(f"{what}: exit code {answer['code']}")
        if answer["failed"]:
            found.append(f"{what}: {answer['err'][-400:].strip()}")
        if answer["code"] not in (0, 1) and not answer["err"] and not answer["out"]:
            found.append(f"{what}: exit code {answer['code']} without a word")
        if answer["code"] in (0, 1) and "Error" in answer["err"]:
            found.append(f"{what}: well, but said {answer['err'][-300:]}")
        if answer["lines"] > 40:
            found.append(f"{what}: {answer['lines']} lines of error")
        if answer["seconds"] > CPU_SECONDS:
            found.append(f"{what}: took {answer['seconds']:.0f} s")
    return found


def fuzz(count: int, seed: int, *, keep: Path | None = None, only: str = "") -> tuple[Counter[str], list[str]]:
    """Run that many inputs; return how many ended with which exit codes, and the faults."""
    codes: Counter[str] = Counter()
    told: list[str] = []
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        prepare()
        files = [file for file in seeds() if only in file.name]
        others = [file.data for file in files]
        folder = Path(place)
        good = {file.name: file.data for file in seeds() if file.commands is FOLDER}
        bare = in_a_child(lambda: None, cwd=place, seconds=60).peak
        for number in range(count):
            rng = random.Random(f"{seed}:{number}")
            file = files[number % len(files)]
            for name, content in (good if file.commands is FOLDER else {}).items():
                (folder / name).write_bytes(content)
            data = file.data
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                data = changed(rng, data, others, file.name)[: 4 << 20]
            run = run_input(file, data, folder)
            found = faults(run, bare, folder / "marker")
            if run.code == 0:
                codes.update(f"{answer['argv'][0]} {answer['code']}" for answer in json.loads(run.out))
            for fault in found:
                told.append(f"{seed}:{number} {file.name}: {fault}")
                print(told[-1], flush=True)
            if found and keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{seed}-{number}-{file.name}").write_bytes(data)
            for name in {file.name, *(good if file.commands is FOLDER else ())}:
                (folder / name).unlink(missing_ok=True)
        os.chdir(before)
    return codes, told


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
    codes, told = fuzz(given.count, given.seed, keep=keep, only=given.only)
    print(f"{given.count} inputs in {time.monotonic() - began:.0f} s, {len(told)} faults")
    print(", ".join(f"{what}: {count}" for what, count in sorted(codes.items())))
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main())

"""How long each command lets its user wait, and whether it imports torch.

    python benchmarks/startup.py [--rounds 9] [--json out.json]

Every command runs as a process of its own, all of them in turn in each round, beside Python that does nothing and
Python that imports torch. Whether torch was imported is read from `-X importtime`, in a run that is not timed. Exits
with 1 where a command imports torch that must not, and never for the time that one took.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from timing import ROOT, interleaved, options, seconds, table, write

MODEL = "sample_models/digits_mlp.pt"
REPORT = "REPORT.json"
"""Stands for the report of a scan that is made first."""

PYTHON = {"python -c pass": ["-c", "pass"], "python -c 'import torch'": ["-c", "import torch"]}
COMMANDS = (
    "--help", "--version", "scan --help", "gate --help", "rule", "schema", "config show",
    f"gate --report {REPORT}", f"report {REPORT}", f"diff {REPORT} {REPORT}", f"inspect {MODEL}",
    f"scan {MODEL}", f"gate {MODEL}",
)  # fmt: skip
LIGHT = COMMANDS[: COMMANDS.index(f"scan {MODEL}")]
"""Those that must not import torch."""

TARGETS = {"--help": 0.25, f"gate --report {REPORT}": 0.5}
"""Seconds that were aimed at."""


def deadcheck() -> str:
    """Return the path of the command that is installed beside this Python."""
    path = shutil.which("deadcheck", path=str(Path(sys.executable).parent))
    if path is None:
        sys.exit("deadcheck is not installed beside this Python; run: pip install -e '.[test]'")
    return path


def run(command: list[str]) -> str:
    """Run a command from the root, and return its stderr; 1 is the gate's answer, and all else ends the benchmark."""
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if ended.returncode > 1:
        sys.exit(f"{' '.join(command)} exited with {ended.returncode}: {ended.stderr}")
    return ended.stderr


def imports_torch(arguments: list[str]) -> bool:
    """Tell whether Python imports torch on the way."""
    told = run([sys.executable, "-X", "importtime", *arguments])
    return any(line.rpartition("|")[2].strip() == "torch" for line in told.splitlines())


def main() -> None:
    """Time every command, print the table and write the figures."""
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="times that each command runs [default: 9]")
    args = parser.parse_args()
    own = deadcheck()
    with tempfile.TemporaryDirectory() as folder:
        report = str(Path(folder, "report.json"))
        run([own, "scan", MODEL, "-o", f"json={report}"])
        given = {f"deadcheck {c}": [own, *c.replace(REPORT, report).split()] for c in COMMANDS}
        given = {**PYTHON, **given}
        clocks = {
            name: partial(seconds, partial(run, [sys.executable, *rest] if name in PYTHON else rest))
            for name, rest in given.items()
        }
        torch = {name: imports_torch(rest) for name, rest in given.items()}  # and files are in memory after it
        taken = interleaved(clocks, args.rounds, warm=0)
    rows = [["command", "median s", "min s", "max s", "imports torch", "target"]]
    for name, spent in taken.items():
        target = TARGETS.get(name.removeprefix("deadcheck "))
        median = statistics.median(spent)
        met = "" if target is None else f"{target} s, {'met' if median < target else 'missed'}"
        figures = [f"{value:.2f}" for value in (median, min(spent), max(spent))]
        rows.append([name, *figures, "yes" if torch[name] else "no", met])
    print(f"Seconds by the clock, {args.rounds} rounds\n\n{table(rows)}")
    write(args.json, seconds=taken, imports_torch=torch, targets=TARGETS)
    if heavy := [name for name in LIGHT if torch[f"deadcheck {name}"]]:
        sys.exit(f"these commands must not import torch: {', '.join(heavy)}")


if __name__ == "__main__":
    main()

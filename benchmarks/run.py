"""Runs every benchmark and writes one file of figures.

    python benchmarks/run.py [--short] [--only growth] [--json out.json]

The whole takes hours. ``--short`` is for CI: tiny sizes, in less than a minute. Its times say nothing, and it
exits with 1 only where a result is wrong: a count, a planted death, torch or its compiler imported where they must not
be, or a benchmark that does not run at all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from timing import options, write

HERE = Path(__file__).parent

SHORT: dict[str, list[str]] = {
    "counts": [],
    "startup": ["--rounds", "1"],
    "overhead": ["--only", "Convnet", "--batches", "2", "--rounds", "1", "--threads", "1", "--batch-sizes", "64"],
    "steady": ["--only", "Convnet 64x32", "--batches", "2", "--threads", "1"],
    "growth": ["--only", "width", "--sizes", "64", "128", "--rounds", "1"],
    "memory": ["--only", "MLP", "--samples", "64"],
    "large_weights": ["--width", "256", "--layers", "2"],
    "coverage": ["--only", "F.relu", "--tools", "deadcheck", "zero-mean hooks", "storing hooks"],
    "others": ["--only", "MLP", "--samples", "64", "--rounds", "1", "--tools", "deadcheck"],
}
"""Benchmark -> what makes it short; in the order in which they run."""


def passed(name: str, arguments: list[str], path: Path, environment: dict[str, str]) -> bool:
    """Run a benchmark that writes its figures to ``path``, and tell whether its results are right."""
    print(f"\n== {name}\n", flush=True)
    start = time.perf_counter()
    command = [sys.executable, str(HERE / f"{name}.py"), *arguments, "--json", str(path)]
    code = subprocess.run(command, env=environment, check=False).returncode
    print(f"\n{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return code == 0


def main() -> None:
    """Run the benchmarks one after the other, and write what they wrote."""
    parser = options(__doc__)
    parser.add_argument("--short", action="store_true", help="tiny sizes, for CI: checks results, not times")
    parser.add_argument("--only", nargs="+", choices=SHORT, default=list(SHORT), help="these benchmarks alone")
    args = parser.parse_args()
    environment = dict(os.environ)
    if args.short:  # threads that wait for one another in a loop take ten times as long where others run too
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    figures, failed = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            path = Path(folder, f"{name}.json")
            if not passed(name, SHORT[name] if args.short else [], path, environment):
                failed.append(name)
            if path.exists():
                figures[name] = json.loads(path.read_text(encoding="utf-8"))
    write(args.json, short=args.short, benchmarks=figures)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

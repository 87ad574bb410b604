"""Time and peak memory of deadcheck and of other tools, asked about the same model and data in the same run.

    python benchmarks/others.py [--samples 256 1024] [--rounds 3] [--only MLP] [--tools torchlens] [--json out.json]

Every tool is asked as ``adapters.py`` says, in a process of its own that stays for all rounds; the processes are asked
one after the other, round by round, beside one that runs a bare loop, in batches of 64. Seconds are those of the
question alone, and memory is the most that the process ever held, Python and torch (about 250 MiB) included. A tool
that is not installed, raises, takes too long or wants too much memory is listed as that. ``layers`` is of how many
layers it said anything: one that says nothing measured nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial

from adapters import BATCH, TOOLS, Tool, ask_deadcheck, run
from networks import Network, encoder, mlp, resnet18
from timing import options, peak, ratios, spread, table, write
from torch import Tensor, nn

BARE = "bare loop"
DEFAULT = (
    "deadcheck",
    "deadcheck, all at once",
    "zero-mean hooks",
    "storing hooks",
    "torchlens",
    "torchdiag",
    "dead-relu-viz",
)

NETWORKS: dict[str, tuple[Network, int]] = {
    "ResNet-18, 112 pixels": (Network(resnet18, (3, 112, 112), BATCH), 1),
    "MLP": (Network(mlp, (1024,), BATCH), 1),
    "GELU encoder, 64 tokens": (Network(encoder, (64, 384), BATCH), -1),
}
"""Name -> network, and the axis of its units, for tools that are told it."""


def ask_nothing(model: nn.Module, data: Tensor, axis: int) -> Mapping[str, int]:
    """Run a bare loop."""
    run(model, data)
    return {}


def ask_deadcheck_at_once(model: nn.Module, data: Tensor, axis: int) -> Mapping[str, object]:
    """Scan all samples in one batch, as torchlens and torchdiag take them."""
    return ask_deadcheck(model, data, axis, size=len(data))


EVERY = {
    BARE: Tool(ask_nothing, "forward passes, and nothing else"),
    **TOOLS,
    "deadcheck, all at once": replace(TOOLS["deadcheck"], ask=ask_deadcheck_at_once, how="the same with one batch"),
}


def too_long(*signal_and_frame: object) -> None:
    """End a question that takes too long."""
    raise TimeoutError("took too long")


def serve(tool: Tool, network: Network, axis: int, samples: int, limits: tuple[int, int]) -> None:
    """Answer each line of stdin with a line of JSON: what asking the tool once took, or why it could not be asked."""
    out = sys.stdout
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    most_seconds, most_gib = limits
    model, data = network.program(), network.data(samples)
    resource.setrlimit(resource.RLIMIT_DATA, (most_gib << 30, most_gib << 30))
    signal.signal(signal.SIGALRM, too_long)
    for _ in sys.stdin:
        with redirect_stdout(sys.stderr):
            signal.alarm(most_seconds)
            try:
                start = time.perf_counter()
                found = tool.ask(model, data, axis)
                spent = time.perf_counter() - start
                answer: dict[str, object] = {"seconds": spent, "mib": peak(), "layers": len(found)}
            except Exception as error:  # whatever another's code may raise is its answer
                answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            signal.alarm(0)
        print(json.dumps(answer), file=out, flush=True)


class Asked:
    """A tool in a process of its own."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.answers: list[dict[str, object]] = []
        self.error: str | None = None

    def ask(self, *, counts: bool) -> None:
        """Ask it once more, unless it failed before."""
        if self.error is not None:
            return
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"its process ended with {self.process.wait()}"}
        self.error = answer.get("error")
        if self.error is None and counts:
            self.answers.append(answer)

    def end(self) -> None:
        """Let the process end."""
        self.process.communicate()


def measured(tools: list[str], name: str, samples: int, rounds: int, own: list[str]) -> dict[str, dict[str, object]]:
    """Ask every tool in turn, and return what each took."""
    started = {tool: Asked([*own, "--serve", tool, "--name", name, "--samples", str(samples)]) for tool in tools}
    try:
        for number in range(rounds + 1):  # the first round warms up
            for asked in started.values():
                asked.ask(counts=number > 0)
    finally:
        for asked in started.values():
            asked.end()
    return {tool: {"error": asked.error} if asked.error else joined(asked.answers) for tool, asked in started.items()}


def joined(answers: list[dict[str, object]]) -> dict[str, object]:
    """Join the answers of all rounds."""
    return {
        "seconds": [answer["seconds"] for answer in answers],
        "mib": answers[-1]["mib"],
        "layers": answers[-1]["layers"],
    }


def cells(found: dict[str, object], bare: list[float]) -> list[str]:
    """Write what a tool took."""
    if "error" in found:
        return ["failed", "", "", ""]
    ratio = statistics.median(ratios(found["seconds"], bare))
    return [spread(found["seconds"], 2), f"{ratio:.2f}", f"{found['mib']:,.0f}", str(found["layers"])]


def main() -> None:
    """Ask every tool, print the table and write the figures."""
    parser = options(__doc__)
    parser.add_argument("--samples", type=int, nargs="+", default=[256, 1024], help="numbers of samples")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that are measured [default: 3]")
    parser.add_argument("--only", default="", help="part of a network's name")
    parser.add_argument("--tools", nargs="*", choices=list(EVERY)[1:], default=list(DEFAULT), help="tools to ask")
    parser.add_argument("--most-seconds", type=int, default=120, help="ends one question [default: 120]")
    parser.add_argument("--most-gib", type=int, default=10, help="memory that a process may take [default: 10]")
    parser.add_argument("--serve", choices=EVERY, help=argparse.SUPPRESS)
    parser.add_argument("--name", choices=NETWORKS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    limits = (args.most_seconds, args.most_gib)
    if args.serve:
        serve(EVERY[args.serve], *NETWORKS[args.name], args.samples[0], limits)
        return
    missing = {name: reason for name in args.tools if (reason := EVERY[name].missing())}
    tools = [BARE, *(name for name in args.tools if name not in missing)]
    own = [sys.executable, __file__, "--most-seconds", str(limits[0]), "--most-gib", str(limits[1])]
    ask = partial(measured, tools, rounds=args.rounds, own=own)
    found = []
    rows = [["network", "samples", "tool", "seconds", "to bare", "peak MiB", "layers"]]
    for name in NETWORKS:
        if args.only not in name:
            continue
        for samples in args.samples:
            by_tool = ask(name=name, samples=samples)
            found.append({"network": name, "samples": samples, "tools": by_tool})
            bare = by_tool[BARE].get("seconds", [])
            rows += [[name, f"{samples:,}", tool, *cells(one, bare)] for tool, one in by_tool.items()]
            print(f"{name}, {samples} samples: done", file=sys.stderr)
    print(f"{table(rows)}\n")
    versions = {tool: EVERY[tool].versions() for tool in tools}
    for tool in tools:
        named = ", ".join(f"{distribution} {version}" for distribution, version in versions.get(tool, {}).items())
        print(f"- {tool} ({named}): {EVERY[tool].how}" if named else f"- {tool}: {EVERY[tool].how}")
    for one in found:
        for tool, took in one["tools"].items():
            if "error" in took:
                print(f"- {tool}, {one['network']}, {one['samples']:,} samples: failed ({took['error']})")
    for tool, reason in missing.items():
        print(f"- {tool}: missing, its import failed ({reason})")
    write(args.json, rows=found, versions=versions, missing=missing)


if __name__ == "__main__":
    main()

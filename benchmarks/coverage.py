"""Which planted deaths each tool finds.

    python benchmarks/coverage.py [--only ReLU] [--tools deadcheck torchlens] [--json out.json]

What a cell says is in ``SCORES``. Tools that cannot be imported are listed with the reason.
"""

from __future__ import annotations

import logging
import platform
import warnings
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import torch
from adapters import TOOLS, Tool
from planted import CASES, SCORES, Case, built, data, judged
from timing import options, table, write


def answer(tool: Tool, case: Case) -> dict[str, object]:
    """Ask a tool about a case, in silence."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = tool.ask(built(case), data(case.shape), case.axis)
        except Exception as error:  # whatever another's code may raise is its answer
            return {"score": "raised", "error": f"{type(error).__name__}: {error}"[:300]}
    listed = {name: units if isinstance(units, int) else sorted(units) for name, units in found.items() if units}
    return {"score": judged(found, case.dead), "found": listed}


def print_table(answers: dict[str, dict[str, dict[str, object]]], tools: dict[str, Tool]) -> None:
    """Print cases by tools, as Markdown."""
    rows = [["case", *tools]]
    rows += [[case, *(str(by_tool[tool]["score"]) for tool in tools)] for case, by_tool in answers.items()]
    for score in SCORES:
        totals = [sum(by_tool[tool]["score"] == score for by_tool in answers.values()) for tool in tools]
        rows.append([f"**{score}**", *map(str, totals)])
    print(table(rows))


def main() -> None:
    """Ask every tool that is installed, print the table and write the answers."""
    parser = options(__doc__)
    parser.add_argument("--only", help="part of a case's name")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS), help="tools to ask")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    missing = {name: reason for name in args.tools if (reason := TOOLS[name].missing())}
    tools = {name: TOOLS[name] for name in args.tools if name not in missing}
    cases = {name: case for name, case in CASES.items() if not args.only or args.only in name}
    if not cases:
        parser.error(f"no case has {args.only!r} in its name; there are: {', '.join(CASES)}")
    answers = {name: {tool: answer(TOOLS[tool], case) for tool in tools} for name, case in cases.items()}
    print_table(answers, tools)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    print(f"\nPython {versions['python']}, torch {versions['torch']}\n")
    for name, tool in tools.items():
        versions |= tool.versions()
        named = ", ".join(f"{distribution} {version}" for distribution, version in tool.versions().items())
        print(f"- {name} ({named}): {tool.how}" if named else f"- {name}: {tool.how}")
    for name, reason in missing.items():
        print(f"- {name}: not asked, its import failed ({reason})")
    write(args.json, versions=versions, missing=missing, cases=answers)


if __name__ == "__main__":
    main()

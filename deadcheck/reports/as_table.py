"""The report for a person at a terminal: the worst layer first, then what it means."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable

import numpy as np
from rich.box import ASCII2, SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from deadcheck.diagnosis import VERDICTS, Diagnosis, Finding, SiteDiagnosis, Verdict
from deadcheck.reports.base import RenderOptions, percent, shown
from deadcheck.reports.strip import legend, strip

_OTHERS = (
    Verdict.INVALID, Verdict.NEGATIVE_ONLY, Verdict.SATURATED, Verdict.RARE, Verdict.FAINT, Verdict.ALWAYS_ON,
)  # fmt: skip
_OFF = tuple(VERDICTS.index(verdict) for verdict in (Verdict.DEAD, Verdict.SILENT))
_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}
_LABELS = {"error": "ERROR", "warning": "warning", "note": "note"}


def render(diagnosis: Diagnosis, options: RenderOptions) -> str:
    """Render a diagnosis as text of the given width, in colour where wanted, in plain ASCII where needed."""
    out = io.StringIO()
    console = Console(
        file=out, width=options.width, force_terminal=options.color, no_color=not options.color, highlight=False,
        color_system="standard" if options.color else None, legacy_windows=False, emoji=False, markup=False,
    )  # fmt: skip
    _print_head(console, diagnosis)
    sites = diagnosis.worst()
    chosen = sites[: options.limit] if options.limit else sites
    console.print(_table(chosen, options))
    if len(chosen) < len(sites):
        console.print(Text(f"  {len(sites) - len(chosen)} more layers are not shown (--limit)", "dim"))
    if any(np.isin(site.codes, _OFF).any() for site in chosen):
        console.print(Text(f"  {legend(unicode=options.unicode)}", "dim"))
    _print_totals(console, diagnosis)
    _print_findings(console, diagnosis.findings)
    _print_skipped(console, diagnosis)
    _print_foot(console, diagnosis)
    text = "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
    return text if options.unicode else _plain_ascii(text)


def _plain_ascii(text: str) -> str:
    return text.replace("…", "...").encode("ascii", "backslashreplace").decode("ascii")


def _print_head(console: Console, diagnosis: Diagnosis) -> None:
    seen = diagnosis.measurement
    model, data, env = seen.model, seen.data, seen.env
    title = Text("deadcheck  ", "bold") + Text(shown(model.path or "live module"), "bold cyan")
    console.print(title, overflow="fold")
    how = {"rebuilt": "read safely", "arch": f"built by {model.arch}", "allowed-class": "with the classes you allowed"}
    parts = [model.format, how.get(model.read, model.read)]
    console.print(Text(f"  model  {shown(', '.join(dict.fromkeys(parts)))}", "dim"))
    made = ", synthetic" if data.synthetic else ""
    console.print(
        Text(f"  data   {shown(data.source)}: {data.samples:,} samples{made}, {env.device}, {env.dtype}", "dim")
    )


def _table(sites: Iterable[SiteDiagnosis], options: RenderOptions) -> Table:
    table = Table(box=SIMPLE_HEAD if options.unicode else ASCII2, pad_edge=False, expand=False)
    wide = options.width >= 100
    name_width = max(14, options.width - (82 if wide else 62))
    cells = 24 if wide else 16
    table.add_column("layer", no_wrap=True, max_width=name_width)
    if wide:
        table.add_column("activation", no_wrap=True)
    table.add_column("units", justify="right", no_wrap=True)
    table.add_column("dead", justify="right", no_wrap=True)
    table.add_column("silent", justify="right", no_wrap=True)
    table.add_column("zeros", justify="right", no_wrap=True)
    table.add_column("where", no_wrap=True)
    table.add_column("others", overflow="fold")
    for site in sites:
        row = [Text(_middle(shown(site.key), name_width, options))]
        if wide:
            row.append(Text(site.stats.site.activation))
        row += _numbers(site)
        off = np.isin(site.codes, _OFF)
        row.append(Text(strip(off, cells, unicode=options.unicode), "red"))
        row.append(Text(_others(site, wide=wide), "yellow" if site.counts[Verdict.INVALID] else ""))
        table.add_row(*row)
    return table


def _numbers(site: SiteDiagnosis) -> list[Text]:
    dead, silent, units = site.counts[Verdict.DEAD], site.counts[Verdict.SILENT], site.units
    zeros, total = int(site.stats.zeros.sum()), site.stats.observations * units
    return [
        Text(f"{units:,}"),
        Text(f"{dead:,} {percent(dead, units):>6}" if dead else "-", "bold red" if dead else "dim"),
        Text(f"{silent:,}" if silent else "-", "yellow" if silent else "dim"),
        Text(percent(zeros, total)),
    ]


def _others(site: SiteDiagnosis, *, wide: bool) -> str:
    short = {Verdict.NEGATIVE_ONLY: "negative", Verdict.ALWAYS_ON: "always on"}
    named = [f"{site.counts[v]:,} {short.get(v, v.value)}" for v in _OTHERS if site.counts[v]]
    return ", ".join(named)


def _middle(text: str, width: int, options: RenderOptions) -> str:
    """Shorten a name in its middle: layers differ at both ends."""
    gap = "…" if options.unicode else "..."
    if len(text) <= width:
        return text
    keep = width - len(gap)
    return text[: keep // 2] + gap + text[len(text) - (keep - keep // 2) :]


def _print_totals(console: Console, diagnosis: Diagnosis) -> None:
    dead, units = diagnosis.dead, diagnosis.units
    line = Text("\n")
    line.append(f"{dead:,} of {units:,} units are dead ({percent(dead, units)})", "bold red" if dead else "bold green")
    if diagnosis.silent:
        line.append(f", {diagnosis.silent:,} more never fired")
    bound = max((site.upper_bound for site in diagnosis.sites), default=1.0)
    if dead:
        line.append(
            f"; each fires in fewer than {bound:.2g} of such samples ({1 - diagnosis.thresholds.delta:.0%} sure)"
        )
    console.print(line)
    depths = Counter[str]()
    for site in diagnosis.sites:
        depths.update(site.depths)
    if dead or diagnosis.silent:
        spread = ", ".join(f"{depths[name]:,} {name}" for name in ("deep", "mid", "shallow"))
        console.print(Text(f"how far below 0 their inputs stay: {spread} (shallow ones may fire on other data)", "dim"))


def _print_findings(console: Console, findings: Iterable[Finding]) -> None:
    order = {"error": 0, "warning": 1, "note": 2}
    for finding in sorted(findings, key=lambda item: order[item.level]):
        label = Text(f"{_LABELS[finding.level]}: ", _STYLES[finding.level])
        console.print(Padding(label + Text(shown(finding.message)), (0, 0, 0, 0)))


def _print_skipped(console: Console, diagnosis: Diagnosis) -> None:
    seen = diagnosis.measurement
    if seen.skipped:
        console.print(Text("not measured:", "bold"))
    reasons: dict[tuple[str, str], list[str]] = {}
    for item in seen.skipped:
        reasons.setdefault((item.what, item.reason), []).append(item.where or "the model")
    for (what, reason), places in reasons.items():
        more = f" and {len(places) - 4} more" if len(places) > 4 else ""
        console.print(Text(shown(f"  {what} in {', '.join(places[:4])}{more}: {reason}")))
    for warning in seen.warnings:
        console.print(Text("said: ", "yellow") + Text(shown(warning)))


def _print_foot(console: Console, diagnosis: Diagnosis) -> None:
    for item in diagnosis.measurement.inputs:
        shape = "x".join(map(str, item.shape)) or "scalar"
        console.print(
            Text(
                shown(f"{item.name}: {shape} {item.dtype}, {item.min:.4g} to {item.max:.4g}, ")
                + f"mean {item.mean:.4g}, sd {item.sd:.4g}",
                "dim",
            )
        )
    console.print(Text("every unit's numbers: deadcheck scan … --per-unit -o json=report.json", "dim"))

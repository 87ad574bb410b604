"""The report for a person at a terminal: the worst layer first, then what it means."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from rich.box import ASCII2, SIMPLE_HEAD
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deadcheck.breach import Breach
from deadcheck.diagnosis import Verdict
from deadcheck.ranges import mask_of
from deadcheck.record import Record, SiteRecord
from deadcheck.reports.base import Outcome, RenderOptions
from deadcheck.reports.strip import legend, strip
from deadcheck.reports.terminal import drawn
from deadcheck.safe_text import shown
from deadcheck.shares import number_of, percent

_OTHERS = (
    Verdict.INVALID, Verdict.NEGATIVE_ONLY, Verdict.SATURATED, Verdict.RARE, Verdict.FAINT, Verdict.ALWAYS_ON,
)  # fmt: skip
_OFF = (Verdict.DEAD, Verdict.SILENT)
_STYLES = {"error": "bold red", "inconclusive": "bold magenta", "warning": "yellow", "note": "dim"}
_LABELS = {"error": "ERROR", "inconclusive": "NOT JUDGED", "warning": "warning", "note": "note"}
_ALIKE = 4
"""Findings, places or warnings of one kind that are spelled out; the others are counted."""


def render(outcomes: Sequence[Outcome], options: RenderOptions) -> str:
    """Render scans as text of the given width, in colour where wanted, in plain ASCII where needed."""

    def draw(console: Console) -> None:
        for i, outcome in enumerate(outcomes):
            if i:
                console.print()
            if outcome.record is None:
                message = "" if outcome.failure is None else outcome.failure.message
                console.print(Text(shown(f"{outcome.name}: {message}", unicode=options.unicode), "bold red"))
                continue
            _Report(console, outcome.record, outcome, options).print_all()

    return drawn(draw, options)


class _Report:
    """Prints the parts of one report; everything that a file could have named goes through ``_shown``."""

    def __init__(self, console: Console, record: Record, outcome: Outcome, options: RenderOptions) -> None:
        self._console = console
        self._record = record
        self._outcome = outcome
        self._options = options
        self._gap = "…" if options.unicode else "..."

    def print_all(self) -> None:
        self.print_head()
        if self._record.sites:
            self.print_sites()
        self.print_totals()
        self.print_findings()
        self.print_skipped()
        self.print_foot()
        if self._outcome.gate is not None:
            answer = {"pass": "PASSED", "fail": "FAILED"}.get(self._outcome.status, "NOT JUDGED")
            self._print(answer, "bold green" if answer == "PASSED" else "bold red")

    def print_head(self) -> None:
        model, data, env = self._record.model, self._record.data, self._record.env
        name = self._shown(model.path or "live module")
        self._console.print(Text("deadcheck  ", "bold") + Text(name, "bold cyan"), overflow="fold")
        how = {
            "rebuilt": "read safely",
            "arch": f"built by {model.arch}",
            "allowed-class": "with the classes you allowed",
        }
        parts = dict.fromkeys((model.format, how.get(model.read, model.read)))
        self._print(f"  model  {', '.join(parts)}", "dim")
        made = ", synthetic" if data.synthetic else ""
        samples = number_of(data.samples, "sample")
        self._print(f"  data   {data.source}: {samples}{made}, {env.device}, {env.dtype}", "dim")

    def print_sites(self) -> None:
        sites = self._record.worst()
        chosen = sites[: self._options.limit] if self._options.limit else sites
        self._console.print(self._table(chosen))
        if len(chosen) < len(sites):
            self._print(f"  not shown: {len(sites) - len(chosen):,} more (--limit)", "dim")
        if any(site.off_units for site in chosen):
            self._print(f"  {legend(unicode=self._options.unicode)}", "dim")

    def _table(self, sites: Sequence[SiteRecord]) -> Table:
        options, wide = self._options, self._options.width >= 100
        names = [self._shown(site.key) for site in sites]
        others = [_others(site) for site in sites]
        columns = {"units": [_units(site) for site in sites], "dead": [_dead(site) for site in sites]}
        if wide or any(site.silent_units for site in sites):
            columns["silent"] = [_silent(site) for site in sites]
        columns["zeros"] = [_zeros(site) for site in sites]
        if wide:
            columns = {"activation": [self._activation(site) for site in sites], **columns}
        fixed = sum(_width([head, *(text.plain for text in column)]) + 3 for head, column in columns.items())
        cells, name_width, others_width = _divided(options.width - fixed, names, others, 24 if wide else 16)

        table = Table(box=SIMPLE_HEAD if options.unicode else ASCII2, pad_edge=False, expand=False)
        # Nothing folds at 80 columns; below, a number that is folded is still right, and one that is cut is not.
        for head in ("layer", *columns, "where", "others"):
            number = head in columns and head != "activation"
            table.add_column(head, justify="right" if number else "left", overflow="fold")
        for i, site in enumerate(sites):
            where = strip(mask_of(site.off_units, site.units), cells, unicode=options.unicode)
            table.add_row(
                Text(self._middle(names[i], name_width)),
                *(column[i] for column in columns.values()),
                Text(where, "red"),
                Text(_packed(others[i], others_width), "yellow" if site.count(Verdict.INVALID) else ""),
            )
        return table

    def _activation(self, site: SiteRecord) -> Text:
        return Text(self._middle(self._shown(site.activation), 16))

    def _middle(self, text: str, width: int) -> str:
        """Shorten a name in its middle: layers differ at both ends."""
        if cell_len(text) <= width:
            return text
        keep = width - len(self._gap)
        return set_cell_size(text, keep // 2) + self._gap + set_cell_size(text[::-1], keep - keep // 2)[::-1]

    def print_totals(self) -> None:
        record = self._record
        dead, silent, units = record.count(Verdict.DEAD), record.count(Verdict.SILENT), record.units
        line = Text("\n")
        line.append(
            f"{dead:,} of {units:,} units are dead ({percent(dead, units)})", "bold red" if dead else "bold green"
        )
        if silent:
            line.append(f", {silent:,} more never fired")
        if dead:
            bound = max(site.upper_bound for site in record.sites if site.count(Verdict.DEAD))
            sure = 1 - record.thresholds.delta
            line.append(f"; each fires in fewer than {bound:.2g} of such samples ({sure:.0%} sure)")
        self._console.print(line)
        if not dead and not silent:
            return
        depths = Counter[str]()
        for site in record.sites:
            depths.update(site.depths)
        unknown = dead + silent - sum(depths.values())
        spread = [f"{depths[name]:,} {name}" for name in ("deep", "mid", "shallow")]
        spread += [f"{unknown:,} without spread"] if unknown else []
        self._print(
            f"how far below 0 their inputs stay: {', '.join(spread)} (shallow ones may fire on other data)", "dim"
        )

    def print_findings(self) -> None:
        order = {level: i for i, level in enumerate(_LABELS)}
        kinds: dict[tuple[str, str], list[Breach]] = {}
        for finding in sorted(self._outcome.findings, key=lambda item: (not item.active, order[item.level])):
            level = finding.level if finding.active else "note"
            kinds.setdefault((level, finding.id), []).append(finding)
        for (level, _), findings in kinds.items():
            rule = f" {findings[0].rule}" if self._outcome.gate is not None and findings[0].rule else ""
            label = f"{_LABELS[level]}{rule}: " if findings[0].active else f"ignored{rule}: "
            for finding in findings[:_ALIKE]:
                self._console.print(Text(label, _STYLES[level]) + Text(self._shown(finding.message)))
            more = [finding.where for finding in findings[_ALIKE:]]
            if more:
                places = self._listed(more)
                self._console.print(Text(label, _STYLES[level]) + Text(f"the same in {len(more):,} more: {places}"))

    def print_skipped(self) -> None:
        seen = self._record
        if seen.skipped:
            self._print("not measured:", "bold")
        reasons: dict[tuple[str, str], list[str]] = {}
        for item in seen.skipped:
            reasons.setdefault((item.what, item.reason), []).append(item.where or "the model")
        for (what, reason), places in reasons.items():
            self._print(f"  {what} in {self._listed(places)}: {reason}")
        for warning in seen.warnings[: 2 * _ALIKE]:
            self._console.print(Text("note: ", "yellow") + Text(self._shown(warning)))
        if len(seen.warnings) > 2 * _ALIKE:
            self._print(f"and {len(seen.warnings) - 2 * _ALIKE:,} more notes; the JSON report has them all", "dim")

    def print_foot(self) -> None:
        for item in self._record.inputs:
            shape = "x".join(map(str, item.shape)) or "scalar"
            values = f"{item.min:.4g} to {item.max:.4g}, mean {item.mean:.4g}, sd {item.sd:.4g}"
            self._print(f"{item.name}: {shape} {item.dtype}, {values}", "dim")
        self._print(f"every unit's numbers: deadcheck scan {self._gap} --per-unit -o json=report.json", "dim")

    def _listed(self, places: Sequence[str]) -> str:
        more = f" and {len(places) - _ALIKE:,} more" if len(places) > _ALIKE else ""
        return self._shown(", ".join(places[:_ALIKE])) + more

    def _print(self, text: str, style: str = "") -> None:
        # Already escaped text passes through unchanged: an escape is plain ASCII.
        self._console.print(Text(self._shown(text), style))

    def _shown(self, text: str) -> str:
        return shown(text, unicode=self._options.unicode)


def _divided(room: int, names: Sequence[str], others: Sequence[Sequence[str]], cells: int) -> tuple[int, int, int]:
    """Divide what the numbers leave of a line among the strip, the layers' names and the other verdicts.

    Columns stand three characters apart. Names give way first, down to 16 characters, then the other verdicts down to
    one a line, then the strip.
    """
    name = max(_width(names), len("layer"))
    natural = max(_width(", ".join(items) for items in others), len("others"))
    single = max(_width(item + "," for items in others for item in items), len("others"))
    room -= 3 * 3 - 1  # three columns, of which the last needs no gap behind it
    least = min(name, 16)
    cells = max(8, min(cells, room - least - single))
    listed = max(single, min(natural, room - cells - least))
    return cells, max(8, min(name, room - cells - listed)), listed


def _width(texts: Iterable[str]) -> int:
    return max((cell_len(text) for text in texts), default=0)


def _packed(items: Sequence[str], width: int) -> str:
    """Join items by commas, with a new line where the next would not fit."""
    lines = [""]
    for i, item in enumerate(items):
        item += "," if i < len(items) - 1 else ""
        if lines[-1] and len(lines[-1]) + 1 + len(item) > width:
            lines.append(item)
        else:
            lines[-1] += f" {item}" if lines[-1] else item
    return "\n".join(lines)


def _units(site: SiteRecord) -> Text:
    return Text(f"{site.units:,}")


def _dead(site: SiteRecord) -> Text:
    dead = site.count(Verdict.DEAD)
    return Text(f"{dead:,} {percent(dead, site.units):>6}" if dead else "-", "bold red" if dead else "dim")


def _silent(site: SiteRecord) -> Text:
    silent = site.count(Verdict.SILENT)
    return Text(f"{silent:,}" if silent else "-", "yellow" if silent else "dim")


def _zeros(site: SiteRecord) -> Text:
    if site.zero_rate is None:
        return Text("-", "dim")
    seen = site.observations * site.units
    return Text(percent(round(site.zero_rate * seen) if site.zeros is None else site.zeros, seen))


def _others(site: SiteRecord) -> list[str]:
    short = {Verdict.NEGATIVE_ONLY: "negative", Verdict.ALWAYS_ON: "always on"}
    return [f"{site.count(v):,} {short.get(v, v.value)}" for v in _OTHERS if site.count(v)]

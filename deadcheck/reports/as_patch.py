"""The report of a patch for a person at a terminal: what was changed, what that did, and what would serve better."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.box import ASCII2, SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from deadcheck.diagnosis import SiteDiagnosis, Verdict
from deadcheck.patch_plan import Kind
from deadcheck.patch_result import Drift, PatchResult, SiteEffect
from deadcheck.reports.base import RenderOptions
from deadcheck.reports.terminal import drawn
from deadcheck.safe_text import shown
from deadcheck.shares import number_of, percent

_ALIKE = 6
"""Skipped sites that are spelled out for each reason; the others are counted."""


def render(result: PatchResult, options: RenderOptions) -> str:
    """Render what a patch did as text of the given width."""
    return drawn(lambda console: _Report(console, result, options).print_all(), options)


class _Report:
    """Prints the parts of one report; whatever a file could have named goes through ``_print``."""

    def __init__(self, console: Console, result: PatchResult, options: RenderOptions) -> None:
        self._console = console
        self._result = result
        self._options = options
        self._to = "→" if options.unicode else "->"

    def print_all(self) -> None:
        self.print_head()
        self.print_sites()
        self.print_search()
        self.print_revived()
        self.print_drift()
        self.print_skipped()
        self.print_advice()
        self.print_written()

    def print_head(self) -> None:
        result = self._result
        name = result.model.path or "live module"
        self._console.print(Text("deadcheck patch  ", "bold") + Text(self._shown(name), "bold cyan"), overflow="fold")
        seen = result.before.measurement if result.before is not None else None
        if seen is not None:
            made = ", synthetic" if seen.data.synthetic else ""
            samples = number_of(seen.data.samples, "sample")
            self._print(f"  data    {seen.data.source}: {samples}{made}, {seen.env.device}", "dim")
        which = "dead units alone" if any(site.change.units for site in result.sites) else "every unit"
        sites = number_of(len(result.sites), "site")
        self._print(f"  change  ReLU {self._to} {result.plan.replacement} at {sites}, {which}", "dim")

    def print_sites(self) -> None:
        result, wide = self._result, self._options.width >= 100
        table = Table(box=SIMPLE_HEAD if self._options.unicode else ASCII2, pad_edge=False, expand=False)
        measured = result.before is not None
        heads = ["layer", "was", "is"] if wide else ["layer", "is"]
        heads += ["units", "dead", "no gradient"] if measured else []
        for head in heads:
            number = head in ("units", "dead", "no gradient")
            table.add_column(head, justify="right" if number else "left", overflow="fold")
        sites = result.sites[: self._options.limit] if self._options.limit else result.sites
        for site in sites:
            name = Text(self._shown(site.change.site), "red" if site.fault else "")
            cells = [name, *([Text(self._shown(site.change.activation))] if wide else []), Text(site.stand_in)]
            table.add_row(*cells, *(self._numbers(site) if measured else ()))
        self._console.print(table)
        if len(sites) < len(result.sites):
            self._print(f"  not shown: {len(result.sites) - len(sites):,} more (--limit)", "dim")
        self._print_checks()

    def _numbers(self, site: SiteEffect) -> Sequence[Text]:
        if site.before is None:
            return Text("did not run", "dim"), Text(""), Text("")
        dead = site.before.counts[Verdict.DEAD]
        now = "?" if site.after is None else f"{site.after.counts[Verdict.DEAD]:,}"
        changed = site.units_changed
        units = f"{changed:,} of {site.before.units:,}" if changed != site.before.units else f"{changed:,}"
        reach = site.gradient
        gradient = "?" if reach is None else f"{reach.without_before:,} {self._to} {reach.without_after:,}"
        return Text(units), Text(f"{dead:,} {self._to} {now}", "bold" if dead else "dim"), Text(gradient)

    def _print_checks(self) -> None:
        result = self._result
        wrong = [site for site in result.sites if site.fault]
        for site in wrong:
            self._print(f"wrong at {site.change.site}: {site.fault}", "bold red")
        if not wrong:
            rest = " (the other units: 0, slope 0)" if any(site.change.units for site in result.sites) else ""
            self._print(f"checked at and around 0, at each site: {_function(result)}{rest}")

    def print_search(self) -> None:
        search = self._result.search
        if search is None:
            return
        samples = number_of(search.samples, "sample")
        self._print(f"\nslope chosen on {samples} so that outputs move by {search.tolerance:.2%} at most:")
        for alpha, drift in search.steps:
            chosen = "  chosen" if alpha == search.alpha else ""
            self._part(f"{alpha:<10.3g} {drift:>8.2%}{chosen}", "" if chosen else "dim")
        if search.verified_drift is not None:
            self._print(
                f"on {number_of(search.verified_samples, 'sample')} that a search did not see, its slope moved them by "
                f"{search.verified_drift:.2%}"
            )
        else:
            self._print("there were no other samples to try it on", "yellow")

    def print_revived(self) -> None:
        result = self._result
        if result.before is None:
            self._print(
                "\nwithout data nothing was measured: neither which units are dead, nor how far the outputs move; "
                "add --data", "yellow",
            )  # fmt: skip
            return
        pairs = [(site.before, site.after) for site in result.sites if site.before and site.after]
        dead = sum(old.counts[Verdict.DEAD] for old, _ in pairs)
        if dead:
            self._print_dead(dead, pairs)
        reasons = sorted({site.gradient_reason for site in result.sites if site.gradient_reason})
        for number, reason in enumerate(reasons[:3]):
            gap = "" if dead or number else "\n"
            self._print(f"{gap}gradient not told at some sites: {reason}", "dim")

    def _print_dead(self, dead: int, pairs: Sequence[tuple[SiteDiagnosis, SiteDiagnosis]]) -> None:
        now = sum(new.counts[Verdict.DEAD] for _, new in pairs)
        below = sum(new.counts[Verdict.NEGATIVE_ONLY] for _, new in pairs)
        line = f"\n{number_of(dead, 'dead unit')} {self._to} {now:,}"
        more = f"; {below:,} units still never rise above 0, and pass on what is below" if below else ""
        self._print(line + more, "bold")
        reach = [site.gradient for site in self._result.sites if site.gradient is not None]
        told = [item for item in reach if item.dead_mean_after is not None]
        if told:
            before, after = (
                sum(getattr(item, name) or 0.0 for item in told) / len(told)
                for name in ("dead_mean_before", "dead_mean_after")
            )
            self._print(f"mean |gradient| at the incoming weights of dead units: {before:.2g} {self._to} {after:.2g}")

    def print_drift(self) -> None:
        drift = self._result.drift
        if drift is None:
            return
        self._print("\nThis changes what the model computes:", "bold yellow")
        for line in drift_lines(drift, self._to):
            self._part(line)

    def print_skipped(self) -> None:
        reasons: dict[str, list[str]] = {}
        for item in self._result.skipped:
            reasons.setdefault(f"{item.what}: {item.reason}", []).append(item.where or "the model")
        if reasons:
            self._print("\nnot changed, though it was meant to be:", "bold red")
        for reason, places in reasons.items():
            more = f" and {len(places) - _ALIKE:,} more" if len(places) > _ALIKE else ""
            self._part(f"{', '.join(places[:_ALIKE])}{more} ({reason})")
        if self._result.left:
            kinds = Counter(item.reason for item in self._result.left)
            told = "; ".join(f"{count:,} {reason}" for reason, count in kinds.items())
            self._print(f"\nReLUs left as they are: {told}", "dim")

    def print_advice(self) -> None:
        if self._result.advice:
            self._print("\nBefore you use it:", "cyan")
        for item in self._result.advice:
            self._part(item.message)
        if self._result.warnings:
            self._print("")
        for warning in self._result.warnings[:4]:
            self._print(f"note: {warning}", "dim")

    def print_written(self) -> None:
        result = self._result
        if not result.written:
            self._print("\nnothing was written" + (" (--dry-run)" if result.is_dry else ""), "dim")
            return
        self._print("")
        for item in result.written:
            needs = f"; loading it takes {item.needs}" if item.needs else ""
            self._print(f"wrote {item.path} ({item.what}{needs})", "green")

    def _part(self, text: str, style: str = "") -> None:
        self._console.print(Padding(Text(self._shown(text), style), (0, 0, 0, 2)))

    def _print(self, text: str, style: str = "") -> None:
        lines = text.split("\n")  # our own line ends; those in names are spelled out by the caller's ``_shown``
        self._console.print(Text("\n".join(self._shown(line) for line in lines), style))

    def _shown(self, text: str) -> str:
        return shown(text, unicode=self._options.unicode)


def _function(result: PatchResult) -> str:
    replacement = result.plan.replacement
    if replacement.kind in (Kind.LEAKY, Kind.PRELU):
        alphas = sorted({result.plan.for_site(site.change).alpha for site in result.sites}, key=lambda a: a or 0.0)
        alpha = f"{alphas[0]:g}" if len(alphas) == 1 else "alpha"
        return f"x above 0 with slope 1, {alpha} x below with slope {alpha}"
    return f"{replacement}, value and slope by its formula"


def drift_lines(drift: Drift, to: str) -> list[str]:
    """Spell how far the outputs moved."""
    moved = f"outputs moved by {share(drift.relative)} (mean over {number_of(drift.samples, 'sample')})"
    lines = [f"{moved}, one number by {drift.largest:.3g} at most"]
    if drift.nonfinite:
        lines.append(f"{drift.nonfinite:,} numbers of the output became NaN or infinite")
    if drift.decisions:
        changed = percent(drift.decisions_changed, drift.decisions)
        line = f"{drift.decisions_changed:,} of {drift.decisions:,} decisions changed ({changed})"
        if drift.right_before is not None and drift.right_after is not None:
            rates = [f"{right / drift.decisions:.1%}" for right in (drift.right_before, drift.right_after)]
            line += f"; right: {drift.right_before:,} {to} {drift.right_after:,} ({rates[0]} {to} {rates[1]})"
        lines.append(line)
    return lines


def share(value: float) -> str:
    """Spell a drift as a percentage; rounding never shows 0 for something."""
    if value != value:
        return "an unknown share"
    if 0 < value < 1e-4:
        return "less than 0.01%"
    return f"{value:.2%}" if value < 0.1 else f"{value:.1%}"

"""``--stats counts`` and ``verdict`` measure less, say so, and are right in all that they say."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import deadcheck
from deadcheck import kernel, pipeline
from deadcheck.config import Config, ScanSettings
from deadcheck.diagnosis import VERDICTS, Diagnosis, Verdict
from deadcheck.errors import UsageError
from deadcheck.formats import LoadOptions
from deadcheck.shard import Shard
from deadcheck.sites import SUMS, Family, Site, SiteStats
from tests.test_cli import deadcheck as run
from tests.zoo import ZOO, build, inputs

N = 1500


@pytest.fixture(params=["kernel", "torch alone"])
def counted_by(request: pytest.FixtureRequest) -> Iterator[str]:
    """Count with the compiled kernel, and without."""
    if request.param == "kernel":
        assert kernel.is_built()
        yield request.param
        return
    with mock.patch.object(kernel, "is_built", return_value=False):
        yield request.param


def codes(diagnosis: Diagnosis, *, live: tuple[Verdict, ...] = ()) -> dict[str, list[str]]:
    """Return every unit's verdict, some of them taken for live."""
    told = {
        site.key: [Verdict.LIVE if VERDICTS[c] in live else VERDICTS[c] for c in site.codes.tolist()]
        for site in diagnosis
    }
    return {key: [verdict.value for verdict in verdicts] for key, verdicts in told.items()}


class Kinds(nn.Module):
    """One activation of each family over units whose verdicts are known by construction, by scale and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.acts = nn.ModuleDict(
            {
                "relu": nn.ReLU(),
                "relu6": nn.ReLU6(),
                "leaky": nn.LeakyReLU(0.01),
                "elu": nn.ELU(),
                "gelu": nn.GELU(),
                "silu": nn.SiLU(),
                "softplus": nn.Softplus(),
                "sigmoid": nn.Sigmoid(),
                "tanh": nn.Tanh(),
                "hardtanh": nn.Hardtanh(),
                "glu": nn.GLU(),
                "shrink": nn.Hardshrink(),
                "threshold": nn.Threshold(-2.0, -3.0),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        outputs = [act(x) for act in self.acts.values()]
        return torch.cat(outputs, 1)


def planted() -> Tensor:
    """Inputs in (-1, 1) per unit: dead, always on, at the ceiling, shallow negative, live, and late to fire."""
    torch.manual_seed(0)
    x = torch.rand(N, 16) * 2 - 1
    x[:, 0] -= 50  # dead; for a leak negative only
    x[:, 1] += 5  # always on
    x[:, 2] += 50  # on a rail for all that have one
    x[:, 3] -= 2  # never above 0, on for GELU
    x[:, 5] = -20
    x[N - 3, 5] = 1  # fires once, near the end: rare
    x[:, 6] = 7
    x[N - 3, 6] = 1  # leaves the rail once
    x[:, 7] = 3
    x[N - 2, 7] = -1  # is off once
    x[:, 8] *= 1e-4  # faint
    x[0, 9], x[1:, 9] = 1, -1  # fires first of all, then never
    x[:, 10], x[5, 10] = 0, 1
    return x


@pytest.mark.parametrize("batch_size", [1, 7, 64, N])
def test_a_verdict_is_the_same_whatever_is_measured(counted_by: str, batch_size: int) -> None:
    full = deadcheck.scan(Kinds(), planted(), batch_size=batch_size)
    told = {verdict for site in full for verdict, count in site.counts.items() if count}
    assert told >= {*VERDICTS} - {Verdict.SILENT, Verdict.INVALID}

    less = deadcheck.scan(Kinds(), planted(), batch_size=batch_size, stats="verdict")
    assert codes(less) == codes(full, live=(Verdict.RARE, Verdict.FAINT))
    counts = deadcheck.scan(Kinds(), planted(), batch_size=batch_size, stats="counts")
    assert codes(counts) == codes(full, live=(Verdict.FAINT,))


@pytest.mark.parametrize("kind", ZOO, ids=lambda kind: kind.__name__)
def test_what_is_said_of_a_unit_is_what_a_full_scan_says(kind, counted_by: str) -> None:
    model, data = build(kind), inputs(kind, 23)
    full, counts, verdict = (deadcheck.scan(model, data, batch_size=7, stats=s) for s in ("full", "counts", "verdict"))

    assert [site.key for site in full] == [site.key for site in counts] == [site.key for site in verdict]
    for one, two, three in zip(full, counts, verdict, strict=True):
        all_, some, few = one.stats, two.stats, three.stats
        for name in ("zeros", "positive", "flat", "fired", "first_fired", "nonfinite", "input_min", "input_max",
                     "output_min", "output_max", "silent_input_sum", "silent_input_square_sum"):  # fmt: skip
            assert np.array_equal(getattr(some, name), getattr(all_, name), equal_nan=True), name
            known = few.fired != -1
            assert np.array_equal(getattr(few, name)[known], getattr(all_, name)[known], equal_nan=True), name
        assert np.isnan(some.output_sum).all()
        assert (few.samples, few.observations) == (all_.samples, all_.observations)
        assert few.first_fired.tolist() == all_.first_fired.tolist()
        assert (all_.fired[few.fired == -1] > 0).all()  # nobody is forgotten who never fired
        assert np.isnan(few.input_max[few.fired == -1]).all()


def test_what_was_not_measured_is_null_and_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        net[0].bias[0] = -100.0
    torch.save(net, tmp_path / "net.pt")
    np.savez(tmp_path / "net.sample.npz", x=np.random.default_rng(0).normal(size=(400, 4)).astype(np.float32))

    found = run("scan", tmp_path / "net.pt", "--stats", "verdict", "-f", "json", "--per-unit")
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout)
    (site,) = report["sites"]
    assert report["env"]["stats"] == "verdict"
    assert {name: site[name] for name in ("zero_rate", "zeros", "mean_output", "max_abs_output", "positive_share",
                                          "nonfinite")} == dict.fromkeys(
        ("zero_rate", "zeros", "mean_output", "max_abs_output", "positive_share", "nonfinite"))  # fmt: skip
    assert site["dormant_shares"] == {}
    assert (site["counts"]["dead"], site["counts"]["rare"], site["counts"]["faint"]) == (1, None, None)
    assert (report["totals"]["dead"], report["totals"]["counts"]["rare"]) == (1, None)
    assert site["dead_units"] == [[0, 0]]
    assert sum(site["depths"].values()) == 1
    assert site["per_unit"]["zeros"] == [400, *[None] * 5]
    assert site["per_unit"]["first_fired"][0] is None
    assert all(index is not None for index in site["per_unit"]["first_fired"][1:])
    assert [item["level"] for item in report["findings"] if "--stats verdict" in item["message"]] == ["warning"]

    table = run("scan", tmp_path / "net.pt", "--stats", "verdict", "--color", "never")
    assert "not asked again (--stats verdict)" in " ".join(table.stdout.split())
    counts = json.loads(run("scan", tmp_path / "net.pt", "--stats", "counts", "-f", "json").stdout)
    assert counts["sites"][0]["zeros"] > 400
    assert (counts["sites"][0]["mean_output"], counts["sites"][0]["counts"]["faint"]) == (None, None)
    assert [item["level"] for item in counts["findings"] if "--stats counts" in item["message"]] == ["note"]

    (tmp_path / "report.json").write_text(found.stdout, encoding="utf-8")
    passed = run("gate", "--report", tmp_path / "report.json")
    assert (passed.returncode, "PASSED" in passed.stdout) == (0, True)
    assert "NaN that came later was not looked for" in " ".join(passed.stdout.split())
    failed = run("gate", tmp_path / "net.pt", "--stats", "verdict", "--max-layer-dead", "10%")
    assert failed.returncode == 1
    assert "1 of 6 units" in failed.stdout
    wrong = run("scan", tmp_path / "net.pt", "--stats", "some")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "full, counts, verdict" in wrong.stderr.replace(" or ", ", ")
    with pytest.raises(UsageError, match="full, counts, verdict"):
        deadcheck.scan(net, torch.randn(4, 4), stats="some")


def test_evidence_says_what_is_known() -> None:
    unit = deadcheck.scan(Kinds(), planted(), stats="verdict").site("acts.relu").unit(4)

    assert (unit.verdict, unit.fired) == (Verdict.LIVE, None)
    assert math.isnan(unit.zero_rate)
    assert math.isnan(unit.upper_bound)
    assert unit.because == f"on, first in sample {unit.witness}"


def test_nan_seen_while_a_unit_is_asked_is_told() -> None:
    x = planted()
    x[0, 4] = math.nan
    for stats in ("full", "counts", "verdict"):
        site = deadcheck.scan(Kinds(), x, batch_size=50, allow_nonfinite=True, stats=stats).site("acts.relu")
        assert site.verdict(4) is Verdict.INVALID


@pytest.mark.parametrize("stats", ["counts", "verdict"])
def test_shards_of_a_scan_that_measures_less_are_the_whole(tmp_path: Path, stats: str) -> None:
    torch.save(nn.Sequential(nn.Identity(), nn.ReLU(), nn.GELU(), nn.ReLU6()), tmp_path / "net.pt")
    np.savez(tmp_path / "net.sample.npz", x=planted().numpy())
    settings = ScanSettings(batch_size=33, stats=stats)
    whole = pipeline.scan_file(tmp_path / "net.pt", LoadOptions(), Config(scan=settings))
    kept = []
    for index in (1, 2, 3):
        with pipeline._opened(tmp_path / "net.pt", LoadOptions(), Config(scan=settings)) as (loaded, batches, own):
            counted = pipeline.counted(loaded, batches, own, shard=Shard(index, 3))
        kept.append((str(index), pipeline.parts.Kept(counted.scan, Shard(index, 3), True, counted.part)))
    joined = pipeline.parts.merged(kept)

    for one, other in zip(whole.measurement.sites, joined.sites, strict=True):
        for name in ("zeros", "fired", "first_fired", "input_max", "output_sum", "nonfinite"):
            assert getattr(one, name).tobytes() == getattr(other, name).tobytes(), name


def test_nothing_is_left_of_sums_that_counts_leave_out() -> None:
    # What rounding dropped of them would tell a scan in one piece from one in parts.
    rest = np.full((len(SUMS), 2), 1e-18)
    site = Site("s", "s", "relu", Family.RECTIFIER, (), 2, "linear", 1)
    numbers, counts = np.ones(2), np.ones(2, np.int64)
    names = [item.name for item in fields(SiteStats) if item.name not in ("site", "samples", "observations", "rest")]
    whole = {name: numbers if name in SUMS or name.endswith(("_min", "_max")) else counts for name in names}
    left = SiteStats(site=site, samples=1, observations=1, rest=rest, **whole).without_sums()  # type: ignore[arg-type]

    for row, name in enumerate(SUMS):
        dropped = name.startswith("output")
        assert np.isnan(getattr(left, name)).all() == dropped
        assert left.rest[row].tolist() == ([0.0, 0.0] if dropped else [1e-18, 1e-18])

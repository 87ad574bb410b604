"""What the run block of a report says of the time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from deadcheck.commands.inputs import Target
from deadcheck.commands.measuring import Reading, Run, scanned
from deadcheck.config import Config
from deadcheck.diagnosis import diagnose
from deadcheck.passes import Passes
from deadcheck.record import RunRecord, record_of
from deadcheck.reports import REPORTS, RenderOptions
from deadcheck.reports.from_json import read_report
from deadcheck.sites import Spent
from tests.records import measurement, outcome, site_stats


def run_of(spent: Spent) -> RunRecord:
    run = record_of(diagnose(measurement(site_stats(), spent=spent))).run
    assert run is not None
    return run


@pytest.mark.parametrize(
    ("data", "forward", "is_said"),
    [
        (2.51, 2.50, True),
        (2.50, 2.50, False),  # 5.0 s in all: too short to matter
        (3.0, 3.0, False),  # half of it
        (3.01, 3.0, True),
        (2.9, 3.0, False),
        (40.0, 1.0, True),
        (0.0, 900.0, False),
    ],
)
def test_a_reader_slower_than_the_model_is_said(data: float, forward: float, is_said: bool) -> None:
    assert (run_of(Spent(data, forward)).note is not None) is is_said


def test_the_sentence_has_both_numbers() -> None:
    assert (run_of(Spent(31.25, 8.8)).note or "").startswith("reading the data took 31.2 of 40.0 s")


def test_the_seconds_stand_in_the_run_block_alone(tmp_path: Path) -> None:
    texts = [
        REPORTS["json"]([outcome(measurement(site_stats(), spent=spent))], RenderOptions())
        for spent in (Spent(), Spent(31.25, 8.8, 0.75))
    ]
    reports = [json.loads(text) for text in texts]
    (tmp_path / "r.json").write_text(texts[1])
    runs = [report.pop("run") for report in reports]

    assert reports[0] == reports[1]
    assert {name: runs[1][name] for name in runs[1] if name.startswith("seconds_")} == {
        "seconds_data": 31.25, "seconds_forward": 8.8, "seconds_counting": 0.75,
    }  # fmt: skip
    assert (runs[0]["seconds_data"], runs[0]["seconds_counting"], runs[0]["note"]) == (0.0, None, None)
    assert read_report(tmp_path / "r.json").run == RunRecord(**runs[1])


@pytest.mark.parametrize("quiet", [False, True])
def test_a_command_says_it_on_stderr_unless_it_is_quiet(
    quiet: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), tmp_path / "m.pt")
    torch.save(torch.ones(5, 3), tmp_path / "m.sample.pt")
    monkeypatch.setattr(Passes, "spent", Spent(8.0, 2.0))
    target = Target(str(tmp_path / "m.pt"), Config())

    record = scanned(target, Run(Config(), Reading(None, (), (), None), None, quiet=quiet))
    told = capsys.readouterr()

    assert record.run is not None
    assert (record.run.note or "").startswith("reading the data took 8.0 of 10.0 s")
    assert told.out == ""
    assert told.err == ("" if quiet else f"deadcheck: note: {tmp_path / 'm.pt'}: {record.run.note}\n")

"""A report read back is the report that was written, and one that lies is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deadcheck.errors import ExitCode, UsageError
from deadcheck.reports import REPORTS, Failure, Outcome, RenderOptions
from deadcheck.reports.from_json import read_report, read_reports
from deadcheck.sites import Family, Skipped
from tests.records import input_summary, measurement, outcome, scan_record, site_stats
from tests.reports.test_every_report import EACH, HOSTILE
from tests.reports.test_every_report import outcome as gated
from tests.test_cli import SAMPLES, deadcheck

Report = dict[str, Any]


def written(folder: Path, outcomes: list[Outcome], **options: Any) -> Path:
    path = folder / "report.json"
    path.write_text(REPORTS["json"](outcomes, RenderOptions(**options)), encoding="utf-8")
    return path


def full() -> Outcome:
    """A scan with some of everything."""
    return outcome(
        measurement(
            site_stats("a", units=64, off=[3, 4, 9], nonfinite=[0] * 63 + [1], output_max=[np.inf] + [1.0] * 63),
            site_stats("b:gelu#1", family=Family.SMOOTH, input_max=[-1.0, 1, 1, 1], samples=120, off=[2]),
            skipped=(Skipped("aten.where", "block", "written by hand"),),
            inputs=(input_summary(mean=np.nan),),
            warnings=("guessed",),
            output_constant=False,
        ),
        per_unit=True,
    )


@pytest.mark.parametrize("per_unit", [False, True])
def test_what_is_read_is_what_was_written(tmp_path: Path, per_unit: bool) -> None:
    path = written(tmp_path, [full()], per_unit=per_unit)
    again = REPORTS["json"](read_reports(path, per_unit=per_unit), RenderOptions(per_unit=per_unit))

    assert again == path.read_text()


@pytest.mark.parametrize("command", [("patch", "--dry-run"), ("compare",), ("inspect",)])
def test_a_report_of_another_command_is_said_to_be_one(tmp_path: Path, command: tuple[str, ...]) -> None:
    run = deadcheck(command[0], SAMPLES / "digits_mlp.pt", *command[1:], "-f", "json")
    (tmp_path / "other.json").write_text(run.stdout)

    with pytest.raises(UsageError, match=r"other.json: a report of another command, and not of a scan or a gate"):
        read_reports(tmp_path / "other.json")


def test_numbers_of_units_that_a_report_does_not_hold(tmp_path: Path) -> None:
    path = written(tmp_path, [full()])

    with pytest.raises(UsageError, match="holds no numbers of each unit; write it anew with --per-unit"):
        read_reports(path, per_unit=True)

    failed = written(tmp_path, [Outcome("m.pt", failure=Failure(ExitCode.ERROR, "no"))])
    assert read_reports(failed, per_unit=True)[0].failure is not None


@pytest.mark.parametrize("which", EACH)
def test_every_outcome_is_read_back(tmp_path: Path, which: str) -> None:
    path = written(tmp_path, EACH[which])
    back = read_reports(path)

    assert REPORTS["json"](back, RenderOptions()) == path.read_text()
    for name, render in REPORTS.items():
        assert render(back, RenderOptions()) == render(EACH[which], RenderOptions()), name


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_names_are_read_back(tmp_path: Path, kind: str) -> None:
    word = HOSTILE[kind]
    path = written(tmp_path, [gated(word, word, word)])

    assert REPORTS["json"](read_reports(path), RenderOptions()) == path.read_text()


AGREED: Report = {
    "schema_version": "1.0", "tool": {"name": "deadcheck", "version": "0.1.0"}, "status": "pass", "exit_code": 0,
    "model": {"path": "net.pt", "sha256": "ab", "bytes": 1, "format": "torch-module", "read": "rebuilt", "arch": None,
              "prefix_stripped": None},
    "data": {"source": "x.npz", "sha256": "cd", "samples": 5000, "synthetic": False},
    "env": {"torch": "2.13.0", "device": "cpu", "dtype": "float32", "mode": "eval", "seed": 0, "world_size": 1},
    "totals": {"sites": 1, "units": 256, "dead": 31, "silent": 0, "dead_share": 0.12},
    "sites": [
        {"key": "relu#2", "module": "relu", "activation": "relu", "fed_by": ["bn2"], "axis": 1, "axis_from": "conv2d",
         "units": 256, "samples": 5000, "observations": 980000, "zero_rate": 0.5312,
         "counts": {"dead": 31, "silent": 0, "rare": 4, "faint": 2, "saturated": 0, "always_on": 1, "negative_only": 0,
                    "invalid": 0, "live": 218},
         "upper_bound": 0.0006, "dead_units": [[0, 28], [200, 201]], "silent_units": []},
    ],
    "skipped": [], "findings": [], "warnings": [], "error": None, "run": None,
}  # fmt: skip
"""No more than the keys that are agreed on, as another program may write them."""


def agreed(change: Callable[[Report], object]) -> Report:
    report: Report = json.loads(json.dumps(AGREED))
    change(report)
    return report


def test_the_agreed_keys_are_enough_for_every_report(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(AGREED))
    record = read_report(path)

    assert (record.sites[0].dead_units, record.sites[0].negative_only_units) == (((0, 28), (200, 201)), None)
    assert (record.rules_version, record.output_constant) == (1, None)
    for render in REPORTS.values():
        assert render(read_reports(path), RenderOptions()) is not None
    assert "53.1%" in REPORTS["table"](read_reports(path), RenderOptions())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["sites"][0]["counts"].update(dead=0), "its verdicts are on 225 of 256 units"),
        (lambda r: r["sites"][0]["counts"].update(dead=30, live=219), "30 units are dead, and 31 are listed"),
        (lambda r: r["sites"][0].update(dead_units=[]), "31 units are dead, and 0 are listed"),
        (lambda r: r["sites"][0].update(dead_units=[[200, 230]], units=225), "its verdicts are on 256 of 225 units"),
        (lambda r: r["sites"][0].update(dead_units=[[226, 256]]), "not ascending ranges within 256 units"),
        (lambda r: r["sites"][0].update(dead_units=[[-1, 29]]), "not ascending ranges within 256 units"),
        (lambda r: r["sites"][0].update(dead_units=[[28, 0], [200, 230]]), "not ascending ranges"),
        (lambda r: r["sites"][0].update(dead_units=[[0, 28], [28, 29]]), "not ascending ranges"),
        (lambda r: r["sites"][0].update(dead_units=[[0, 10**30]]), "not ascending ranges"),
        (lambda r: r["sites"][0]["counts"].update(dead=-31, live=280), "a count below 0"),
        (lambda r: r["sites"][0].update(samples=-1), "a count below 0"),
        (lambda r: r["data"].update(samples=-5), "-5 samples"),
        (lambda r: r["sites"].append(r["sites"][0]), "layer 'relu#2' stands twice"),
        (
            lambda r: r["sites"][0].update(silent_units=[[5, 5]], counts={"dead": 31, "silent": 1, "live": 224}),
            "a unit has two verdicts",
        ),
        (lambda r: r.update(findings=[{"id": "x", "level": "fatal", "where": "", "message": "m"}]), "a level"),
    ],
)
def test_a_report_that_contradicts_itself_is_refused(tmp_path: Path, change: Any, words: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(agreed(change)))

    with pytest.raises(UsageError) as caught:
        read_reports(path)

    assert words in str(caught.value)
    assert "contradicts itself" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"just text", "not JSON"),
        (b"[1, 2]", "not a deadcheck report (Expected `object`, got `array`)"),
        (b"{}", "missing required field `schema_version`"),
        (b'{"schema_version": 1}', "Expected `str`, got `int`"),
        (b'{"schema_version": "2.0"}', "version 2.0 of the format, this deadcheck reads version 1"),
        (b'{"schema_version": "1.0"}', "it has no model"),
        (json.dumps(agreed(lambda r: r.update(data=None))).encode(), "it has no data"),
        (json.dumps(agreed(lambda r: r["sites"][0].update(units="many"))).encode(), "`$.sites[0].units`"),
        (json.dumps(agreed(lambda r: r["sites"][0].update(units=2.5))).encode(), "`$.sites[0].units`"),
        (json.dumps(agreed(lambda r: r["data"].pop("samples"))).encode(), "missing required field `samples`"),
        (b'{"schema_version": "1.0", "sites": ' + b"[" * 200_000, "not a deadcheck report"),
        (b'{"schema_version": "1.0", "x": NaN}', "NaN is not a finite number"),
        (json.dumps(AGREED).replace("0.5312", "1e999").encode(), "1e999 is not a finite number"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"PK\x03\x04", "not JSON"),
        (b'{"schema_version": "\xff"}', "not a deadcheck report"),
    ],
)
def test_what_is_no_report_gets_one_sentence(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(content)

    with pytest.raises(UsageError) as caught:
        read_reports(path)

    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_no_file_and_no_regular_file(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "gone.json", "no such report"), (tmp_path, "a folder, not a report"),
                        (Path("/dev/zero"), "not a regular file")):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            read_reports(path)


def test_one_of_several_is_found_by_its_model(tmp_path: Path) -> None:
    both = [Outcome("a.pt", scan_record()), Outcome("b.pt", scan_record())]
    path = written(tmp_path, [Outcome(o.model, full().record) for o in both])
    text = json.loads(path.read_text())
    for part, name in zip(text["reports"], ("a.pt", "b.pt"), strict=True):
        part["model"]["path"] = name
    path.write_text(json.dumps(text))

    assert read_report(path, "b.pt").model.path == "b.pt"
    with pytest.raises(UsageError, match=r"a report on 2 models, of which 0 are c\.pt"):
        read_report(path, "c.pt")


def test_the_report_of_a_failure_is_no_baseline(tmp_path: Path) -> None:
    path = written(tmp_path, [Outcome("x.pt", failure=Failure(ExitCode.REFUSED, "needs trust"))])

    with pytest.raises(UsageError, match=r"a run that measured nothing \(needs trust\)"):
        read_report(path)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_report_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(json.dumps(AGREED).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path = tmp_path / "r.json"
    path.write_bytes(bytes(content))
    try:
        back = read_reports(path)
    except UsageError:
        return
    for render in REPORTS.values():
        render(back, RenderOptions())

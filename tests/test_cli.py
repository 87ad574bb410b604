"""The command line: exit code, stdout and stderr, each for itself."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from deadcheck.cli import _left_behind

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "sample_models"


def deadcheck(*args: object, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "deadcheck", *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120, check=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small saved module with a sample beside it: unit 0 of the first layer is dead by its bias."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        net[0].bias[0] = -100.0
    torch.save(net, tmp_path / "net.pt")
    np.savez(tmp_path / "net.sample.npz", x=np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32))
    return tmp_path / "net.pt"


def test_a_scan_prints_a_table_and_nothing_else(model: Path) -> None:
    run = deadcheck("scan", model)

    assert run.returncode == 0
    assert "1 of 3 units are dead (33.3%)" in run.stdout
    assert run.stderr == ""


def test_json_holds_the_counts(model: Path) -> None:
    run = deadcheck("scan", model, "-f", "json", "--per-unit")
    report = json.loads(run.stdout)

    assert run.returncode == report["exit_code"] == 0
    assert report["status"] == "pass"
    site = report["sites"][0]
    assert (site["key"], site["fed_by"], site["axis"], site["axis_from"]) == ("1", ["0"], 1, "linear")
    assert site["dead_units"] == [[0, 0]]
    assert site["per_unit"]["zeros"][0] == 300
    assert site["per_unit"]["first_fired"][0] is None
    assert site["per_unit"]["verdict"][0] == "dead"


def test_two_runs_differ_in_the_run_block_alone(model: Path) -> None:
    first, second = (json.loads(deadcheck("scan", model, "-f", "json", "--per-unit").stdout) for _ in range(2))
    del first["run"], second["run"]

    assert first == second


def test_one_scan_writes_several_reports(model: Path, tmp_path: Path) -> None:
    run = deadcheck("scan", model, "-o", f"json={tmp_path / 'a.json'}", "-o", f"table={tmp_path / 'a.txt'}")

    assert run.returncode == 0
    assert json.loads((tmp_path / "a.json").read_text())["totals"]["dead"] == 1
    assert "1 of 3 units are dead" in (tmp_path / "a.txt").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.txt", "net.pt", "net.sample.npz"]


def test_whole_module_and_weights_with_arch_give_the_same_report() -> None:
    whole = json.loads(deadcheck("scan", SAMPLES / "digits_mlp.pt", "-f", "json", "--per-unit").stdout)
    arch = SAMPLES / "architectures.py"
    run = deadcheck("scan", SAMPLES / "digits_mlp_weights.pt", "--arch", f"{arch}:mlp", "-f", "json", "--per-unit")
    weights = json.loads(run.stdout)

    for name in ("sites", "totals", "findings", "skipped", "inputs", "warnings", "env", "thresholds"):
        assert whole[name] == weights[name], name


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (None, 2, "no such file"),
        (b"", 2, "the file is empty"),
        (b"just some text\n", 2, "text, not a model"),
        (b"<!DOCTYPE html><html>", 2, "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", 2, "git lfs pull"),
        (b"\0" * 1000, 2, "damaged"),
        (b"PK\x03\x04" + b"\0" * 100, 2, "a cut-off or broken zip"),
        (b"\x93NUMPY\x01\x00", 2, "a NumPy array, not a model"),
        (b"GGUF\x03\0\0\0", 2, "GGUF"),
    ],
)
def test_a_file_that_is_no_model_gets_one_sentence(tmp_path: Path, content, code, words) -> None:
    path = tmp_path / "model.pt"
    if content is not None:
        path.write_bytes(content)

    run = deadcheck("scan", path)

    assert run.returncode == code
    assert run.stdout == ""
    assert words in run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert "Traceback" not in run.stderr


def test_a_folder_is_no_model(tmp_path: Path) -> None:
    run = deadcheck("scan", tmp_path)

    assert (run.returncode, run.stdout) == (2, "")
    assert "is a folder" in run.stderr


def test_a_truncated_model_is_said_to_be_damaged(model: Path) -> None:
    model.write_bytes(model.read_bytes()[:-200])

    run = deadcheck("scan", model)

    assert run.returncode == 2
    assert "a cut-off or broken zip" in run.stderr


def test_weights_without_arch_say_what_to_add() -> None:
    run = deadcheck("scan", SAMPLES / "digits_mlp_weights.pt")

    assert run.returncode == 2
    assert "holds weights only (6 tensors)" in run.stderr
    assert "--arch file.py:factory" in run.stderr


def test_weights_that_do_not_fit_are_listed_in_five_lines() -> None:
    arch = f"{SAMPLES / 'architectures.py'}:mlp"
    run = deadcheck("scan", SAMPLES / "digits_mlp_weights.pt", "--arch", arch, "--arch-arg", "width=64")

    assert run.returncode == 2
    assert "'0.weight' is (256, 64) in the file and (64, 64) in the model" in run.stderr
    assert len(run.stderr.splitlines()) <= 5


def test_weights_of_another_model_name_missing_and_unexpected_keys() -> None:
    arch = f"{SAMPLES / 'architectures.py'}:transformer"
    run = deadcheck("scan", SAMPLES / "digits_mlp_weights.pt", "--arch", arch)

    assert run.returncode == 2
    assert "missing from the file: 'embed.bias'" in run.stderr
    assert "6 unexpected in the file: '0.bias', '0.weight', '2.bias'" in run.stderr


def test_a_wrong_input_shape_says_expected_and_given(model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "wide.npy", np.zeros((10, 5), np.float32))

    run = deadcheck("scan", model, "--data", tmp_path / "wide.npy")

    assert run.returncode == 2
    assert "failed in 0 (Linear) at sample 0, given (10, 5) float32; in_features=4" in run.stderr


def test_a_model_without_activations_has_nothing_to_judge(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(4, 3)), tmp_path / "flat.pt")
    np.save(tmp_path / "x.npy", np.ones((10, 4), np.float32))

    run = deadcheck("scan", tmp_path / "flat.pt", "--data", tmp_path / "x.npy", "-f", "json")

    assert run.returncode == 3
    assert "no activation ran in 10 samples" in run.stderr
    assert json.loads(run.stdout)["status"] == "inconclusive"


def test_no_samples_are_nothing_to_judge(model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "none.npy", np.ones((0, 4), np.float32))

    run = deadcheck("scan", model, "--data", tmp_path / "none.npy")

    assert run.returncode == 3
    assert "holds no samples" in run.stderr


def test_nan_in_the_data_is_refused_with_its_place(model: Path, tmp_path: Path) -> None:
    data = np.ones((10, 4), np.float32)
    data[7, 2] = np.nan
    np.save(tmp_path / "nan.npy", data)

    run = deadcheck("scan", model, "--data", tmp_path / "nan.npy")
    measured = deadcheck("scan", model, "--data", tmp_path / "nan.npy", "--allow-nonfinite", "-f", "json")

    assert run.returncode == 2
    assert "the first is sample 7" in run.stderr
    assert measured.returncode == 0
    assert json.loads(measured.stdout)["totals"]["counts"]["invalid"] == 3


def test_an_unknown_configuration_key_is_named_with_its_line(model: Path, tmp_path: Path) -> None:
    (tmp_path / "deadcheck.yaml").write_text("scan:\n  batchsize: 3\n")

    run = deadcheck("scan", model, "--config", tmp_path / "deadcheck.yaml")

    assert run.returncode == 2
    assert "deadcheck.yaml:2: unknown key scan.batchsize; did you mean 'batch_size'?" in run.stderr


class Payload:
    """Pickles as a call of os.system that would create a marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    torch.save({"model": Payload(tmp_path / "marker")}, tmp_path / "evil.pt")

    run = deadcheck("scan", tmp_path / "evil.pt", "-f", "json")

    assert run.returncode == 4
    assert "names posix.system" in run.stderr
    assert json.loads(run.stdout)["status"] == "refused"
    assert not (tmp_path / "marker").exists()


def test_a_class_of_the_users_needs_arch_or_leave(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "from torch import nn\nclass Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__(); self.fc = nn.Linear(4, 3); self.act = nn.ReLU()\n"
        "    def forward(self, x): return self.act(self.fc(x))\n"
    )
    script = "import torch, nets; torch.save(nets.Net(), 'net.pt')"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32))

    refused = deadcheck("scan", "net.pt", "--data", "x.npy", cwd=tmp_path)
    allowed = deadcheck("scan", "net.pt", "--data", "x.npy", "--allow-class", "nets.Net", "-f", "json", cwd=tmp_path)
    built = deadcheck("scan", "net.pt", "--data", "x.npy", "--arch", "nets:Net", "-f", "json", cwd=tmp_path)

    assert refused.returncode == 4
    assert "--arch nets:Net" in refused.stderr
    assert "--allow-class nets.Net" in refused.stderr
    assert (allowed.returncode, built.returncode) == (0, 0)
    assert json.loads(allowed.stdout)["model"]["read"] == "allowed-class"
    assert json.loads(allowed.stdout)["sites"] == json.loads(built.stdout)["sites"]


def test_unreadable_data_gets_one_sentence(model: Path, tmp_path: Path) -> None:
    (tmp_path / "data.npz").write_text("no data")

    run = deadcheck("scan", model, "--data", tmp_path / "data.npz")

    assert run.returncode == 2
    assert "not data that can be read (it looks like text)" in run.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("-o", "json"), "is not FORMAT=PATH"),
        (("-f", "pdf"), "unknown report format 'pdf'; there are table, text, concise, json, markdown, sarif, junit"),
        (("-o", "json=missing/r.json"), "the folder 'missing' does not exist"),
        (("--units", "encoder"), "is not PATTERN=AXIS"),
        (("--batch-size", "0"), "--batch-size"),
        (("--nonsense",), "--nonsense"),
        (("--unpack", "some"), "not one of auto, first, args, kwargs"),
        (("--data", "random"), "--input-shape"),
        (("--device", "nowhere"), "device 'nowhere' cannot be used here"),
        (("--call", "fly"), "has no method 'fly'"),
        (("--arch-arg", "width=3"), "--arch-arg goes with --arch"),
    ],
)
def test_misuse_is_exit_code_2(model: Path, args, words) -> None:
    run = deadcheck("scan", model, *args)

    assert run.returncode == 2
    assert run.stdout == ""
    assert words in run.stderr
    assert "Traceback" not in run.stderr


def test_the_table_is_plain_without_colour_and_unicode(model: Path) -> None:
    run = deadcheck("scan", model, "--ascii", COLUMNS="80")

    assert run.stdout.isascii()
    assert max(map(len, run.stdout.splitlines())) <= 80
    assert "\x1b" not in run.stdout


def test_a_crash_of_ours_is_not_exit_code_1(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys, deadcheck.pipeline as p\n"
        "def boom(*a, **k): raise ZeroDivisionError('ours')\n"
        "p.scan_file = boom\n"
        f"sys.argv = ['deadcheck', 'scan', {str(model)!r}]\n"
        "from deadcheck.cli import main\nmain()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)

    assert run.returncode == 2
    assert "internal error (ZeroDivisionError: ours)" in run.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize(
    "arguments", [("scan", "-f", "json"), ("gate", "-f", "json"), ("scan",), ("rule",), ("--help",), ("--version",)]
)
def test_a_full_disk_behind_stdout_is_one_sentence_and_no_failed_rule(arguments: tuple[str, ...], model: Path) -> None:
    more = [str(model)] if arguments[0] in ("scan", "gate") else []
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "deadcheck", arguments[0], *more, *arguments[1:]],
            stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=120, check=False,
        )  # fmt: skip

    assert done.returncode == 2
    assert done.stderr == (
        "deadcheck: error: cannot write to stdout: No space left on device; make room, or send it elsewhere\n"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("command", ["scan", "gate"])
def test_a_full_disk_behind_both_streams_is_no_failed_rule(command: str, model: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "deadcheck", command, str(model)],
            stdout=full, stderr=full, cwd=ROOT, timeout=120, check=False,
        )  # fmt: skip

    assert done.returncode == 2


@pytest.mark.parametrize(
    "arguments", [("scan", ""), ("gate", "net.pt", "--baseline", ""), ("scan", "net.pt", "--arch", "")]
)
def test_an_empty_argument_is_no_file(arguments: tuple[str, ...], model: Path) -> None:
    run = deadcheck(*arguments, cwd=model.parent)

    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == (f"deadcheck: error: argument {len(arguments)} is empty; is it a variable that is not set?\n")


@pytest.mark.skipif(os.name != "posix", reason="what a shell does")
def test_a_working_directory_that_is_gone(model: Path) -> None:
    (model.parent / "gone").mkdir()
    command = f"{sys.executable} -P -m deadcheck scan ../net.pt"
    line = f"cd {shlex.quote(str(model.parent / 'gone'))} && rmdir ../gone && {command}"
    run = subprocess.run(
        ["sh", "-c", line], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )

    assert run.returncode == 2
    assert run.stderr.startswith("deadcheck: error: the working directory cannot be found (No such file or directory)")
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("columns", ["abc", "1e9", "99999999", "-5", ""])
def test_a_width_that_is_none(columns: str, model: Path) -> None:
    run = deadcheck("scan", model, COLUMNS=columns)

    assert run.returncode == 0, run.stderr
    assert max(map(len, run.stdout.splitlines())) <= 400


@pytest.mark.skipif(not Path("/dev/stdout").exists(), reason="a device of Unix")
def test_a_report_goes_to_a_pipe_by_its_name(model: Path) -> None:
    run = deadcheck("scan", model, "-f", "concise", "-o", "json=/dev/stderr")

    assert run.returncode == 0
    assert json.loads(run.stderr)["status"] == "pass"


@pytest.mark.parametrize("group", ["plot", "config", "baseline"])
def test_a_group_alone_is_its_help(group: str) -> None:
    run = deadcheck(group)

    assert (run.returncode, run.stderr) == (2, "")
    assert "Usage: " in run.stdout


def test_a_command_that_is_none() -> None:
    run = deadcheck("doctor")

    assert (run.returncode, run.stderr) == (
        2, "deadcheck: error: No such command 'doctor'; see 'deadcheck --help'\n"
    )  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="what a shell does")
@pytest.mark.parametrize(
    ("closed", "code", "said"),
    [
        (">&-", 2, "deadcheck: error: stdout is closed; leave it open, or send it to /dev/null\n"),
        ("2>&-", 0, ""),
    ],
)
def test_a_closed_stream_is_no_crash(closed: str, code: int, said: str, model: Path) -> None:
    command = f"{sys.executable} -m deadcheck scan {model} -f json {closed}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)

    assert (done.returncode, done.stderr) == (code, said)


@pytest.mark.parametrize(
    ("arguments", "lost"),
    [
        (("scan", "net.pt", "-o", "json=net.sample.npz"), "net.sample.npz"),
        (("scan", "net.pt", "--data=x.npy", "-o", "json=x.npy"), "x.npy"),
        (("scan", "net.pt", "--arch", "arch.py:build", "-o", "json=arch.py"), "arch.py"),
        (("gate", "net.pt", "-b", "base.json", "-o", "text=base.json"), "base.json"),
        (("gate", "net.pt", "-o", "json=deadcheck.yaml"), "deadcheck.yaml"),
        (("report", "base.json", "-o", "markdown=base.json"), "base.json"),
        (("merge", "1.part", "2.part", "-o", "json=1.part"), "1.part"),
        (("scan", "net.pt", "--checkpoint", "1.part", "-o", "json=1.part"), "1.part"),
        (("baseline", "write", "net.pt", "--data", "x.npy", "-o", "x.npy", "--accept-worse"), "x.npy"),
        (("patch", "net.pt", "--data", "x.npy", "-o", "out.pt", "--save-report", "json=x.npy"), "x.npy"),
        (("plot", "alpha", "net.pt", "--data", "x.npy", "-o", "svg=x.npy"), "x.npy"),
    ],
)
def test_no_file_that_a_command_reads_is_written_over(arguments: tuple[str, ...], lost: str, model: Path) -> None:
    for name in ("arch.py", "base.json", "1.part", "2.part"):
        (model.parent / name).write_text(name)
    (model.parent / "deadcheck.yaml").write_text("scan: {}\n")
    np.save(model.parent / "x.npy", np.zeros((300, 4), np.float32))
    before = (model.parent / lost).read_bytes()

    done = deadcheck(*arguments, cwd=model.parent)

    assert done.returncode == 2
    assert f"'{lost}' is a file that this command reads, and would be lost; name another file" in done.stderr
    assert (model.parent / lost).read_bytes() == before


@pytest.mark.parametrize("form", ["found", "named", "extended", "toml"])
@pytest.mark.parametrize("lost", ["x.npy", "base.json", "arch.py"])
def test_no_file_that_the_settings_name_is_written_over(lost: str, form: str, model: Path) -> None:
    folder = model.parent
    for name in ("arch.py", "base.json"):
        (folder / name).write_text(name)
    np.save(folder / "x.npy", np.zeros((300, 4), np.float32))
    settings = "scan: {data: x.npy}\nmodels: [{path: net.pt, arch: 'arch.py:build', baseline: base.json}]\n"
    place = {"found": "deadcheck.yaml", "toml": "pyproject.toml"}.get(form, "other.cfg")
    (folder / place).write_text(settings)
    if form == "extended":
        (folder / "deadcheck.yaml").write_text("extends: other.cfg\n")
    if form == "toml":
        rows = "[[tool.deadcheck.models]]\npath = 'net.pt'\narch = 'arch.py:build'\nbaseline = 'base.json'\n"
        (folder / place).write_text(f"[tool.deadcheck.scan]\ndata = 'x.npy'\n{rows}")
    before = (folder / lost).read_bytes()

    done = deadcheck("gate", "-o", f"json={lost}", *["--config=other.cfg"] * (form == "named"), cwd=folder)

    assert done.returncode == 2
    assert f"'{lost}' is a file that this command reads, and would be lost; name another file" in done.stderr
    assert (folder / lost).read_bytes() == before


def test_a_baseline_that_the_settings_name_is_renewed(model: Path) -> None:
    (model.parent / "deadcheck.yaml").write_text("models: [{path: net.pt, baseline: base.json}]\n")
    for _ in range(2):
        done = deadcheck("baseline", "write", "net.pt", "-o", "base.json", cwd=model.parent)
        assert (done.returncode, done.stderr.count("would be lost")) == (0, 0)


def test_two_reports_do_not_go_to_one_file(model: Path) -> None:
    done = deadcheck("gate", "net.pt", "-o", "json=z", "-o", "sarif=./z", cwd=model.parent)

    assert (done.returncode, done.stderr) == (
        2, "deadcheck: error: the json report and the sarif report are to go to one file; name a file for each\n"
    )  # fmt: skip
    assert not (model.parent / "z").exists()


def test_a_checkpoint_and_a_report_do_not_go_to_one_file(model: Path) -> None:
    done = deadcheck("scan", "net.pt", "--checkpoint", "z", "-o", "json=./z", cwd=model.parent)

    assert (done.returncode, done.stderr) == (
        2, "deadcheck: error: --checkpoint and the json report are to go to one file; name a file for each\n"
    )  # fmt: skip


def test_what_an_interrupt_leaves_is_said(tmp_path: Path) -> None:
    part = tmp_path / "a.part"
    arguments = ["scan", "net.pt", "--checkpoint", str(part)]

    assert _left_behind(arguments) == "nothing was written"
    part.write_bytes(b"")
    assert _left_behind(arguments) == f"the same command goes on from {part}"
    assert _left_behind(["scan", "net.pt", f"--checkpoint={part}", "-q"]) == f"the same command goes on from {part}"
    assert _left_behind(["scan", str(part)]) == "nothing was written"


def test_a_baseline_is_renewed_from_a_report_of_the_same_name(model: Path) -> None:
    (model.parent / "new").mkdir()
    for place in ("base.json", "new/base.json"):
        assert deadcheck("scan", "net.pt", "-q", "-o", f"json={place}", cwd=model.parent).returncode == 0

    done = deadcheck("baseline", "write", "--report", "new/base.json", "-o", "base.json", cwd=model.parent)

    assert (done.returncode, done.stderr.count("would be lost")) == (0, 0)


def test_an_argument_too_long_for_a_file_is_no_file(model: Path) -> None:
    done = deadcheck("scan", "net.pt", "-q", "-o", "json=a.json", "--arch-arg", f"name={'x' * 5000}", cwd=model.parent)

    assert "internal error" not in done.stderr

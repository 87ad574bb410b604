"""deadcheck patch, compare and plot: exit code, stdout and stderr, and what lies on the disk."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deadcheck as library
from tests.test_cli import ROOT, SAMPLES, deadcheck


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small saved module with labelled data beside it: unit 0 of the first layer is dead by its bias."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        net[0].bias[0] = -20.0
    torch.save(net, tmp_path / "net.pt")
    x = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    np.savez(tmp_path / "net.sample.npz", x=x, y=net(torch.from_numpy(x)).argmax(1).numpy())
    return tmp_path / "net.pt"


def data_of(model: Path) -> Tensor:
    return torch.from_numpy(np.load(model.with_name("net.sample.npz"))["x"])


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


LOADS = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
torch.save((model(torch.load(sys.argv[2])), model.state_dict()), sys.argv[3])
assert 'deadcheck' not in sys.modules
"""


def loaded_elsewhere(path: Path, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a saved model in a process that cannot import deadcheck."""
    folder = path.parent
    torch.save(x, folder / "x.in")
    command = [sys.executable, "-I", "-c", LOADS, str(path), str(folder / "x.in"), str(folder / "y.out")]
    subprocess.run(command, check=True, cwd=folder)
    found = torch.load(folder / "y.out")
    (folder / "x.in").unlink()
    (folder / "y.out").unlink()
    return found  # type: ignore[no-any-return]


def test_it_writes_a_patched_model_that_plain_torch_loads(model: Path, tmp_path: Path) -> None:
    before = digest(model)
    run = deadcheck("patch", model, "--alpha", "0.1", "-o", tmp_path / "fixed.pt")
    net, x = torch.load(model, weights_only=False), data_of(model)
    out, state = loaded_elsewhere(tmp_path / "fixed.pt", x)
    by_hand = net[4](F.leaky_relu(net[2](F.leaky_relu(net[0](x), 0.1)), 0.1))

    assert (run.returncode, run.stderr) == (0, "")
    assert torch.equal(out, by_hand)
    assert list(state) == list(net.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())
    assert digest(model) == before
    assert "ReLU → leaky_relu(0.1) at 2 sites, every unit" in run.stdout
    assert "This changes what the model computes:" in run.stdout
    assert "wrote" in run.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fixed.patch.yaml", "fixed.pt", "net.pt", "net.sample.npz"]


def test_the_patch_file_gives_the_same_model(model: Path, tmp_path: Path) -> None:
    deadcheck("patch", model, "--alpha", "0.1", "-o", tmp_path / "fixed.pt")
    again = deadcheck("patch", model, "--from-file", tmp_path / "fixed.patch.yaml", "-o", tmp_path / "again.pt")
    x = data_of(model)
    wanted = torch.load(tmp_path / "fixed.pt", weights_only=False)(x)
    fresh = library.apply_patch(torch.load(model, weights_only=False), str(tmp_path / "fixed.patch.yaml"))

    assert again.returncode == 0
    assert not (tmp_path / "again.patch.yaml").exists()
    assert torch.equal(torch.load(tmp_path / "again.pt", weights_only=False)(x), wanted)
    assert torch.equal(fresh(x), wanted)


def test_the_patched_model_is_read_safely_and_scanned(model: Path, tmp_path: Path) -> None:
    deadcheck("patch", model, "--only-dead", "-o", tmp_path / "fixed.pt")
    run = deadcheck("scan", tmp_path / "fixed.pt", "--data", model.with_name("net.sample.npz"), "-f", "json")
    first = json.loads(run.stdout)["sites"][0]

    assert run.returncode == 0
    assert first["activation"] == "prelu"
    assert (first["counts"]["dead"], first["counts"]["negative_only"]) == (0, 1)


def test_what_stands_in_off_axis_1_is_one_class_to_allow(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        net[0].bias[0] = -20.0
    torch.save(net, tmp_path / "net.pt")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(300, 5, 4)).astype(np.float32))
    data = ("--data", tmp_path / "x.npy")
    patched = deadcheck("patch", tmp_path / "net.pt", "--only-dead", *data, "-o", tmp_path / "fixed.pt")
    allow = ("--allow-class", "deadcheck.stand_ins.StandIn")
    run = deadcheck("scan", tmp_path / "fixed.pt", *data, *allow, "-f", "json")

    assert "loading it takes deadcheck" in patched.stdout.replace("\n", " ")
    assert run.returncode == 0
    # Both halves are seen: the leak of all units, and the ReLU that is kept for the others.
    assert [site["key"] for site in json.loads(run.stdout)["sites"]] == ["1:relu#1", "1:leaky_relu#1"]


def test_json_tells_before_and_after(model: Path, tmp_path: Path) -> None:
    run = deadcheck("patch", model, "--alpha", "0.1", "--dry-run", "-f", "json")
    report = json.loads(run.stdout)
    site = report["sites"][0]

    assert run.returncode == report["exit_code"] == 0
    assert (report["status"], report["patch"]["with"], report["patch"]["alpha"]) == ("pass", "leaky_relu", 0.1)
    assert (site["key"], site["becomes"], site["units_changed"]) == ("1", "leaky_relu(0.1)", 3)
    assert (site["before"]["counts"]["dead"], site["after"]["counts"]["dead"]) == (1, 0)
    assert site["after"]["counts"]["negative_only"] == 1
    assert site["function"] == "as said"
    assert (site["gradient"]["without_before"], site["gradient"]["without_after"]) == (1, 0)
    assert site["gradient"]["dead_mean_before"] == 0
    assert site["gradient"]["dead_mean_after"] > 0
    assert report["drift"]["samples"] == 300
    assert (report["drift"]["right_before"], report["drift"]["decisions"]) == (300, 300)
    assert report["drift"]["right_after"] == 300 - report["drift"]["decisions_changed"]
    assert report["written"] == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.pt", "net.sample.npz"]


def test_two_runs_differ_in_the_run_block_alone(model: Path) -> None:
    first, second = (json.loads(deadcheck("patch", model, "--dry-run", "-f", "json").stdout) for _ in range(2))
    del first["run"], second["run"]

    assert first == second


def test_only_dead_changes_the_dead_unit_alone(model: Path, tmp_path: Path) -> None:
    run = deadcheck("patch", model, "--only-dead", "--alpha", "0.1", "-o", tmp_path / "fixed.pt")
    net, x = torch.load(model, weights_only=False), data_of(model)
    out, state = loaded_elsewhere(tmp_path / "fixed.pt", x)
    z = net[0](x)
    h = F.relu(z)
    h[:, 0] = F.leaky_relu(z[:, 0], 0.1)

    assert run.returncode == 0
    assert "dead units alone" in run.stdout
    assert torch.equal(out, net[4](F.relu(net[2](h))))
    assert list(state) == list(net.state_dict())
    assert "ReLUs left as they are: 1 not chosen" in run.stdout


def test_dead_units_come_from_a_report(model: Path, tmp_path: Path) -> None:
    deadcheck("scan", model, "-o", f"json={tmp_path / 'report.json'}")
    report = json.loads((tmp_path / "report.json").read_text())
    report["sites"][1].update(dead_units=[[0, 2]], silent_units=[])
    report["sites"][1]["counts"] = {**dict.fromkeys(report["sites"][1]["counts"], 0), "dead": 3}
    report["totals"]["dead"] = 4
    (tmp_path / "report.json").write_text(json.dumps(report))
    run = deadcheck("patch", model, "--only-dead", "--dead-from", tmp_path / "report.json", "--dry-run", "-f", "json")
    sites = json.loads(run.stdout)["sites"]

    assert run.returncode == 0
    assert [(site["key"], site["units_changed"]) for site in sites] == [("1", 1), ("3", 3)]
    report["model"]["sha256"] = "0" * 64
    (tmp_path / "report.json").write_text(json.dumps(report))
    other = deadcheck("patch", model, "--only-dead", "--dead-from", tmp_path / "report.json", "--dry-run")
    assert other.returncode == 2
    assert "the report of dead units is of another file; scan this one again" in other.stderr


def test_layers_and_shares_choose(model: Path) -> None:
    def changed(*options: str) -> list[str]:
        run = deadcheck("patch", model, *options, "--dry-run", "-f", "json")
        return [site["key"] for site in json.loads(run.stdout)["sites"]]

    assert changed("--layers", "3") == ["3"]
    assert changed("--layers", "!3") == ["1"]
    assert changed("--min-dead-share", "30%") == ["1"]
    assert changed("--all") == ["1", "3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--alpha", "0"], "--alpha 0 is ReLU itself, so nothing would change"),
        (["--alpha", "-0.1"], "--alpha -0.1 would turn negative inputs into positive outputs"),
        (["--alpha", "1e-300"], "--alpha 1e-300 is no slope that float32 can hold; give one above 0, as 0.01"),
        (["--alpha", "1"], "lets negative inputs through whole"),
        (["--alpha", "1.5"], "lets negative inputs through whole"),
        (["--alpha", "inf"], "lets negative inputs through whole"),
        (["--alpha", "nan"], "--alpha 'nan' is not a number; write 0.01, or auto"),
        (["--alpha", "much"], "--alpha 'much' is not a number"),
        (["--to", "swish"], "--to 'swish' is not one of leaky, prelu, elu, gelu, silu"),
        (["--to", "gelu", "--alpha", "0.1"], "gelu has no slope to choose; leave out --alpha"),
        (["--to", "elu", "--alpha", "auto"], "--alpha auto chooses a slope, and elu has none"),
        (["--to", "elu", "--alpha", "inf"], "--alpha inf is not finite"),
        (["--tolerance", "1%"], "--tolerance is how far --alpha auto may move the outputs; add --alpha auto"),
        (["--only-dead", "--min-dead-share", "-1"], "--min-dead-share: '-1' is not a share"),
        (["--alpha", "auto", "--tolerance", "5"], "--tolerance: 5 could mean 5% or 5 times; write 5% or 0.05"),
        (["--alpha", "auto", "--tolerance", "0"], "--tolerance 0 allows no slope at all"),
        (["--all", "--only-dead"], "--all changes every ReLU, so it goes with none of --only-dead"),
        (["--dead-from", "x.json"], "--dead-from says which units are dead, for --only-dead; add that"),
        (["--only-dead", "--dead-from", "x.json"], "x.json"),
        (["--from-file", "x.yaml", "--alpha", "0.1"], "--from-file says what changes and how"),
        (["--from-file", "x.yaml"], "x.yaml: no such patch file"),
        (["-f", "yaml"], "unknown format 'yaml'; there are table, json, markdown"),
        (["--save-report", "json"], "'json' is not FORMAT=PATH"),
        (["-o", "no/such/fixed.pt"], "the folder 'no/such' does not exist"),
        (["-o", "fixed.safetensors"], "holds weights alone, and a patch leaves those as they are"),
    ],
)
def test_what_does_not_fit_is_refused(model: Path, tmp_path: Path, options: list[str], message: str) -> None:
    run = deadcheck("patch", model, *options, cwd=tmp_path)

    assert run.returncode == 2
    assert message in run.stderr
    assert run.stdout == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.pt", "net.sample.npz"]


def test_nothing_is_written_over_by_accident(model: Path, tmp_path: Path) -> None:
    (tmp_path / "fixed.pt").write_text("mine")
    (tmp_path / "fixed.pt").chmod(0o640)
    first = deadcheck("patch", model, "-o", tmp_path / "fixed.pt")
    over = deadcheck("patch", model, "-o", model, "--force")
    forced = deadcheck("patch", model, "-o", tmp_path / "fixed.pt", "--force")

    assert first.returncode == 2
    assert "exists already; name another file, or write over it with --force" in first.stderr
    assert over.returncode == 2
    assert "is the model itself, which is never written over" in over.stderr
    assert forced.returncode == 0
    assert (tmp_path / "fixed.pt").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--save-report", "json=fixed.pt"), "the patched model and the json report are to go to one file"),
        (("--patch-file", "./fixed.pt"), "the patched model and the patch file are to go to one file"),
        (("--patch-file", "r", "--save-report", "json=r"), "the patch file and the json report are to go to one file"),
        (
            ("--save-report", "json=r", "--save-report", "markdown=r"),
            "the json report and the markdown report are to go",
        ),
    ],
)
def test_one_file_is_not_written_twice(model: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    run = deadcheck("patch", model, "-o", "fixed.pt", *options, cwd=tmp_path)

    assert (run.returncode, run.stdout) == (2, "")
    assert message in run.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.pt", "net.sample.npz"]


@pytest.mark.parametrize(
    "options",
    [
        ("-o", "fixed.pt", "--patch-file", "data.npz"),
        ("-o", "./data.npz"),
        ("-o", "fixed.pt", "--patch-file", "old.yaml", "--from-file", "old.yaml"),
    ],
)
def test_what_is_read_is_not_written_over_by_force(model: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    model.with_name("net.sample.npz").rename(tmp_path / "data.npz")
    deadcheck("patch", model, "--data", "data.npz", "--patch-file", "old.yaml", cwd=tmp_path)
    before = {path.name: digest(path) for path in tmp_path.iterdir()}

    run = deadcheck("patch", model, "--data", "data.npz", *options, "--force", cwd=tmp_path)

    assert (run.returncode, run.stdout) == (2, "")
    assert "is a file that this command reads, and would be lost" in run.stderr
    assert {path.name: digest(path) for path in tmp_path.iterdir()} == before


def test_a_patch_file_is_written_over_by_force(model: Path, tmp_path: Path) -> None:
    for _ in range(2):
        run = deadcheck("patch", model, "-o", "./fixed.pt", "--patch-file", "./p.yaml", "--force", cwd=tmp_path)

        assert run.returncode == 0, run.stderr


def test_without_an_output_the_patch_file_is_written_here(model: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    run = deadcheck("patch", model, cwd=tmp_path / "here")
    again = deadcheck("patch", model, cwd=tmp_path / "here")

    assert run.returncode == 0
    assert [p.name for p in (tmp_path / "here").iterdir()] == ["deadcheck.patch.yaml"]
    assert again.returncode == 2
    assert "deadcheck.patch.yaml: exists already" in again.stderr


def test_without_data_modules_are_changed_and_nothing_is_claimed(model: Path, tmp_path: Path) -> None:
    model.with_name("net.sample.npz").unlink()
    run = deadcheck("patch", model, "--alpha", "0.1", "-o", tmp_path / "fixed.pt")
    fixed = torch.load(tmp_path / "fixed.pt", weights_only=False)

    assert run.returncode == 0
    assert "without data nothing was measured" in run.stdout
    assert [type(module).__name__ for module in fixed] == ["Linear", "LeakyReLU", "Linear", "LeakyReLU", "Linear"]
    for options in (["--only-dead"], ["--min-dead-share", "1%"]):
        dead = deadcheck("patch", model, *options)
        assert dead.returncode == 3
        assert "which units are dead is known from data alone" in dead.stderr
    auto = deadcheck("patch", model, "--alpha", "auto")
    assert auto.returncode == 2
    assert "--alpha auto needs data" in auto.stderr


def test_nothing_to_change_is_said(model: Path, tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(4, 3), nn.GELU()), tmp_path / "gelu.pt")
    data = model.with_name("net.sample.npz")
    none = deadcheck("patch", tmp_path / "gelu.pt", "--data", data, "-f", "json")
    few = deadcheck("patch", model, "--only-dead", "--max-samples", "50")
    chosen = deadcheck("patch", model, "--layers", "nothing.*")

    assert none.returncode == json.loads(none.stdout)["exit_code"] == 3
    assert "the model has no ReLU, so there is nothing to change" in none.stderr
    assert few.returncode == 3
    assert "no unit is dead on this data (1 never fired, but the samples are too few to call them dead)" in few.stderr
    assert chosen.returncode == 3
    assert "the model has no ReLU that the options choose" in chosen.stderr


class Mixed(nn.Module):
    """One ReLU that can be reached, and one that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.rnn = nn.Linear(4, 4), nn.RNN(4, 3, nonlinearity="relu", batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(F.relu(self.fc(x))[:, None])[0]  # type: ignore[no-any-return]


def mixed() -> nn.Module:
    """Build a Mixed."""
    torch.manual_seed(0)
    return Mixed()


def test_what_could_not_be_reached_is_listed_and_exits_with_3(model: Path, tmp_path: Path) -> None:
    torch.save(mixed().state_dict(), tmp_path / "mixed.pt")
    run = deadcheck(
        "patch", tmp_path / "mixed.pt", "--arch", "tests.test_patch_cli:mixed", "--data",
        model.with_name("net.sample.npz"), "--patch-file", tmp_path / "it.yaml",
    )  # fmt: skip

    assert run.returncode == 3
    assert "not changed, though it was meant to be:" in run.stdout
    assert "rnn:relu#1 (relu: nn.RNN computes it inside one operator" in run.stdout
    assert (tmp_path / "it.yaml").exists()


def test_a_class_of_a_script_is_not_saved_whole(model: Path, tmp_path: Path) -> None:
    arch = f"{SAMPLES / 'architectures.py'}:residual_cnn"
    run = deadcheck("patch", SAMPLES / "digits_residual.safetensors", "--arch", arch, "-o", tmp_path / "fixed.pt")

    assert run.returncode == 2
    assert "a whole model names the class" in run.stderr
    assert "write a .pt2, or the patch file alone" in run.stderr


@pytest.mark.parametrize("options", [["--only-dead"], []])
def test_auto_finds_a_slope_within_the_tolerance(options: list[str]) -> None:
    run = deadcheck("patch", SAMPLES / "digits_mlp.pt", "--alpha", "auto", *options, "--dry-run", "-f", "json")
    report = json.loads(run.stdout)
    search = report["search"]

    assert run.returncode == 0
    assert report["drift"]["relative"] <= 0.01
    assert search["alpha"] == report["patch"]["alpha"] == search["steps"][-1]["alpha"]
    assert (search["samples"], search["verified_samples"]) == (450, 225)
    assert 0.005 < search["verified_drift"] < 0.02
    assert any(item["id"] == "small-slope" for item in report["advice"])


def test_a_process_that_is_killed_leaves_the_old_file_or_the_new_one(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "fixed.pt"
    net = torch.load(model, weights_only=False)
    x = data_of(model)
    old, new = net(x), None
    command = [sys.executable, "-m", "deadcheck", "patch", str(model), "--alpha", "0.1", "-o", str(target), "--force"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    whole = time.monotonic() - started
    new = torch.load(target, weights_only=False)(x)
    for share in (0.8, 0.95):
        torch.save(net, target)
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(share * whole)
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = torch.load(target, weights_only=False)(x)

        assert torch.equal(found, old) or torch.equal(found, new)


def test_compare_shows_the_table(model: Path, tmp_path: Path) -> None:
    run = deadcheck("compare", model, "--alpha", "0.1", "--save-report", f"json={tmp_path / 'c.json'}")
    report = json.loads((tmp_path / "c.json").read_text())

    assert (run.returncode, run.stderr) == (0, "")
    for words in ("output for x > 0", "0.1 x", "slope above, at, below 0", "1, 0.1, 0.1", "units that are dead",
                  "1 of 6 (16.7%)", "units without gradient", "mean activation", "largest activation",
                  "cost: 64 samples take", "outputs moved by"):  # fmt: skip
        assert words in run.stdout
    assert (report["relu"]["dead"], report["stand_in"]["dead"]) == (1, 0)
    assert (report["relu"]["units_without_gradient"], report["stand_in"]["units_without_gradient"]) == (1, 0)
    assert [r["output"] for r in report["relu"]["responses"]] == [0, 0, 1]
    assert [r["slope"] for r in report["stand_in"]["responses"]] == pytest.approx([0.1, 0.1, 1])
    assert report["run"]["seconds_relu"] > 0


def test_plot_draws_the_curve_and_writes_svg(model: Path, tmp_path: Path) -> None:
    run = deadcheck("plot", "alpha", model, "--alpha", "0.1", "-o", f"svg={tmp_path / 'a.svg'}")
    net, x = torch.load(model, weights_only=False), data_of(model)
    with torch.no_grad():
        z = torch.cat([net[0](x), net[2](F.relu(net[0](x)))], 1)
    root = ElementTree.fromstring((tmp_path / "a.svg").read_text())

    assert (run.returncode, run.stderr) == (0, "")
    assert f"{float((z < 0).double().mean()):.1%} of the inputs are below 0" in run.stdout
    assert "the inputs of 2 sites over 300 samples" in run.stdout
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert any("leaky_relu(0.1)" in (item.text or "") for item in root.iter("{http://www.w3.org/2000/svg}title"))


def test_plot_refuses_what_it_cannot_draw(model: Path) -> None:
    auto = deadcheck("plot", "alpha", model, "--alpha", "auto")
    none = deadcheck("plot", "alpha", model, "--layers", "no.*")

    assert auto.returncode == 2
    assert "a picture needs a slope" in auto.stderr
    assert none.returncode == 3
    assert "no ReLU or leaky activation that --layers names ran; these sites did: 1, 3" in none.stderr

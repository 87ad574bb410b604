"""No file hurts: none runs code, hangs, takes the memory, or ends in a traceback; each gets its code and one sentence."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from deadcheck.reports import REPORTS
from tests.hostile.cases import ARCH, Case
from tests.hostile.corpus import ALL, named
from tests.hostile.forks import ROOT, Run, Server
from tests.reports.test_every_report import HOSTILE, expect_inert

SECONDS = 10
GIB = 1 << 20  # in KiB


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    held = Server()
    yield held
    held.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with code of the user's own, a good model and a good sample."""
    (tmp_path / "arch.py").write_text(ARCH)
    torch.manual_seed(0)
    torch.save(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), tmp_path / "good.pt")
    np.save(tmp_path / "good.npy", np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32))
    return tmp_path


def made(case: Case, folder: Path) -> Path:
    try:
        return case.make(folder, folder / "marker")
    except OSError as error:
        pytest.skip(f"this system makes no such file ({error})")


def scanned(case: Case, path: Path, folder: Path) -> list[object]:
    """Return the arguments of the scan."""
    if case.as_data:
        return ["scan", folder / "good.pt", "--data", path]
    data = [] if case.own_data else ["--data", folder / "good.npy"]
    if case.as_config:
        return ["scan", folder / "good.pt", *data, "--config", path]
    return ["scan", path, *data, *case.flags]


def check(run: Run, server: Server, *, code: int, says: str, lines: int = 1) -> None:
    """See that a command ended as it must, within its bounds, and said why in one sentence."""
    assert run.code == code, run.err or run.out
    said = run.err if code else run.out
    assert says in said.replace("\n", " "), said
    if code:
        assert run.out == ""
        assert run.err.startswith("deadcheck: error: ")
        assert len(run.err.splitlines()) <= lines, run.err
    else:
        assert run.err == ""
    assert "Traceback" not in run.out + run.err
    assert "internal error" not in run.err
    assert run.seconds < SECONDS
    assert run.peak - server.bare < GIB


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_it_does_no_harm(case: Case, folder: Path, server: Server) -> None:
    path, marker = made(case, folder), folder / "marker"

    run = server.run(scanned(case, path, folder), cwd=folder)

    # Faults of settings, and weights that do not fit, are listed line by line.
    check(run, server, code=case.scan, says=case.says, lines=21 if case.as_config else 5)
    assert not marker.exists()
    if case.as_data or case.as_config:
        return

    run = server.run(["inspect", path], cwd=folder)

    check(run, server, code=case.inspect, says=case.says if case.found is None else case.found)
    assert not marker.exists()
    if "nothing was run; do not load" in run.out:
        assert "nothing to type" in run.out


@pytest.mark.parametrize("case", [case for case in ALL if case.armed], ids=lambda case: case.name)
def test_its_payload_would_run(case: Case, folder: Path, server: Server) -> None:
    path = made(case, folder)

    run = server.loads(case.armed, path)

    assert (folder / "marker").exists(), run.err


@pytest.mark.parametrize("name", ["good.pt", "good.npy", "settings.yaml"])
def test_a_file_that_may_not_be_read_is_said(name: str, folder: Path, server: Server) -> None:
    (folder / "settings.yaml").write_text("scan: {}")
    folder.chmod(0o755)
    (folder / name).chmod(0)

    run = server.run(["scan", "good.pt", "--data", "good.npy", "--config", "settings.yaml"], cwd=folder, as_nobody=True)

    check(run, server, code=2, says="Permission denied")
    assert name in run.err


@pytest.mark.parametrize("flag", ["--data", "--arch", "--config", "-o"])
def test_a_folder_that_may_not_be_entered_is_said(flag: str, folder: Path, server: Server) -> None:
    (folder / "closed").mkdir(mode=0)
    folder.chmod(0o755)
    value = {"--config": "closed/x.yaml", "-o": "json=closed/x.json"}.get(flag, "closed/x.py:name")

    run = server.run(
        ["scan", "good.pt", *([] if flag == "--data" else ["--data", "good.npy"]), flag, value], cwd=folder,
        as_nobody=True,
    )  # fmt: skip

    check(run, server, code=2, says="Permission denied" if flag in ("--config", "-o") else "no such file")


def test_a_folder_that_is_read_only_leaves_the_old_report(folder: Path, server: Server) -> None:
    (folder / "report.json").write_text("old")
    folder.chmod(0o555)

    run = server.run(["scan", "good.pt", "--data", "good.npy", "-o", "json=report.json"], cwd=folder, as_nobody=True)
    folder.chmod(0o755)

    check(run, server, code=2, says="cannot write")
    assert "Permission denied" in run.err
    assert (folder / "report.json").read_text() == "old"


def test_a_link_to_a_model_is_followed(folder: Path, server: Server) -> None:
    (folder / "link.pt").symlink_to("good.pt")

    check(server.run(["scan", "link.pt", "--data", "good.npy"], cwd=folder), server, code=0, says="of 3 units are dead")


@pytest.mark.parametrize("kind", HOSTILE)
def test_names_in_a_file_steer_no_report(kind: str, folder: Path, server: Server) -> None:
    layers = {HOSTILE[kind].replace(".", "_"): nn.Linear(4, 3), "act": nn.ReLU()}
    torch.save(nn.Sequential(OrderedDict(layers)), folder / "names.pt")
    formats = [name for name in REPORTS if name != "table"]
    outputs = [word for name in formats for word in ("-o", f"{name}=report.{name}")]

    run = server.run(["scan", "names.pt", "--data", "good.npy", "-o", "table=-", *outputs], cwd=folder)

    check(run, server, code=0, says="of 3 units are dead")
    for text in (run.out, *((folder / f"report.{name}").read_text() for name in formats)):
        expect_inert(text)
    check(server.run(["inspect", "names.pt"], cwd=folder), server, code=0, says="Sequential")


def test_every_name_is_given_once() -> None:
    assert [name for name, count in Counter(case.name for case in ALL).items() if count > 1] == []


@pytest.mark.parametrize(("name", "code"), [("pt2-sample-pickle", 4), ("zip-bomb", 2)])
def test_the_console_script_does_the_same(name: str, code: int, folder: Path) -> None:
    case = named(name)
    path = made(case, folder)
    script = Path(sys.executable).with_name("deadcheck")

    run = subprocess.run(
        [script, *map(str, scanned(case, path, folder))],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=60,
        check=False,
    )

    assert (run.returncode, run.stdout) == (code, "")
    assert run.stderr.startswith("deadcheck: error: ")
    assert len(run.stderr.splitlines()) == 1
    assert not (folder / "marker").exists()


@pytest.mark.parametrize("variable", ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "FX_GRAPH_SHOW_META"])
def test_a_variable_of_torch_changes_nothing(variable: str, folder: Path, server: Server) -> None:
    """The first makes torch.load run pickles, the second writes notes of a program into its Python."""
    good = ["scan", "good.pt", "--data", "good.npy"]
    wanted = server.run(good, cwd=folder).out
    server = Server({variable: "1"})
    try:
        check(server.run(good, cwd=folder), server, code=0, says=wanted.replace("\n", " "))
        for name in ("pickle-global-in-zip", "legacy-root-pickle", "pt2-sample-pickle", "pt2-stack-trace"):
            case = named(name)
            run = server.run(scanned(case, made(case, folder), folder), cwd=folder)
            check(run, server, code=case.scan, says=case.says)
            assert not (folder / "marker").exists()
    finally:
        server.close()


@pytest.mark.parametrize("name", ["pickle-global-in-zip", "legacy-root-pickle", "pt2-sample-pickle"])
def test_trust_does_not_reach_what_is_denied(name: str, folder: Path, server: Server) -> None:
    case = named(name)

    run = server.run([*scanned(case, made(case, folder), folder), "--trust"], cwd=folder)

    check(run, server, code=4, says="do not load this file")
    assert not (folder / "marker").exists()


def test_a_hanging_or_dying_child_is_noticed(server: Server, tmp_path: Path) -> None:
    """The checks above can fail."""
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(60)\n")
    (tmp_path / "dead.py").write_text("import os\nos.kill(os.getpid(), 11)\n")
    (tmp_path / "large.py").write_text("x = bytearray(2 << 30)\n")

    slow = server.run(["scan", ROOT / "sample_models/digits_mlp.pt", "--data", f"{tmp_path}/slow.py:x"], seconds=1)
    dead = server.run(["scan", ROOT / "sample_models/digits_mlp.pt", "--data", f"{tmp_path}/dead.py:x"])
    large = server.run(["scan", ROOT / "sample_models/digits_mlp.pt", "--data", f"{tmp_path}/large.py:x"])

    assert (slow.code, dead.code) == (-9, -11)
    assert large.peak - server.bare > GIB

"""A scan disturbs nothing of the process around it, and a report never takes the place of what it should not."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deadcheck
from deadcheck.errors import TrustRequired
from tests.hostile.corpus import named

ROOT = Path(__file__).parent.parent.parent
MODEL = ROOT / "sample_models" / "digits_mlp.pt"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


class Harmless:
    """A class that the caller allows torch to load."""


def test_what_the_caller_allows_torch_to_load_stays_allowed(tmp_path: Path) -> None:
    torch.save(net(), tmp_path / "net.pt")
    torch.save({"state_dict": net().state_dict(), "own": Harmless()}, tmp_path / "own.pt")
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([Harmless])
    try:
        held = set(torch.serialization.get_safe_globals())

        deadcheck.scan(tmp_path / "net.pt", torch.randn(8, 4))
        with pytest.raises(TrustRequired):
            deadcheck.scan(named("pickle-global-in-zip").make(tmp_path, tmp_path / "marker"), torch.randn(8, 4))

        assert set(torch.serialization.get_safe_globals()) == held
        assert isinstance(torch.load(tmp_path / "own.pt", weights_only=True)["own"], Harmless)
        assert not (tmp_path / "marker").exists()
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def test_flags_of_torch_are_as_before_after_a_refusal(tmp_path: Path) -> None:
    flags = (
        torch.sparse.check_sparse_tensor_invariants.is_enabled(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
    )
    for name in ("tensor-sparse-index-outside", "pt2-expression-evaluates", "module-pre-hook"):
        path = named(name).make(tmp_path, tmp_path / "marker")
        with pytest.raises(deadcheck.DeadcheckError):
            deadcheck.scan(path, torch.randn(8, 4))

        assert flags == (
            torch.sparse.check_sparse_tensor_invariants.is_enabled(),
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
        )


def test_scans_in_two_threads_do_not_disturb_one_another(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    torch.save(net(), tmp_path / "net.pt")
    torch.save(nn.TransformerEncoder(layer, 1), tmp_path / "encoder.pt")
    inputs = {"net.pt": torch.randn(64, 4), "encoder.pt": torch.randn(64, 5, 4)}
    refused = named("pickle-global-in-zip").make(tmp_path, tmp_path / "marker")
    start = threading.Barrier(3)

    def counts(name: str) -> list[Any]:
        diagnosis = deadcheck.scan(tmp_path / name, inputs[name], batch_size=8)
        return [(site.key, site.stats.zeros.tolist(), site.stats.fired.tolist()) for site in diagnosis]

    def again_and_again(name: str) -> list[Any]:
        start.wait()
        return [counts(name) for _ in range(5)]

    def refusals() -> int:
        start.wait()
        seen = 0
        for _ in range(20):
            try:
                deadcheck.scan(refused, torch.randn(8, 4))
            except TrustRequired:
                seen += 1
        return seen

    wanted = {name: counts(name) for name in inputs}
    with ThreadPoolExecutor(3) as pool:
        first, second = (pool.submit(again_and_again, name) for name in inputs)
        third = pool.submit(refusals)

        assert first.result() == [wanted["net.pt"]] * 5
        assert second.result() == [wanted["encoder.pt"]] * 5
        assert third.result() == 20
    assert not (tmp_path / "marker").exists()


# Output paths.


def deadcheck_scan(*args: object, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deadcheck", "scan", str(MODEL), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=120, **more)


def test_a_missing_folder_is_told_before_any_work(tmp_path: Path) -> None:
    run = deadcheck_scan("-o", f"json={tmp_path}/none/report.json")

    assert (run.returncode, run.stdout) == (2, "")
    assert "does not exist; create it first" in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_report(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("old")

    # No file may grow beyond 1 KiB: the same error as a full disk gives, on any system.
    run = deadcheck_scan("-o", f"json={tmp_path}/report.json", "--per-unit", preexec_fn=_small_files)

    assert run.returncode == 2
    assert "cannot write the json report" in run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert (tmp_path / "report.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def _small_files() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))


def test_a_report_keeps_the_mode_of_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("old")
    (tmp_path / "report.json").chmod(0o640)

    run = deadcheck_scan("-o", f"json={tmp_path}/report.json")

    assert run.returncode == 0
    assert stat.S_IMODE((tmp_path / "report.json").stat().st_mode) == 0o640


def test_the_model_is_no_place_for_its_report(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.save(net(), path)
    before = path.read_bytes()
    command = [sys.executable, "-m", "deadcheck", "scan", path, "--data", "random", "--input-shape", "4"]

    run = subprocess.run([*command, "-o", f"json={path}"], capture_output=True, text=True, cwd=ROOT, check=False)

    assert run.returncode == 2
    assert "is a file that this command reads, and would be lost" in run.stderr
    assert path.read_bytes() == before


def test_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    """As root a renamed file would take the place of /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    held: list[str] = []
    reader = threading.Thread(target=lambda: held.append((tmp_path / "pipe").read_text()))
    reader.start()

    run = deadcheck_scan("-o", f"json={tmp_path}/pipe")
    reader.join(30)

    assert run.returncode == 0, run.stderr
    assert held[0].startswith("{")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_report_killed_half_way_leaves_the_old_one(tmp_path: Path) -> None:
    """The process dies while it writes, at a point that the test chooses: what it wrote to is a temporary file."""
    (tmp_path / "report.json").write_text("old")
    code = (
        "import os, sys\n"
        "before = os.replace\n"
        "os.replace = lambda *args: os.kill(os.getpid(), 9)\n"
        "from deadcheck.cli import main\n"
        f"sys.argv = ['deadcheck', 'scan', {str(MODEL)!r}, '-o', 'json={tmp_path}/report.json']\n"
        "main()\n"
    )

    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)

    assert run.returncode == -9
    assert (tmp_path / "report.json").read_text() == "old"


def test_an_interrupt_ends_with_its_code(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import pathlib, time\npathlib.Path('started').touch()\ntime.sleep(60)\n")
    (tmp_path / "report.json").write_text("old")
    command = [sys.executable, "-m", "deadcheck", "scan", str(MODEL), "--data", "slow.py:x", "-o", "json=report.json"]

    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "started").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)

    assert (process.returncode, out) == (130, "")
    assert err == "deadcheck: error: interrupted; nothing was written\n"
    assert (tmp_path / "report.json").read_text() == "old"

"""A scan in shards, in several processes, or interrupted gives the report of one run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deadcheck import parts, passes, pipeline
from deadcheck.config import ScanSettings
from deadcheck.errors import DataError, UsageError
from deadcheck.formats import open_live
from deadcheck.shard import Shard, shard_of
from deadcheck.sites import Measurement
from tests.test_gate_cli import deadcheck

SETTINGS = ScanSettings(batch_size=8, threads=1)


class Network(nn.Module):
    """A convolution, tokens and a layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.tokens, self.unused = nn.Conv2d(1, 6, 3), nn.Linear(6, 9), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).flatten(2).transpose(1, 2)
        return nn.functional.gelu(self.tokens(x)).mean(1)


DATA = torch.randn(101, 1, 6, 6, generator=torch.Generator().manual_seed(1))  # 13 batches of 8, the last one of 5


def measured(**how: Any) -> Measurement:
    loaded = open_live(Network())
    return pipeline.measure(loaded, pipeline.open_data(DATA, SETTINGS, loaded), SETTINGS, **how)


def assert_same(a: Measurement, b: Measurement) -> None:
    assert [stats.site for stats in a.sites] == [stats.site for stats in b.sites]
    assert all(x.equals(y) for x, y in zip(a.sites, b.sites, strict=True))
    assert (a.data, a.env, a.skipped, a.inputs, a.warnings) == (b.data, b.env, b.skipped, b.inputs, b.warnings)
    assert a.output_constant == b.output_constant


def kept(shard: Shard, folder: Path) -> tuple[str, parts.Kept]:
    path = folder / f"{shard.index}of{shard.count}.part"
    measured(shard=shard, checkpoint=path)
    return str(path), parts.load(path)


@pytest.mark.parametrize("count", [1, 2, 4, 13])
def test_shards_join_to_what_one_run_counts(count: int, tmp_path: Path) -> None:
    shards = [kept(Shard(index, count), tmp_path) for index in range(1, count + 1)]

    joined = parts.merged([*reversed(shards)])

    assert_same(joined, measured())
    assert joined.data.samples == 101
    assert [skip.where for skip in joined.skipped] == ["unused"]


def test_a_shard_without_a_batch_adds_nothing(tmp_path: Path) -> None:
    def shard(index: int) -> tuple[str, parts.Kept]:
        loaded, path = open_live(Network()), tmp_path / f"{index}.part"
        batches = pipeline.open_data(DATA[:8], SETTINGS, loaded)
        own = pipeline.counted(loaded, batches, SETTINGS, shard=Shard(index, 2))
        parts.save(path, parts.Kept(own.scan, Shard(index, 2), True, own.part))
        return path.name, parts.load(path)

    joined = parts.merged([shard(1), shard(2)])

    assert joined.data.samples == 8
    assert [skip.where for skip in joined.skipped] == ["unused"]


def test_what_is_missing_double_unfinished_or_of_another_scan_is_refused(tmp_path: Path) -> None:
    one, two, three = (kept(Shard(index, 3), tmp_path) for index in (1, 2, 3))
    unfinished = parts.Kept(three[1].scan, three[1].shard, False, three[1].part)
    other = parts.Kept(
        parts.Scan(three[1].scan.model, three[1].scan.data, three[1].scan.env, {**three[1].scan.settings, "seed": "7"}),
        three[1].shard, True, three[1].part,
    )  # fmt: skip
    for given, words in (
        ([one, three], "shard 2/3 is missing"),
        ([one, two, three, two], "shard 2/3 was given twice"),
        ([one, two, ("c", unfinished)], "c holds a scan that was not finished"),
        ([one, two, ("c", other)], r'not of one scan: seed is "0" in one and "7" in the other'),
        ([one, two, kept(Shard(1, 2), tmp_path)], "shards of 3 and some of another number"),
    ):
        with pytest.raises(UsageError, match=words):
            parts.merged(given)


@pytest.mark.parametrize("after", [1, 5, 12])
def test_an_interrupted_scan_goes_on_to_the_same_end(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "KEEP_EVERY", 0.0)
    path = tmp_path / "scan.part"

    def stop(done: int, total: int | None) -> None:
        if done >= after * 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(checkpoint=path, progress=stop)
    counted_before = parts.load(path).part.batches if path.exists() else 0
    resumed = measured(checkpoint=path)

    assert counted_before == max(after - 1, 0)
    assert_same(resumed, measured())
    assert parts.load(path).is_complete
    assert_same(measured(checkpoint=path), resumed)  # nothing is left to run


def test_a_scan_side_by_side_is_kept_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "KEEP_EVERY", 0.0)
    monkeypatch.setattr(passes, "LONG", 8)
    monkeypatch.setattr(passes, "SLOW", 0.0)
    monkeypatch.setattr(passes, "GAIN", math.inf)
    path, seen = tmp_path / "scan.part", []

    def watch(done: int, total: int | None) -> None:
        seen.append(done)
        if len(seen) == 9:
            raise KeyboardInterrupt

    settings = ScanSettings(batch_size=8, threads=2)
    loaded = open_live(Network())
    with pytest.raises(KeyboardInterrupt):
        pipeline.measure(loaded, pipeline.open_data(DATA, settings, loaded), settings, watch, checkpoint=path)
    first = parts.load(path)
    resumed = pipeline.measure(loaded, pipeline.open_data(DATA, settings, loaded), settings, checkpoint=path)
    alone = pipeline.measure(loaded, pipeline.open_data(DATA, settings, loaded), settings)

    assert 1 <= first.part.batches < 9
    assert all(a < b for a, b in pairwise(seen))
    assert_same(resumed, alone)


def test_the_file_of_another_scan_is_not_overwritten(tmp_path: Path) -> None:
    name, _ = kept(Shard(1, 2), tmp_path)
    before = Path(name).read_bytes()

    with pytest.raises(UsageError, match="it holds shard 1/2; delete it, or name another"):
        measured(checkpoint=Path(name))

    assert Path(name).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["1of2.part"]


@pytest.mark.parametrize("cut", [0, 4, 8, 200, -1])
def test_a_damaged_file_is_one_sentence(cut: int, tmp_path: Path) -> None:
    name, _ = kept(Shard(1, 1), tmp_path)
    Path(name).write_bytes(Path(name).read_bytes()[:cut])

    with pytest.raises(DataError, match="is no whole file of scan --checkpoint"):
        parts.load(Path(name))


def test_a_bit_that_was_lost_is_no_count(tmp_path: Path) -> None:
    name, _ = kept(Shard(1, 1), tmp_path)
    data = bytearray(Path(name).read_bytes())
    data[-3] ^= 1
    Path(name).write_bytes(data)

    with pytest.raises(DataError, match="its numbers are not those that were written"):
        parts.load(Path(name))


def test_numbers_of_another_shape_are_refused(tmp_path: Path) -> None:
    _, whole = kept(Shard(1, 1), tmp_path)
    (site, stats), *rest = whole.part.sites.items()
    cut = {site: replace(stats, zeros=stats.zeros[1:]), **dict(rest)}
    parts.save(tmp_path / "cut.part", replace(whole, part=replace(whole.part, sites=cut)))

    with pytest.raises(DataError, match="the numbers of :relu#1 are not of 6 units"):
        parts.load(tmp_path / "cut.part")


def test_a_device_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="/dev/zero: is no regular file"):
        parts.load(Path("/dev/zero"))


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/2/3", "-1/2", ""])
def test_a_shard_is_one_of_several(text: str) -> None:
    with pytest.raises(UsageError, match="is not I/N"):
        shard_of(text)


def saved(folder: Path) -> list[str]:
    torch.save(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), nn.GELU()), folder / "m.pt")
    np.save(folder / "m.sample.npy", np.random.default_rng(0).normal(size=(101, 6)).astype(np.float32))
    return ["scan", str(folder / "m.pt"), "--batch-size", "8", "--threads", "1", "--per-unit"]


def report(path: Path) -> str:
    data = json.loads(path.read_text())
    del data["run"]
    return json.dumps(data)


def test_merge_prints_the_report_of_one_run(tmp_path: Path) -> None:
    scan = saved(tmp_path)
    alone = deadcheck(*scan, "-o", f"json={tmp_path / 'one.json'}")
    for index in range(1, 5):
        run = deadcheck(*scan, "--shard", f"{index}/4", "--checkpoint", str(tmp_path / f"{index}.part"))
        assert run.returncode == 0, run.stderr
    files = [str(tmp_path / f"{index}.part") for index in (3, 1, 4, 2)]

    merged = deadcheck("merge", *files, "--per-unit", "-o", f"json={tmp_path / 'four.json'}")

    assert alone.returncode == merged.returncode == 0
    assert report(tmp_path / "one.json") == report(tmp_path / "four.json")
    lost = deadcheck("merge", *files[:3])
    assert lost.returncode == 2
    assert "shard 2/4 is missing; scan it with --shard 2/4" in lost.stderr


def test_a_shard_to_which_no_batch_falls_is_no_failure(tmp_path: Path) -> None:
    scan = [word if word != "8" else "64" for word in saved(tmp_path)]  # two batches
    runs = [
        deadcheck(*scan, "--shard", f"{index}/3", "--checkpoint", str(tmp_path / f"{index}.part"))
        for index in (1, 2, 3)
    ]
    merged = deadcheck("merge", *(str(tmp_path / f"{index}.part") for index in (1, 2, 3)), "--per-unit", "-f", "json")
    alone = deadcheck(*scan, "-f", "json")

    assert [run.returncode for run in (*runs, merged)] == [0, 0, 0, 0]
    assert runs[2].stdout == ""
    assert runs[2].stderr == (
        f"deadcheck: note: no batch falls to shard 3/3, for there are fewer; {tmp_path / '3.part'} is written, "
        "and merge takes it with the others\n"
    )
    whole, joined = (json.loads(run.stdout) for run in (alone, merged))
    assert whole["sites"] == joined["sites"]


def test_a_shard_needs_a_file() -> None:
    run = deadcheck("scan", "x.pt", "--shard", "1/2")

    assert run.returncode == 2
    assert "add --checkpoint FILE, and merge the files" in run.stderr


def test_a_checkpoint_keeps_one_process_and_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = saved(tmp_path)
    part = str(tmp_path / "x.part")
    (tmp_path / "deadcheck.yaml").write_text("models: [m.pt, n.pt]\n")
    several = deadcheck("scan", "--checkpoint", part, cwd=tmp_path)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("TORCHELASTIC_RUN_ID", "x")):
        monkeypatch.setenv(name, value)
    together = deadcheck(*scan, "--checkpoint", part)

    assert (several.returncode, together.returncode) == (2, 2)
    assert "--checkpoint keeps one scan, and there are 2 models; name one" in several.stderr
    assert "--checkpoint keeps one process" in together.stderr
    assert not Path(part).exists()


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_torchrun_gives_the_report_of_one_run(processes: int, tmp_path: Path) -> None:
    scan = saved(tmp_path)
    deadcheck(*scan, "-o", f"json={tmp_path / 'one.json'}")

    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
         "-m", "deadcheck", *scan, "-f", "json"],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip

    (tmp_path / "many.json").write_text(run.stdout)  # one report, from the first process alone
    assert report(tmp_path / "many.json") == report(tmp_path / "one.json")


def test_a_process_that_fails_is_told_by_the_first(tmp_path: Path) -> None:
    scan = saved(tmp_path)
    values = np.load(tmp_path / "m.sample.npy")
    values[20] = np.nan  # in batch 2 of 8 samples, which the second process has
    np.save(tmp_path / "m.sample.npy", values)

    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "deadcheck", *scan],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip

    assert run.returncode == 1  # torchrun's own, whatever its children said
    assert run.stderr.count("the data holds NaN or infinite values") == 1

"""What was counted so far, in a file: an interrupted scan goes on from it, and ``merge`` joins those of shards.

The file is safetensors: integers and sums as arrays, all else as JSON in its head. Reading it runs nothing.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from deadcheck.boundary import InputState, OutputWatch
from deadcheck.errors import DataError, NothingMeasured, UsageError, first_line
from deadcheck.settings import STATS
from deadcheck.shard import Shard
from deadcheck.shares import number_of
from deadcheck.sites import (
    NEVER_RAN,
    SUMS,
    DataIdentity,
    Environment,
    Measurement,
    ModelIdentity,
    Site,
    SiteStats,
    Skipped,
)
from deadcheck.writing import write_safely

_HEAD = "deadcheck"
_VERSION = 1
_ARRAYS = tuple(f.name for f in fields(SiteStats) if f.name not in ("site", "samples", "observations"))
_DTYPES = (np.dtype(np.int64), np.dtype(np.float64))
_NUMBERS = ("count", "low", "high", "total", "squares")

Place = tuple[int, int]
"""First sample of the batch in which a site first ran, and which step of it that was: sites stand in this order."""


@dataclass(frozen=True)
class Part:
    """What was counted of some batches of a scan."""

    sites: Mapping[Site, SiteStats]
    places: Mapping[Site, Place]
    inputs: Mapping[str, InputState]
    outputs: OutputWatch
    samples: int
    batches: int
    """Batches of this shard that were counted, from its first on."""

    skipped: tuple[Skipped, ...]
    warnings: tuple[str, ...]
    unmatched: tuple[str, ...]
    """What the user chose for sites that did not come: a warning, if they came in no part."""

    def plus(self, later: Part) -> Part:
        """Return this part and one of other batches together."""
        sites, places = dict(self.sites), dict(self.places)
        for site, stats in later.sites.items():
            sites[site] = sites[site] + stats if site in sites else stats
            places[site] = min(places.get(site, later.places[site]), later.places[site])
        keys = Counter(site.key for site in sites)
        twice = next((key for key, times in keys.items() if times > 1), None)
        if twice is not None:
            raise UsageError(
                f"{twice} is another site in one part than in the next: the model goes other ways on other samples, "
                "and parts of such a scan cannot be joined; scan it in one run"
            )
        inputs = {name: copy.copy(state) for name, state in self.inputs.items()}
        for name, state in later.inputs.items():
            if name in inputs:
                inputs[name].merge(state)
            else:
                inputs[name] = state
        outputs = copy.deepcopy(self.outputs)
        outputs.merge(later.outputs)
        return Part(
            sites,
            places,
            inputs,
            outputs,
            self.samples + later.samples,
            self.batches + later.batches,
            (*_skipped_in_any(self, later), *_never_ran_in(self, later)),
            tuple(dict.fromkeys((*self.warnings, *later.warnings))),
            tuple(choice for choice in self.unmatched if choice in later.unmatched),
        )


def _skipped_in_any(a: Part, b: Part) -> Iterator[Skipped]:
    """Yield what ran and was not measured in one part or the other, each once."""
    yield from dict.fromkeys(skip for skip in (*a.skipped, *b.skipped) if skip.reason != NEVER_RAN)


def _never_ran_in(a: Part, b: Part) -> Iterator[Skipped]:
    """Yield the modules that ran in neither part: those of one that are, or lie inside, those of the other."""
    mine, others = ([skip for skip in part.skipped if skip.reason == NEVER_RAN] for part in (a, b))
    for skips, against in ((mine, others), (others, mine)):
        for skip in skips:
            outer = [other for other in against if f"{skip.where}.".startswith(f"{other.where}.")]
            if outer and (skips is mine or skip not in mine):
                yield skip


@dataclass(frozen=True)
class Scan:
    """Which scan a part belongs to; parts of one scan agree in all of this."""

    model: ModelIdentity
    data: DataIdentity
    """Its ``samples`` are 0 here."""

    env: Environment
    settings: Mapping[str, str]


@dataclass(frozen=True)
class _Head:
    version: int
    digest: str
    """SHA-256 of all the rest: a bit that was lost must not pass for a count."""

    scan: Scan
    shard: Shard
    is_complete: bool
    samples: int
    batches: int
    sites: tuple[tuple[Site, int, int, Place], ...]
    """Each with its samples and observations."""

    inputs: tuple[tuple[str, tuple[int, ...], str], ...]
    outputs: tuple[tuple[str, ...], int, bool]
    skipped: tuple[Skipped, ...] = ()
    warnings: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kept:
    """A part as it is kept in a file."""

    scan: Scan
    shard: Shard
    is_complete: bool
    part: Part = field(repr=False)


def save(path: Path, kept: Kept) -> None:
    """Write a part, so that at any moment the one before or the whole new one is there."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(packed(kept))

    write_safely(path, write, "the checkpoint")


def load(path: Path) -> Kept:
    """Read a part; DataError if it is none, or damaged."""
    if not path.exists():
        raise DataError(f"{path}: no such file; give what scan --checkpoint wrote")
    if not path.is_file():
        raise DataError(f"{path}: is no regular file; give what scan --checkpoint wrote")
    try:
        return unpacked(path.read_bytes())
    except (OSError, LookupError, TypeError, ValueError, msgspec.MsgspecError, safetensors.SafetensorError) as error:
        raise DataError(f"{path}: is no whole file of scan --checkpoint ({first_line(error)}); scan again") from error


def packed(kept: Kept) -> bytes:
    """Return a part as the bytes of its file."""
    part, arrays = kept.part, dict[str, Tensor]()
    for number, stats in enumerate(part.sites.values()):
        arrays.update({f"site.{number}.{name}": torch.from_numpy(getattr(stats, name)) for name in _ARRAYS})
    for number, state in enumerate(part.inputs.values()):
        numbers = [float(getattr(state, name)) for name in _NUMBERS]
        arrays[f"input.{number}.numbers"] = torch.tensor([*numbers, *state.rest], dtype=torch.float64)
        arrays[f"input.{number}.first"], arrays[f"input.{number}.changed"] = state.first, state.changed
    arrays.update({f"output.{number}": first for number, first in enumerate(part.outputs.first.values())})
    arrays = {name: tensor.detach().cpu().contiguous() for name, tensor in arrays.items()}
    head = _Head(
        _VERSION,
        "",
        kept.scan,
        kept.shard,
        kept.is_complete,
        part.samples,
        part.batches,
        tuple((site, s.samples, s.observations, part.places[site]) for site, s in part.sites.items()),
        tuple((state.name, state.shape, state.dtype) for state in part.inputs.values()),
        (tuple(part.outputs.first), part.outputs.samples, part.outputs.varies),
        part.skipped,
        part.warnings,
        part.unmatched,
    )
    head = replace(head, digest=_digest(head, arrays))
    return safetensors.torch.save(arrays, {_HEAD: msgspec.json.encode(head).decode()})


def unpacked(data: bytes) -> Kept:
    """Read a part from the bytes of its file; ValueError, KeyError, or an error of a library if they are none."""
    size = int.from_bytes(data[:8], "little")
    if not 0 < size <= len(data) - 8:
        raise ValueError("no safetensors file")
    metadata = msgspec.json.decode(data[8 : 8 + size], type=dict[str, Any]).get("__metadata__")
    if not isinstance(metadata, dict) or _HEAD not in metadata:
        raise ValueError("no part of a scan")
    head = msgspec.json.decode(metadata[_HEAD], type=_Head)
    if head.version != _VERSION:
        raise ValueError("written by another version of deadcheck")
    if head.scan.env.stats not in STATS:
        raise ValueError(f"it measured {head.scan.env.stats!r}, which there is not")
    arrays = safetensors.torch.load(data)
    if _digest(replace(head, digest=""), arrays) != head.digest:
        raise ValueError("its numbers are not those that were written")
    return Kept(head.scan, head.shard, head.is_complete, _part(head, arrays))


def _digest(head: _Head, arrays: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(msgspec.json.encode(head))
    for name in sorted(arrays):
        tensor = arrays[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _part(head: _Head, arrays: Mapping[str, Tensor]) -> Part:
    sites, places, inputs, outputs = {}, {}, {}, OutputWatch()
    for number, (site, samples, observations, place) in enumerate(head.sites):
        own = {name: arrays[f"site.{number}.{name}"].numpy() for name in _ARRAYS}
        shapes = {name: (len(SUMS), site.units) if name == "rest" else (site.units,) for name in _ARRAYS}
        if any(own[name].shape != shapes[name] or own[name].dtype not in _DTYPES for name in _ARRAYS):
            raise ValueError(f"the numbers of {site.key} are not of {site.units} units")
        sites[site], places[site] = SiteStats(site, samples, observations, **own), place
    for number, (name, shape, dtype) in enumerate(head.inputs):
        numbers = arrays[f"input.{number}.numbers"].tolist()
        first, changed = arrays[f"input.{number}.first"], arrays[f"input.{number}.changed"]
        if (tuple(first.shape), changed.shape, changed.dtype) != (shape, first.shape, torch.bool):
            raise ValueError(f"the first sample of {name} has another shape")
        state = InputState(name, shape, dtype, first, changed)
        state.count, state.low, state.high, state.total, state.squares = (int(numbers[0]), *numbers[1:5])
        state.rest = (numbers[5], numbers[6])
        inputs[name] = state
    names, outputs.samples, outputs.varies = head.outputs
    outputs.first = {name: arrays[f"output.{number}"] for number, name in enumerate(names)}
    counted = head.samples, head.batches
    return Part(sites, places, inputs, outputs, *counted, head.skipped, head.warnings, head.unmatched)


def merged(kept: Sequence[tuple[str, Kept]]) -> Measurement:
    """Join the shards of one scan; UsageError where one is missing, twice there, unfinished, or of another scan."""
    name, first = kept[0]
    for other_name, other in kept[1:]:
        differing = differences(first.scan, other.scan)
        if differing:
            raise UsageError(f"{name} and {other_name} are not of one scan: {differing[0]}; join shards of one scan")
    count = first.shard.count
    if any(other.shard.count != count for _, other in kept):
        raise UsageError(f"some parts are shards of {count} and some of another number; join shards of one scan")
    unfinished = next((name for name, other in kept if not other.is_complete), None)
    if unfinished is not None:
        raise UsageError(f"{unfinished} holds a scan that was not finished; run it again with the same --checkpoint")
    numbers = [other.shard.index for _, other in kept]
    twice = sorted({number for number in numbers if numbers.count(number) > 1})
    missing = sorted({*range(1, count + 1)} - {*numbers})
    if twice:
        raise UsageError(f"shard {twice[0]}/{count} was given twice; give each once")
    if missing:
        listed = ", ".join(f"{number}/{count}" for number in missing)
        verb = "is" if len(missing) == 1 else "are"
        raise UsageError(f"shard {listed} {verb} missing; scan it with --shard {missing[0]}/{count} --checkpoint FILE")
    parts = [other.part for _, other in sorted(kept, key=lambda pair: pair[1].shard.index)]
    total = parts[0]
    for part in parts[1:]:
        total = total.plus(part)
    return measurement(first.scan, total)


def differences(a: Scan, b: Scan) -> list[str]:
    """Say in what two scans are not the same."""
    pairs = [
        ("the model", a.model.sha256 or a.model.path, b.model.sha256 or b.model.path),
        ("how the model was read", a.model.arch or a.model.read, b.model.arch or b.model.read),
        ("the data", a.data.sha256 or a.data.source, b.data.sha256 or b.data.source),
        ("torch", a.env.torch, b.env.torch),
        ("dtype", a.env.dtype, b.env.dtype),
        *((name, a.settings.get(name), b.settings.get(name)) for name in {**a.settings, **b.settings}),
    ]
    return [f"{what} is {json.dumps(x)} in one and {json.dumps(y)} in the other" for what, x, y in pairs if x != y]


def measurement(scan: Scan, part: Part) -> Measurement:
    """Return what a whole scan saw; NothingMeasured if that is nothing."""
    if not part.samples:
        raise NothingMeasured(f"the data ({scan.data.source}) holds no samples, so nothing was measured; give it some")
    if not part.sites:
        raise NothingMeasured(_no_activation(part.samples, part.skipped))
    sites = tuple(part.sites[site] for site in sorted(part.sites, key=lambda site: part.places[site]))
    if scan.env.stats == "verdict":  # a shard may have asked a unit that another knew to be live
        sites = tuple(stats.without_settled() for stats in sites)
    return Measurement(
        model=scan.model,
        data=replace(scan.data, samples=part.samples),
        env=scan.env,
        sites=sites,
        skipped=part.skipped,
        inputs=tuple(state.summary() for state in part.inputs.values()),
        warnings=(*part.warnings, *part.unmatched, *_guesses(sites)),
        output_constant=part.outputs.constant,
    )


def _guesses(stats: Sequence[SiteStats]) -> Iterator[str]:
    guessed = [s.site for s in stats if s.site.axis_from == "guess"]
    for axis in sorted({site.axis for site in guessed}):
        keys = [site.key for site in guessed if site.axis == axis]
        yield (
            f"{_listed(keys)}: nothing told which axis holds the units; axis {axis} was guessed "
            f"(set it with --units '{keys[0]}=AXIS')"
        )
    untold = [s.site.key for s in stats if s.site.samples_from == "call"]
    if untold:
        yield (
            f"{_listed(untold)}: values could not be told apart by sample, so each batch counts as one sample "
            "(--batch-size 1 makes that exact where the first axis of the data counts samples)"
        )


def _listed(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _no_activation(samples: int, skipped: Sequence[Skipped]) -> str:
    seen = ", ".join(sorted({item.what for item in skipped})[:5])
    hint = f"; not measured: {seen}" if seen else ""
    ran = f"no activation ran in {number_of(samples, 'sample')}, so there is nothing to judge"
    return f"{ran}{hint}; is this the model you meant?"

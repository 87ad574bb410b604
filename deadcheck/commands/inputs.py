"""What a command line and a configuration name: models, how to read them, settings."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

from deadcheck.config import Config, ModelEntry, load_config
from deadcheck.errors import UsageError
from deadcheck.reports.locations import relative


@dataclass(frozen=True)
class Target:
    """One model to work on."""

    path: str
    config: Config
    """Settings for this model: its own data, where its entry names some."""

    arch: str | None = None
    arch_args: Mapping[str, object] = field(default_factory=dict)
    key: str | None = None


def targets_of(models: Sequence[Path], config: Config) -> list[Target]:
    """Return the models that were named, or else those of the configuration, each with what its entry says."""
    if models:
        return [_target(str(path), entry_for(str(path), config), config) for path in models]
    if not config.models:
        raise UsageError(
            "no model was named; name one, or have 'deadcheck init' write a deadcheck.yaml that names yours"
        )
    targets = []
    for entry in config.models:
        paths = sorted(glob.glob(entry.path, recursive=True)) if glob.has_magic(entry.path) else [entry.path]
        if not paths:
            raise UsageError(f"models: the pattern {entry.path!r} fits no file; correct it, or train a model first")
        targets += [_target(path, entry, config) for path in paths]
    return targets


def entry_for(path: str, config: Config) -> ModelEntry | None:
    """Return the entry of the configuration that speaks of a model."""
    return next((e for e in config.models if fnmatchcase(relative(path), relative(e.path))), None)


def baseline_for(model: str | None, config: Config) -> Path | None:
    """Return the baseline that the configuration names for a model; ``{name}`` in it is the model's own name."""
    entry = None if model is None else entry_for(model, config)
    if model is None or entry is None or entry.baseline is None:
        return None
    return Path(entry.baseline.replace("{name}", Path(model).stem))


def _target(path: str, entry: ModelEntry | None, config: Config) -> Target:
    if entry is None:
        return Target(path, config)
    if entry.data is not None and config.origins.get("scan.data") != "--data":
        config = replace(config, scan=replace(config.scan, data=entry.data))
    return Target(path, config, entry.arch, entry.arch_args, entry.key)


def settings(path: Path | None, flags: Mapping[str, object]) -> Config:
    """Return the configuration with the flags that were given laid over it."""
    return load_config(path, {name: value for name, value in flags.items() if value is not None})


def keywords(pairs: Sequence[str]) -> dict[str, object]:
    """Read ``name=value`` arguments of a factory, values as YAML."""
    import yaml

    out: dict[str, object] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"--arch-arg {pair!r} is not name=value; write --arch-arg width=128")
        try:
            out[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"--arch-arg {pair!r}: the value cannot be read; quote it as YAML would") from error
    return out


def unit_axes(pairs: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """Read ``PATTERN=AXIS`` pairs."""
    out = []
    for pair in pairs:
        pattern, equals, axis = pair.rpartition("=")
        if not equals or not axis.lstrip("-").isdigit():
            raise UsageError(f"--units {pair!r} is not PATTERN=AXIS; write --units 'encoder.*=-1'")
        out.append((pattern, int(axis)))
    return tuple(out)


def sizes(pairs: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Read ``DEVICE=SIZE`` pairs."""
    for pair in pairs:
        if not all(pair.partition("=")):
            raise UsageError(f"--max-memory {pair!r} is not DEVICE=SIZE; write --max-memory 0=20GiB or cpu=60GiB")
    return tuple((device, size) for device, _, size in (pair.partition("=") for pair in pairs))


def shape_of(text: str | None) -> tuple[int, ...] | None:
    """Read the shape of one sample."""
    if text is None:
        return None
    parts = text.replace("x", ",").split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--input-shape {text!r} is not a shape; write --input-shape 3,32,32 (without the batch axis)")
    return tuple(int(part) for part in parts)


def refuse_measuring(flags: Mapping[str, object]) -> None:
    """Refuse flags, by setting or name, that say how to measure: a finished report stays as it is."""
    given = [name for name, value in flags.items() if value not in (None, [], ()) and value is not False]
    measuring = [name for name in given if not name.startswith("policy.")]
    if measuring:
        flag = "--" + measuring[0].removeprefix("scan.").replace("_", "-")
        raise UsageError(
            f"{flag} says how to measure a model, and a report (--report) is measured; leave {flag} out, or name the "
            "model in the place of the report"
        )

"""Configuration files and flags: what they set, and every fault by its text."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deadcheck.config import (
    FIELDS,
    PRESETS,
    Config,
    ModelEntry,
    ScanSettings,
    Thresholds,
    find_config,
    load_config,
    preset_file,
)
from deadcheck.errors import ConfigError
from deadcheck.kinds import Kind, Rows, Section
from deadcheck.policy import Compare, Ignore, LayerPolicy, Level, Policy
from deadcheck.settings import SETTINGS, json_schema

DEFAULTS = Path(__file__).parent.parent / "configs" / "default.yaml"

Load = Callable[..., Config]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Write a file's text and read it as a configuration."""

    def _load(text: str, flags: dict[str, object] | None = None) -> Config:
        path = tmp_path / "deadcheck.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, flags)

    return _load


def faults(load: Load, text: str) -> list[str]:
    """Return the faults of a file, with the folder cut from each."""
    with pytest.raises(ConfigError) as caught:
        load(text)
    folder, _, _ = str(caught.value).partition("deadcheck.yaml:")
    return [line.removeprefix(folder) for line in str(caught.value).splitlines()]


# What a file sets.


@pytest.mark.parametrize("text", ["", "\n", "# nothing yet\n", "scan:\n", "scan: {}\nthresholds: null\n", "\ufeff"])
def test_an_empty_file_changes_nothing(load: Load, text: str) -> None:
    assert load(text) == Config()
    assert load(text).origins == {}


def test_the_file_of_defaults_holds_the_defaults() -> None:
    config = load_config(DEFAULTS)

    assert config == Config()
    assert set(config.origins) == {f"{section}.{key}" for section, keys in FIELDS.items() for key in keys}


def test_every_field_can_be_set_by_a_file() -> None:
    assert {
        "scan": tuple(f.name for f in fields(ScanSettings)),
        "thresholds": tuple(f.name for f in fields(Thresholds)),
        "policy": tuple(f.name for f in fields(Policy))[:-2],  # the last two are thresholds
    } == FIELDS


def test_all_settings_at_once(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load(
        """
        scan:
          data: loaders.py:make
          batch_size: 8
          max_samples: 100
          workers: 2
          unpack: kwargs
          input_shape: [3, 32, 32]
          allow_nonfinite: true
          device: cuda:1
          device_map: sequential
          max_memory: {0: 20GiB, cpu: 1.5 GB}
          dtype: float64
          autocast: bfloat16
          threads: 5
          seed: 3
          gates: on
          units: {'encoder.*': -1, 'conv': 1}
          call: encode
        thresholds:
          delta: 1%
          p_dead: 0.5%
          p_rare: 0.02
          tau: 0
          taus: [0%, 10 %, 0.5, 1]
          shallow: -1
          deep: -3.5
          explosion_growth: 1.0e+2
          warn_layer_dead: 100%
        """
    )

    assert config.scan == ScanSettings(
        "loaders.py:make", 8, 100, 2, "kwargs", (3, 32, 32), True, "cuda:1",
        "sequential", (("0", "20GiB"), ("cpu", "1.5 GB")), "float64", "bfloat16", 5, 3, True,
        (("encoder.*", -1), ("conv", 1)), "encode",
    )  # fmt: skip
    assert config.thresholds == Thresholds(0.01, 0.005, 0.02, 0.0, (0.0, 0.1, 0.5, 1.0), -1.0, -3.5, 100.0, 1.0)


def test_a_shape_may_be_one_number(load: Load) -> None:
    assert load("scan: {input_shape: 10}").scan.input_shape == (10,)


def test_the_first_pattern_of_units_stays_first(load: Load) -> None:
    assert load("scan: {units: {z: 1, a: 2}}").scan.units == (("z", 1), ("a", 2))


# Flags, and where each value came from.


def test_flags_beat_the_file(load: Load) -> None:
    config = load("scan:\n  batch_size: 8\n  seed: 1\n", {"scan.batch_size": 16, "thresholds.tau": 0.5})

    assert (config.scan.batch_size, config.scan.seed, config.thresholds.tau) == (16, 1, 0.5)
    assert config.origins == {
        "scan.batch_size": "--batch-size",
        "scan.seed": "deadcheck.yaml:3",
        "thresholds.tau": "--tau",
    }


def test_an_origin_is_the_line_of_the_value(load: Load) -> None:
    text = "\n# comment\nscan:\n  seed:\n    5\nthresholds: {tau: 1%,\n  delta: 2%}\n"

    assert load(text).origins == {
        "scan.seed": "deadcheck.yaml:5",
        "thresholds.tau": "deadcheck.yaml:6",
        "thresholds.delta": "deadcheck.yaml:7",
    }


def test_origins_do_not_make_settings_differ(load: Load) -> None:
    assert load("scan: {seed: 0}") == Config()


def test_every_wrong_flag_is_listed(load: Load) -> None:
    with pytest.raises(ConfigError) as caught:
        load("", {"scan.batch_size": 0, "thresholds.p_dead": 5, "scan.seed": 1})

    assert str(caught.value).splitlines() == [
        "--batch-size: 0 is not a whole number of at least 1",
        "--p-dead: 5 could mean 5% or 5 times; write 5% or 0.05",
    ]


# Which file.


def test_the_nearest_file_upward_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "deadcheck.yaml").write_text("scan: {seed: 1}")
    monkeypatch.chdir(inner)
    assert load_config().scan.seed == 1

    (tmp_path / "a" / "deadcheck.yaml").write_text("scan: {seed: 2}")
    assert load_config().scan.seed == 2


def test_a_folder_that_is_closed_to_the_user_holds_no_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deadcheck.yaml").touch()
    stat = os.stat

    def closed(path: Any, **more: Any) -> os.stat_result:  # to root no folder is
        if Path(path).parent == tmp_path:
            raise PermissionError(13, "Permission denied")
        return stat(path, **more)

    monkeypatch.setattr(os, "stat", closed)

    assert find_config(tmp_path) is None


def test_the_search_ends_at_the_repository(tmp_path: Path) -> None:
    (tmp_path / "deadcheck.yaml").write_text("scan: {seed: 1}")
    inner = tmp_path / "repository" / "folder"
    inner.mkdir(parents=True)
    assert find_config(inner) == tmp_path / "deadcheck.yaml"

    (tmp_path / "repository" / ".git").mkdir()
    assert find_config(inner) is None

    (tmp_path / "repository" / "deadcheck.yaml").write_text("")
    assert find_config(inner) == tmp_path / "repository" / "deadcheck.yaml"


def test_without_a_file_the_defaults_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.chdir(tmp_path)

    assert load_config() == Config()


# Faults.

ALL_SCAN = ", ".join(FIELDS["scan"])


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        # Names.
        ("scan: {}\nthreshold:\n  tau: 1%", "2: unknown key threshold; did you mean 'thresholds'?"),
        ("zzz: 1", "1: unknown key zzz; there are extends, models, scan, thresholds, policy"),
        ("scan:\n  batchsize: 3", "2: unknown key scan.batchsize; did you mean 'batch_size'?"),
        ("scan:\n  zzz: 3", f"2: unknown key scan.zzz; there are {ALL_SCAN}"),
        ("scan:\n  tau: 1%", f"2: unknown key scan.tau; there are {ALL_SCAN}"),
        ("scan:\n  on: 1", f"2: unknown key scan.on; there are {ALL_SCAN}"),
        ("no: 1", "1: unknown key no; there are extends, models, scan, thresholds, policy"),
        ("1: 1", "1: unknown key 1; there are extends, models, scan, thresholds, policy"),
        ("? [scan]\n: 1", "1: unknown key ?; there are extends, models, scan, thresholds, policy"),
        ("scan:\n  <<: {seed: 1}", f"2: unknown key scan.<<; there are {ALL_SCAN}"),
        ("scan:\n  seed: 1\n  gates: true\n  seed: 2", "4: scan.seed stands twice; keep one"),
        ("scan: {seed: 1}\nthresholds:\nscan: {gates: true}", "3: scan stands twice; keep one"),
        ("scan:\n  units: {a: 1, a: 2}", "2: scan.units: a key stands twice; keep one"),
        # Trust.
        ("trust: true", "1: trust: trust is given on the command line only"),
        ("scan:\n  allow_class: [a.B]", "2: allow_class: trust is given on the command line only"),
        ("\nallow-class: a.B", "2: allow-class: trust is given on the command line only"),
        # Structure.
        ("- scan", "1: the file must hold names and values, as 'name: value'"),
        ("just text", "1: the file must hold names and values, as 'name: value'"),
        ("scan: 5", "1: scan must hold names and values, as 'name: value'"),
        ("scan:\n  - seed: 1", "2: scan must hold names and values, as 'name: value'"),
        # Aliases, anchors and tags.
        (
            "scan:\n  data: &d x.npz\n  device: *d",
            "2: scan.device: aliases (*name) are not allowed; write the value out",
        ),
        (
            "thresholds:\n  taus: &t [1%, *t]",
            "2: thresholds.taus: aliases (*name) are not allowed; write the value out",
        ),
        (
            "scan:\n  data: !!python/object/apply:os.system [id]",
            "2: scan.data: the tag tag:yaml.org,2002:python/object/apply:os.system is not allowed; write a plain value",
        ),
        (
            "scan:\n  data: !!binary aGk=",
            "2: scan.data: the tag tag:yaml.org,2002:binary is not allowed; write a plain value",
        ),
        ("scan: {data: !own x}", "1: scan.data: the tag !own is not allowed; write a plain value"),
        (
            "scan: {data: 2020-01-01}",
            "1: scan.data: the tag tag:yaml.org,2002:timestamp is not allowed; write a plain value",
        ),
        ("scan: {units: " + "[" * 30 + "]" * 30 + "}", "1: scan.units: nested too deeply"),
        # Types.
        ("scan: {data: 5}", "1: scan.data: 5 is not text; put it in quotes"),
        ("scan: {device: 0}", "1: scan.device: 0 is not text; put it in quotes"),
        ("scan: {call: null}", "1: scan.call: None is not text; put it in quotes"),
        ("scan: {call: no}", "1: scan.call: False is not text; put it in quotes"),
        ("scan: {gates: 1}", "1: scan.gates: 1 is not true or false"),
        ("scan: {gates: 'on'}", "1: scan.gates: 'on' is not true or false"),
        ("scan: {batch_size: 8.0}", "1: scan.batch_size: 8.0 is not a whole number of at least 1"),
        ("scan: {batch_size: yes}", "1: scan.batch_size: True is not a whole number of at least 1"),
        ("scan: {batch_size: '8'}", "1: scan.batch_size: '8' is not a whole number of at least 1"),
        ("scan: {batch_size: null}", "1: scan.batch_size: None is not a whole number of at least 1"),
        ("scan: {input_shape: [3, x]}", "1: scan.input_shape: 'x' is not a whole number of at least 1"),
        (
            "scan: {units: [1]}",
            "1: scan.units: [1] is not a mapping of patterns to axes; write it as {'encoder.*': -1}",
        ),
        (
            "scan: {units: {a: true}}",
            "1: scan.units: {'a': True} is not a mapping of patterns to axes; write it as {'encoder.*': -1}",
        ),
        ("scan: {unpack: [auto]}", "1: scan.unpack: ['auto'] is not one of auto, first, args, kwargs"),
        ("scan: {unpack: all}", "1: scan.unpack: 'all' is not one of auto, first, args, kwargs"),
        ("thresholds: {taus: 5%}", "1: thresholds.taus: '5%' is not a list; write it as [0.0, 0.025]"),
        ("thresholds: {shallow: deep}", "1: thresholds.shallow: 'deep' is not a number"),
        ("thresholds: {shallow: true}", "1: thresholds.shallow: True is not a number"),
        ("thresholds: {tau: null}", "1: thresholds.tau: None is not a number"),
        ("thresholds: {deep: .nan}", "1: thresholds.deep: nan is not a number"),
        ("thresholds: {deep: -.inf}", "1: thresholds.deep: -inf is not a number"),
        (
            "thresholds:\n\n  p_dead: 1e-3",
            "3: thresholds.p_dead: '1e-3' is a string in YAML 1.1; write a dot and a sign, as 1.0e-3",
        ),
        (
            "thresholds: {explosion_growth: 1.5e3}",
            "1: thresholds.explosion_growth: '1.5e3' is a string in YAML 1.1; write a dot and a sign, as 1.0e-3",
        ),
        # Ranges.
        ("scan: {batch_size: 0}", "1: scan.batch_size: 0 is not a whole number of at least 1"),
        ("scan: {max_samples: 0}", "1: scan.max_samples: 0 is not a whole number of at least 1"),
        ("scan: {seed: -1}", "1: scan.seed: -1 is not a whole number of at least 0"),
        ("scan: {input_shape: [3, 0]}", "1: scan.input_shape: 0 is not a whole number of at least 1"),
        ("thresholds: {tau: 5}", "1: thresholds.tau: 5 could mean 5% or 5 times; write 5% or 0.05"),
        ("thresholds: {tau: 1.5}", "1: thresholds.tau: 1.5 is not a share; write it as 5% or 0.05"),
        ("thresholds: {tau: -0.1}", "1: thresholds.tau: -0.1 is not a share; write it as 5% or 0.05"),
        ("thresholds: {taus: [0, 2.0]}", "1: thresholds.taus: 2.0 is not a share; write it as 5% or 0.05"),
        ("thresholds: {delta: 0}", "1: thresholds.delta: 0 must be above 0 and below 1"),
        ("thresholds: {p_dead: 100%}", "1: thresholds.p_dead: '100%' must be above 0 and below 1"),
        # YAML itself.
        ("scan:\n  seed: [1", "2: not valid YAML: expected ',' or ']', but got '<stream end>'; correct the line"),
        ("scan:\n\tseed: 1", "2: not valid YAML: found character '\\t' that cannot start any token; correct the line"),
        ("scan: {}\n---\nscan: {}", "2: not valid YAML: but found another document; correct the line"),
        ("scan: *nowhere", "1: not valid YAML: found undefined alias 'nowhere'; correct the line"),
    ],
)
def test_a_fault_is_told_with_its_line(load: Load, text: str, fault: str) -> None:
    assert faults(load, text) == [f"deadcheck.yaml:{fault}"]


def test_all_faults_of_a_file_are_listed(load: Load) -> None:
    text = "scan:\n  batch_size: 0\n  sead: 1\n  gates: maybe\nbogus: 1\nthresholds:\n  tau: 1e-2\n  tau: 1%\n"

    assert faults(load, text) == [
        "deadcheck.yaml:2: scan.batch_size: 0 is not a whole number of at least 1",
        "deadcheck.yaml:3: unknown key scan.sead; did you mean 'seed'?",
        "deadcheck.yaml:4: scan.gates: 'maybe' is not true or false",
        "deadcheck.yaml:5: unknown key bogus; there are extends, models, scan, thresholds, policy",
        "deadcheck.yaml:7: thresholds.tau: '1e-2' is a string in YAML 1.1; write a dot and a sign, as 1.0e-3",
        "deadcheck.yaml:8: thresholds.tau stands twice; keep one",
    ]


def test_a_fault_names_the_whole_path(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("scan: {seed: x}")

    with pytest.raises(ConfigError) as caught:
        load_config(path)

    assert str(caught.value) == f"{path}:1: scan.seed: 'x' is not a whole number of at least 0"


def test_an_anchor_bomb_is_not_unfolded(load: Load) -> None:
    levels = [f"  - &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40)]
    text = "\n".join(["thresholds:", "  taus:", "  - &a0 [1, 2]", *levels])

    assert faults(load, text) == [
        "deadcheck.yaml:3: thresholds.taus: aliases (*name) are not allowed; write the value out"
    ]


def test_a_tag_runs_nothing(load: Load, tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    faults(load, f"scan: {{data: !!python/object/apply:pathlib.Path.touch [!!python/object:pathlib.Path '{marker}']}}")
    faults(load, f"scan: {{data: !!python/object/apply:os.mkdir ['{marker}']}}")

    assert not marker.exists()


def test_a_value_nested_ten_thousand_deep(load: Load, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load("scan: " + "[" * 10_000 + "]" * 10_000)

    assert str(caught.value) == (f"{tmp_path / 'deadcheck.yaml'}: nested too deeply; a configuration has a few levels")


def test_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "gone.yaml"

    with pytest.raises(ConfigError) as caught:
        load_config(path)

    assert str(caught.value) == f"{path}: no such configuration file; check the path given with --config"


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such configuration file; check the path given with --config$"):
        load_config(tmp_path)


@pytest.mark.parametrize(("size", "is_read"), [(256 << 10, True), ((256 << 10) + 1, False), (2 << 20, False)])
def test_a_file_larger_than_256_kib(tmp_path: Path, size: int, is_read: bool) -> None:
    path = tmp_path / "large.yaml"
    path.write_bytes(b"#" * size)

    if is_read:
        assert load_config(path) == Config()
    else:
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert str(caught.value) == f"{path}: larger than 256 KiB, which no configuration is; check the path"


@pytest.mark.parametrize("content", [b"scan: {data: \xff}", "scan: {seed: 1}".encode("utf-16"), b"\x80\x02}q\x00."])
def test_a_file_that_is_not_utf_8(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "deadcheck.yaml"
    path.write_bytes(content)

    with pytest.raises(ConfigError) as caught:
        load_config(path)

    assert str(caught.value).startswith(f"{path}: cannot be read as text ('utf-8' codec can't decode byte")
    assert str(caught.value).endswith("; check the file")


def test_control_characters(load: Load) -> None:
    assert faults(load, "scan: \x01")[0].startswith("deadcheck.yaml:1: not valid YAML: unacceptable character #x0001")


def test_samples_needed_follow_the_thresholds(load: Load) -> None:
    # ln 0.1 / ln 0.9 = 21.85
    assert load("thresholds: {delta: 10%, p_dead: 10%}").thresholds.n_star == 22


# Policy, models and presets.

POLICY = """
extends: ci-strict
models:
  - nets/*.pt
  - path: other.safetensors
    arch: build.py:net
    arch_args: {width: 3}
    key: model
    data: loaders:make
    baseline: baselines/{name}.json
policy:
  max_layer_dead: 7%
  max_new_dead: off
  compare: rates
  min_samples: 100
  rules: {saturated: off, DC006: warn}
  layers:
    - {match: 'head.*', level: off}
    - match: '*'
      max_worse: 0.5%
  ignores:
    - rule: layer-dead
      layer: aux.*
      reason: trained later
      until: 2030-12-31
    - {rule: DC001, reason: known, until: "2031-01-01"}
"""


def test_a_whole_policy(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load(POLICY)

    assert config.models == (
        ModelEntry("nets/*.pt"),
        ModelEntry("other.safetensors", "build.py:net", {"width": 3}, "model", "loaders:make", "baselines/{name}.json"),
    )
    assert config.policy == Policy(
        max_layer_dead=Fraction(7, 100),
        max_model_dead=Fraction(1, 2),  # of ci-strict
        max_new_dead=None,
        max_worse=Fraction(1, 100),
        compare=Compare.RATES,
        min_samples=100,
        rules={"DC009": Level.OFF, "DC006": Level.WARN},  # a setting is replaced as a whole
        layers=(LayerPolicy("head.*", Level.OFF), LayerPolicy("*", max_worse=Fraction(5, 1000))),
        ignores=(
            Ignore("DC003", "trained later", "aux.*", until=datetime.date(2030, 12, 31)),
            Ignore("DC001", "known", until=datetime.date(2031, 1, 1)),
        ),
    )
    assert config.origins["policy.max_layer_dead"] == "deadcheck.yaml:12"
    assert config.origins["policy.max_model_dead"].startswith("ci-strict.yaml:")
    assert config.origins["scan.batch_size"].startswith("default.yaml:")


def test_the_gate_warns_where_the_scan_does(load: Load) -> None:
    policy = load("thresholds: {warn_layer_dead: 0.07, explosion_growth: 5}").policy

    assert (policy.warn_layer_dead, policy.explosion_growth) == (Fraction(7, 100), 5.0)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("policy: {max_layer_dead: 5}", "1: policy.max_layer_dead: 5 could mean 5% or 5 times; write 5% or 0.05"),
        ("policy: {max_layer_dead: 1}", "1: policy.max_layer_dead: 1 could mean 1% or 1 times; write 1% or 0.01"),
        ("policy: {max_layer_dead: '5'}", "1: policy.max_layer_dead: 5 could mean 5% or 5 times; write 5% or 0.05"),
        ("policy: {max_worse: on}", "1: policy.max_worse: True is not a share; write it as 5%, 0.05 or off"),
        ("policy: {max_worse: 101%}", "1: policy.max_worse: '101%' is not a share; write it as 5% or 0.05"),
        ("policy: {max_worse: -1}", "1: policy.max_worse: '-1' is not a share; write it as 5% or 0.05"),
        ("policy: {compare: both}", "1: policy.compare: 'both' is not one of units, rates"),
        ("policy: {max_dead: 5%}", "1: unknown key policy.max_dead; did you mean 'max_new_dead'?"),
        ("policy: {rules: {DC03x: warn}}", "1: policy.rules: there is no rule 'DC03x'; did you mean DC003?"),
        ("policy: {rules: {DC003: maybe}}", "1: policy.rules: 'maybe' is not one of error, warn, off"),
        (
            "policy: {rules: {DC010: off}}",
            "1: policy.rules: too-few-samples has no level: without it nothing could be judged",
        ),
        ("policy:\n  layers: {match: x}", "2: policy.layers: must be a list; begin each entry with a dash"),
        ("policy:\n  layers:\n    - level: off", "3: policy.layers[0] needs match; add 'match: ...'"),
        (
            "policy:\n  layers:\n    - match: a\n      levl: off",
            "4: unknown key policy.layers[0].levl; did you mean 'level'?",
        ),
        ("policy: {layers: [{match: a, level: 3}]}", "1: policy.layers[0].level: 3 is not one of error, warn, off"),
        ("policy: {layers: [text]}", "1: policy.layers[0] must hold names and values, as 'name: value'"),
        ("policy: {ignores: [{rule: DC001}]}", "1: policy.ignores[0] needs reason; add 'reason: ...'"),
        ("policy: {ignores: [{rule: DC001, reason: ' '}]}", "1: policy.ignores[0].reason: say why, in a few words"),
        (
            "policy: {ignores: [{rule: DC001, reason: x, until: soon}]}",
            "1: policy.ignores[0].until: 'soon' is not a day; write it as 2030-12-31",
        ),
        (
            "policy: {ignores: [{rule: DC001, reason: x, until: 2030-02-30}]}",
            "1: policy.ignores[0].until: '2030-02-30' is not a day; write it as 2030-12-31",
        ),
        ("models:\n  - pth: x", "2: unknown key models[0].pth; did you mean 'path'?"),
        ("models:\n  - path: x\n    allow_class: [a.B]", "3: allow_class: trust is given on the command line only"),
        ("models:\n  - path: x\n    trust: true", "3: trust: trust is given on the command line only"),
        ("models:\n  - &m {path: x}\n  - *m", "2: models: aliases (*name) are not allowed; write the value out"),
        ("models: 5", "1: models: must be a list; begin each entry with a dash"),
    ],
)
def test_a_fault_of_a_policy_is_told_with_its_line(load: Load, text: str, fault: str) -> None:
    assert fault.replace("DC003?", "") in faults(load, text)[0].removeprefix("deadcheck.yaml:")


def test_a_limit_that_is_off_for_a_layer_is_not_inherited(load: Load) -> None:
    policy = load("policy: {max_layer_dead: 5%, layers: [{match: a, max_layer_dead: off}, {match: b}]}").policy

    assert policy.limit("max_layer_dead", policy.layer("a", "a")) == 1
    assert policy.limit("max_layer_dead", policy.layer("b", "b")) == Fraction(5, 100)


def test_an_empty_list_is_none(load: Load) -> None:
    assert load("models:\npolicy: {layers: null, ignores: []}") == Config()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_loads_and_fits_the_schema(load: Load, name: str) -> None:
    jsonschema.validate(yaml.safe_load(preset_file(name).read_text()), json_schema())

    assert load(f"extends: {name}").policy == load_config(preset_file(name)).policy
    assert (load(f"extends: {name}") == Config()) is (name == "default")


def test_the_schema_takes_what_the_reader_takes() -> None:
    document = yaml.load(POLICY, Loader=yaml.BaseLoader)
    document["policy"]["min_samples"] = 100
    document["models"][1]["arch_args"] = {"width": 3}

    jsonschema.Draft7Validator.check_schema(json_schema())
    jsonschema.validate(document, json_schema())


@pytest.mark.parametrize(
    "document",
    [
        {"polcy": {}}, {"policy": {"max_layer_dead": 5}}, {"policy": {"layers": [{"level": "off"}]}},
        {"policy": {"ignores": [{"rule": "DC001"}]}}, {"policy": {"rules": {"DC010": "off"}}}, {"trust": True},
        {"models": [{"path": "x", "allow_class": "a.B"}]}, {"scan": {"batch_size": 0}},
    ],
)  # fmt: skip
def test_the_schema_refuses_what_the_reader_refuses(document: dict[str, object]) -> None:
    assert not jsonschema.Draft7Validator(json_schema()).is_valid(document)


def test_a_file_may_extend_another(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("extends: ci-ratchet\npolicy: {max_layer_dead: 9%}\nscan: {seed: 7}")
    (tmp_path / "own.yaml").write_text("extends: base.yaml\nscan: {seed: 8}")
    config = load_config(tmp_path / "own.yaml")

    assert (config.policy.max_layer_dead, config.policy.max_worse, config.scan.seed) == (Fraction(9, 100), 0, 8)
    assert config.origins["policy.max_layer_dead"] == "base.yaml:2"


def test_a_file_may_not_extend_itself(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("extends: own.yaml")

    with pytest.raises(ConfigError, match="extends goes round or too deep"):
        load_config(tmp_path / "own.yaml")


def test_an_unknown_preset_gets_the_nearest(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"no such preset or file '.*ci-strikt'; did you mean 'ci-strict'\?"):
        load("extends: ci-strikt")


def test_paths_are_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "deadcheck.yaml").write_text(
        "scan: {data: d.npz}\nmodels:\n  - {path: 'nets/*.pt', arch: 'n.py:f', baseline: b.json, data: 'pkg.mod:f'}\n"
        "  - /abs/net.pt\n"
    )
    monkeypatch.chdir(tmp_path / "sub")
    config = load_config()

    assert config.scan.data == str(tmp_path / "d.npz")
    assert config.models[0] == ModelEntry(
        str(tmp_path / "nets/*.pt"), f"{tmp_path / 'n.py'}:f", {}, None, "pkg.mod:f", str(tmp_path / "b.json")
    )
    assert config.models[1].path == "/abs/net.pt"


@pytest.mark.parametrize("name", ["threads", "workers"])
def test_more_threads_than_any_machine_has_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "deadcheck.yaml").write_text(f"scan: {{{name}: 1024}}\n")
    assert getattr(load_config(tmp_path / "deadcheck.yaml").scan, name) == 1024

    (tmp_path / "deadcheck.yaml").write_text(f"scan: {{{name}: 1025}}\n")
    with pytest.raises(ConfigError, match=f"scan.{name}: 1025 is more than 1024, the most that is taken"):
        load_config(tmp_path / "deadcheck.yaml")


# pyproject.toml.


def test_a_project_may_hold_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[tool.deadcheck]\nextends = "ci-ratchet"\n[tool.deadcheck.policy]\nmax_layer_dead = "7%"\n'
        '[[tool.deadcheck.models]]\npath = "net.pt"\n[[tool.deadcheck.policy.ignores]]\nrule = "DC001"\n'
        'reason = "known"\nuntil = 2030-12-31\n'
    )
    monkeypatch.chdir(tmp_path)
    config = load_config()

    assert config.policy.max_layer_dead == Fraction(7, 100)
    assert config.policy.ignores[0].until == datetime.date(2030, 12, 31)
    assert config.models == (ModelEntry("net.pt"),)
    assert config.origins["policy.max_layer_dead"] == "pyproject.toml"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[tool.deadcheck.policy]\nmax_layer_dead = 5", "policy.max_layer_dead: 5 could mean 5% or 5 times"),
        ("[tool.deadcheck]\ntrust = true", "trust: trust is given on the command line only"),
        ("[tool.deadcheck]\nscann = {}", "unknown key scann; did you mean 'scan'?"),
        ("[tool.deadcheck\n", "not valid TOML"),
        ("tool.deadcheck = 3", "the file must hold names and values"),
        ("tool = 'tool.deadcheck'", "not valid TOML"),
        (f"[tool.deadcheck.scan]\nseed = 0x{'f' * 5000}", "not valid TOML"),
    ],
)
def test_faults_of_a_project_file(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "pyproject.toml").write_text(text)

    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "pyproject.toml")

    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'pyproject.toml'}: ")


def test_a_deadcheck_yaml_stands_before_the_project_file(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.deadcheck.scan]\nseed = 1\n")
    assert find_config(tmp_path) == tmp_path / "pyproject.toml"

    (tmp_path / "deadcheck.yaml").write_text("")
    assert find_config(tmp_path) == tmp_path / "deadcheck.yaml"


@pytest.mark.parametrize("text", ["[tool.ruff]\n", "# see tool.deadcheck\n[tool.ruff]\n"])
def test_a_project_file_of_others_is_passed_over(tmp_path: Path, text: str) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / "pyproject.toml").write_text(text)

    assert find_config(tmp_path) is None
    with pytest.raises(ConfigError, match=r"pyproject.toml: holds no table \[tool.deadcheck\]"):
        load_config(tmp_path / "pyproject.toml")


@pytest.mark.parametrize(
    "text", ['[policy]\nmax_layer_dead = "7%"\n', '[tool.deadcheck.policy]\nmax_layer_dead = "7%"\n']
)
def test_another_toml_file_holds_the_settings_themselves(tmp_path: Path, text: str) -> None:
    (tmp_path / "deadcheck.toml").write_text(text)

    assert load_config(tmp_path / "deadcheck.toml").policy.max_layer_dead == Fraction(7, 100)


def test_what_is_no_setting_in_another_toml_file(tmp_path: Path) -> None:
    (tmp_path / "deadcheck.toml").write_text("batch_size = 3\n")

    with pytest.raises(ConfigError, match="unknown key batch_size"):
        load_config(tmp_path / "deadcheck.toml")


# Anything at all.

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=8,
)
SECTIONS = {
    section: st.dictionaries(st.sampled_from(keys) | st.text(max_size=5), VALUES, max_size=4) | VALUES
    for section, keys in FIELDS.items()
}


def loads_or_says_why(folder: Path, content: bytes) -> None:
    path = folder / "any.yaml"
    path.write_bytes(content)
    with suppress(ConfigError):
        assert isinstance(load_config(path), Config)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8")))
def test_arbitrary_text_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    loads_or_says_why(tmp_path, content)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet="{}[]:,-?&*!|>'\"%@`# \nabsn01\\", max_size=60))
def test_arbitrary_punctuation_is_read_or_refused(tmp_path: Path, text: str) -> None:
    loads_or_says_why(tmp_path, f"scan:\n  data: {text}".encode())


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=VALUES | st.fixed_dictionaries({}, optional=SECTIONS))
def test_arbitrary_data_is_read_or_refused(tmp_path: Path, data: object) -> None:
    loads_or_says_why(tmp_path, yaml.safe_dump(data, allow_unicode=True).encode("utf-8"))


ODD = (
    None, True, [], {}, [[]], [{}], {"a": {}}, {"DC003": {}}, {"DC003": []}, {"a": 1 << 2000}, "", "5", "x" * 400,
    "9" * 5000, "0." + "1" * 5000 + "%", -1, 5, 0.5, 1 << 2000, -(1 << 2000), float("nan"), float("inf"),
    datetime.date(2030, 12, 31), datetime.datetime(2030, 12, 31, 1, 2), b"x",
)  # fmt: skip


def places(part: Kind | Section | Rows, odd: object) -> Iterator[object]:
    """Yield documents that have an odd value in the place of each setting in turn."""
    yield odd
    if isinstance(part, Rows):
        yield from ([row] for row in places(part.row, odd))
    elif isinstance(part, Section):
        for name, inner in part.fields.items():
            yield from ({name: value} for value in places(inner, odd))


@pytest.mark.parametrize("odd", ODD, ids=lambda value: repr(value)[:20])
def test_an_odd_value_in_any_place_is_read_or_refused(tmp_path: Path, odd: object) -> None:
    for document in places(SETTINGS, odd):
        loads_or_says_why(tmp_path, yaml.safe_dump(document).encode())

"""Configuration files that would build objects, unfold without end, or give trust away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.hostile.cases import Case, into

BOMB = "\n".join(
    ["a: &a [x, x]", *(f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]" for i in range(24))]
)


def _key_bomb() -> str:
    """A bomb inside a key, which is written out when the key is told."""
    inner = "&a0 [x, x]"
    for level in range(1, 40):
        inner = f"&a{level} [{inner}, *a{level - 1}]"
    return f"scan:\n  units:\n    ? {inner}\n    : 1\n"


TEXTS: dict[str, tuple[str | Callable[[Path], bytes], str]] = {
    "python-tag": (
        lambda marker: f"scan: !!python/object/apply:os.mkdir [{str(marker)!r}]".encode(),
        "must hold names",
    ),
    "python-tag-in-a-value": (
        lambda marker: f"scan:\n  data: !!python/object/apply:os.mkdir [{str(marker)!r}]".encode(),
        "is not allowed",
    ),
    "python-name": ("scan:\n  data: !!python/name:os.system ''", "is not allowed"),
    "own-tag": ("scan:\n  seed: !evil 5", "is not allowed"),
    "alias-bomb": (BOMB, "unknown key a"),
    "alias-bomb-in-a-value": ("scan:\n  input_shape: &a [1, 2]\n  units: {x: *a}", "alias"),
    "alias-bomb-in-a-key": (_key_bomb(), "a key is not text"),
    "duplicate-key": ("scan:\n  seed: 1\n  seed: 2", "stands twice"),
    "exponent-without-a-dot": ("thresholds:\n  tau: 1e-3", "1.0e-3"),
    "bare-5": ("thresholds:\n  tau: 5", "5%"),
    "unknown-key": ("scan:\n  batchsize: 4", "did you mean 'batch_size'"),
    "key-on": ("on:\n  push: x", "unknown key on"),
    "value-no": ("scan:\n  data: no", "is not text"),
    "trust": ("trust: true", "trust is given on the command line only"),
    "trust-in-scan": ("scan:\n  trust: true", "trust is given on the command line only"),
    "allow-class": ("scan:\n  allow_class: [os.system]", "trust is given on the command line only"),
    "nested": ("scan: " + "[" * 50_000, "nested too deeply"),
    "nested-maps": ("scan: " + "{a: " * 50_000, "nested too deeply"),
    "base-60": ("scan:\n  seed: 1" + ":1" * 120_000, "was not read"),
    "a-million-digits": ("scan:\n  seed: " + "9" * 250_000, "was not read"),
    "many-unknown-keys": ("".join(f"k{i}: 1\n" for i in range(25_000)), "unknown key k0"),
    "long-key": ("? " + "k" * 250_000 + "\n: 1", "unknown key"),
    "long-value": ("scan:\n  device: {a: " + "v" * 250_000 + "}", "was not read"),
    "two-documents": ("scan: {}\n---\nscan: {}", "another document"),
    "merge-key": ("scan:\n  <<: {seed: 5}", "unknown key scan.<<"),
    "tab": ("scan:\n\tseed: 5", "not valid YAML"),
    "nul": ("scan:\n  seed: \x00", "not valid YAML"),
    "not-a-number": ("thresholds:\n  tau: .nan", "not a number"),
    "infinite": ("thresholds:\n  shallow: .inf", "not a number"),
    "list": ("- 1\n- 2", "must hold names"),
    "text": ("hello", "must hold names"),
    "null-byte-order": ("\ufeff\ufeffscan: {}", "deadcheck.yaml"),
}

TOML: dict[str, tuple[str, str]] = {
    "nested": ("[tool.deadcheck]\nscan = " + "[" * 20_000 + "]" * 20_000, "nested too deeply"),
    "nested-tables": ("[tool.deadcheck.scan" + ".a" * 20_000 + "]", "deadcheck.toml"),
    "digits": ("[tool.deadcheck.scan]\nseed = " + "9" * 100_000, "deadcheck.toml"),
    "no-table": ("[tool]\ndeadcheck = 5", "must hold names"),
    "no-tools": ("tool = 5", "not valid TOML"),
    "dates": ("[tool.deadcheck.scan]\nseed = 2026-01-01", "is not allowed"),
    "not-a-number": ("[tool.deadcheck.thresholds]\ntau = nan", "not a number"),
    "trust": ("[tool.deadcheck]\ntrust = true", "trust is given on the command line only"),
    "extends-itself": ("[tool.deadcheck]\nextends = 'deadcheck.toml'", "extends goes round"),
    "extends-a-device": ("[tool.deadcheck]\nextends = '/dev/zero'", "no such preset or file"),
}

CASES = (
    *(
        Case(f"toml-{name}", into("deadcheck.toml", content.encode()), 2, says, as_config=True)
        for name, (content, says) in TOML.items()
    ),
    *(
        Case(f"yaml-{name}", into("deadcheck.yaml", content.encode() if isinstance(content, str) else content), 2, says,
             as_config=True, armed="yaml" if name.startswith("python-tag") else "")
        for name, (content, says) in TEXTS.items()
    ),
    Case("yaml-utf-16", into("deadcheck.yaml", "scan: {}".encode("utf-16")), 2, "cannot be read", as_config=True),
    Case("yaml-binary", into("deadcheck.yaml", bytes(range(256)) * 16), 2, "cannot be read", as_config=True),
    Case("yaml-too-large", into("deadcheck.yaml", b"# " + b"x" * (1 << 20)), 2, "larger than 256 KiB", as_config=True),
)  # fmt: skip

"""The shape of the package: light imports, one version, no drawers."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import deadcheck

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
FOLDERS = ("deadcheck", "tests", "benchmarks", "sample_models")


def modules_after(code: str) -> set[str]:
    """Return what is imported after some code has run in a new interpreter."""
    probe = f"import sys\n{code}\nprint('\\n' + '\\n'.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".cli",
        ".commands.gating",
        ".commands.baselines",
        ".config",
        ".diagnosis",
        ".gate",
        ".baseline",
        ".record",
        ".reports",
        ".reports.from_json",
        ".reports.as_diff",
        ".sites",
        ".errors",
    ],
)
def test_what_judges_and_prints_imports_no_torch(name: str) -> None:
    assert "torch" not in modules_after(f"import deadcheck{name}")


@pytest.mark.parametrize("flag", ["--help", "--version", "scan --help", "gate --help"])
def test_help_and_version_import_no_torch(flag: str) -> None:
    code = (
        f"sys.argv = ['deadcheck', *'{flag}'.split()]\nfrom deadcheck.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert end.code == 0"
    )

    assert "torch" not in modules_after(code)


def test_that_test_can_fail() -> None:
    assert "torch" in modules_after("import deadcheck.probe")


def lint_imports(config: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter, from the root, with the contracts of one file."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()"]
    return subprocess.run(
        [*command, "--no-cache", "--config", str(config)], capture_output=True, text=True, cwd=ROOT, check=False
    )


def test_imports_keep_the_layers() -> None:
    run = lint_imports(ROOT / "pyproject.toml")

    assert run.returncode == 0, run.stdout + run.stderr
    assert "0 broken" in run.stdout


def test_broken_layers_are_noticed(tmp_path: Path) -> None:
    upside_down = tmp_path / "importlinter.ini"
    upside_down.write_text(
        "[importlinter]\nroot_package = deadcheck\n"
        "[importlinter:contract:1]\nname = upside down\ntype = layers\n"
        "layers =\n    deadcheck.errors\n    deadcheck.cli\n"
    )

    run = lint_imports(upside_down)

    assert run.returncode == 1
    assert "upside down BROKEN" in run.stdout


def test_version_is_the_same_everywhere() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "deadcheck", "--version"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    project = (ROOT / "pyproject.toml").read_text()

    assert run.stdout == f"deadcheck {deadcheck.__version__}\n"
    assert 'dynamic = ["version"]' in project
    assert 'version = { attr = "deadcheck.__version__" }' in project


def sources() -> list[Path]:
    """Return every Python file of the tree; build outputs and environments stand elsewhere."""
    return [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]


def test_every_file_has_a_name_of_its_own() -> None:
    names = Counter(path.name for path in sources() if path.name not in ("__init__.py", "base.py", "conftest.py"))

    assert [name for name, count in names.items() if count > 1] == []


def test_there_is_no_drawer() -> None:
    drawers = {"utils", "helpers", "common", "misc", "tools"}

    assert [path for path in sources() if drawers & {path.stem, *path.relative_to(ROOT).parts}] == []


def test_default_configuration_states_every_default() -> None:
    from deadcheck.config import FIELDS, Config, load_config

    loaded = load_config(ROOT / "configs" / "default.yaml")

    assert loaded == Config()
    assert set(loaded.origins) == {f"{section}.{name}" for section, names in FIELDS.items() for name in names}


def test_public_names_resolve() -> None:
    for name in deadcheck.__all__:
        assert getattr(deadcheck, name) is not None


def test_every_folder_of_the_package_is_installed() -> None:
    """The presets stand beside the package, so the list of packages is written out."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "deadcheck").rglob("__init__.py")}

    assert set(listed) == folders | {"deadcheck.configs"}

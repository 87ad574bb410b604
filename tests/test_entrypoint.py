"""Finding the user's own code by name, and saying plainly why it cannot be found."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deadcheck.entrypoint import build, resolve
from deadcheck.errors import ArchitectureError, DataError, UsageError

Write = Callable[[str, str], Path]


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory of its own; what was imported in it is forgotten."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def write(project: Path) -> Write:
    def _write(name: str, text: str) -> Path:
        path = project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def test_a_module_is_found_from_the_working_directory(write: Write) -> None:
    write("ep_package/__init__.py", "")
    write("ep_package/models.py", "def net(): return 'net'")

    assert resolve("ep_package.models:net")() == "net"


def test_a_file_is_found_by_its_path(write: Write) -> None:
    path = write("folder/model.py", "answer = 42")

    assert resolve(f"{path}:answer") == 42
    assert resolve("folder/model.py:answer") == 42


def test_a_file_need_not_have_a_name_python_could_import(write: Write) -> None:
    write("my-model 2.py", "answer = 42")

    assert resolve("my-model 2.py:answer") == 42


@pytest.mark.parametrize("place", ["ep_nested.py", "ep_nested"])
def test_nested_names_are_followed(write: Write, place: str) -> None:
    write("ep_nested.py", "class Zoo:\n    class Net:\n        @staticmethod\n        def make(): return 'made'\n")

    assert resolve(f"{place}:Zoo.Net.make")() == "made"


def test_two_files_of_one_name_are_told_apart(write: Write) -> None:
    write("a/model.py", "name = 'a'")
    write("b/model.py", "name = 'b'")

    assert (resolve("a/model.py:name"), resolve("b/model.py:name")) == ("a", "b")
    assert resolve("a/model.py:name") == "a"


def test_a_file_is_run_once(write: Write) -> None:
    write("once.py", "from pathlib import Path\nwith Path('runs').open('a') as f: f.write('x')\na = b = 1")

    resolve("once.py:a")
    resolve(f"{Path('once.py').resolve()}:b")

    assert Path("runs").read_text() == "x"


def test_a_file_may_import_its_sibling(write: Write) -> None:
    write("folder/ep_sibling.py", "value = 7")
    write("folder/model.py", "from ep_sibling import value")

    assert resolve("folder/model.py:value") == 7


def test_a_file_may_import_from_the_working_directory(write: Write) -> None:
    write("ep_shared.py", "value = 8")
    write("folder/model.py", "from ep_shared import value")

    assert resolve("folder/model.py:value") == 8


def test_a_file_may_define_dataclasses(write: Write) -> None:
    write(
        "model.py", "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A: x: int"
    )

    assert resolve("model.py:A")(3).x == 3


@pytest.mark.parametrize(
    ("text", "works"),
    [
        ("value = 1", True),
        ("raise ValueError('no')", False),
        ("import sys\nsys.path.insert(0, 'left')\nvalue = 1", True),
    ],
)
@pytest.mark.parametrize("place", ["folder/ep_path.py", "ep_path"])
def test_the_import_path_is_as_before(write: Write, place: str, text: str, works: bool) -> None:
    write("folder/ep_path.py", text)
    write("ep_path.py", text)
    before, same_list = list(sys.path), sys.path

    if works:
        assert resolve(f"{place}:value") == 1
    else:
        with pytest.raises(UsageError):
            resolve(f"{place}:value")

    assert sys.path == before
    assert sys.path is same_list


def test_a_file_that_failed_is_read_afresh(write: Write) -> None:
    path = write("model.py", "raise ValueError('no')")
    before = set(sys.modules)
    with pytest.raises(UsageError):
        resolve("model.py:value")
    assert {name for name in set(sys.modules) - before if "model" in name} == set()

    path.write_text("value = 'corrected'")

    assert resolve("model.py:value") == "corrected"


@pytest.mark.parametrize("target", ["model.py", ":name", "model.py:", "model.py:a b", "model.py:a..b", "m:3", ""])
def test_what_is_no_entry_point_is_said(target: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(target)

    assert str(caught.value) == f"{target!r} is not package.module:name or file.py:name; write one of these"


def test_a_missing_file() -> None:
    with pytest.raises(UsageError) as caught:
        resolve("gone/model.py:net")

    assert str(caught.value) == (
        f"'gone/model.py:net': no such file 'gone/model.py'; check the path (it is taken from {os.getcwd()!r})"
    )


def test_a_folder_named_like_a_file(project: Path) -> None:
    (project / "model.py").mkdir()

    with pytest.raises(UsageError, match=r"no such file 'model\.py'; check the path"):
        resolve("model.py:net")


def test_a_missing_module() -> None:
    with pytest.raises(UsageError) as caught:
        resolve("ep_no_such_package.models:net")

    assert str(caught.value) == (
        f"'ep_no_such_package.models:net': no module named 'ep_no_such_package' from {os.getcwd()!r} and PYTHONPATH; "
        "run from your project's folder, or set PYTHONPATH"
    )


@pytest.mark.parametrize("place", ["ep_importing.py", "ep_importing"])
def test_the_module_that_is_missing_is_named_not_the_one_that_wants_it(write: Write, place: str) -> None:
    write("ep_importing.py", "import ep_not_installed\nnet = 1")

    with pytest.raises(UsageError, match=rf"^'{place}:net': no module named 'ep_not_installed' from "):
        resolve(f"{place}:net")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("build_ne", "has no 'build_ne'; did you mean build_net?"),
        ("Net.mak", "has no 'mak'; did you mean make?"),
        ("zzz", "has no 'zzz'; check the name"),
        ("_hidde", "has no '_hidde'; check the name"),  # private names are not offered
    ],
)
def test_a_missing_attribute(write: Write, name: str, hint: str) -> None:
    write("model.py", "_hidden = 1\ndef build_net(): ...\nclass Net:\n    def make(self): ...\n")

    with pytest.raises(UsageError) as caught:
        resolve(f"model.py:{name}")

    assert str(caught.value) == f"'model.py:{name}': model.py {hint}"


@pytest.mark.parametrize("place", ["ep_fails.py", "ep_fails"])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = 1\ndef f(:\n", "SyntaxError: invalid syntax (ep_fails.py, line 2)"),
        ("x = 1\n\nx.nothing\n", "AttributeError: 'int' object has no attribute 'nothing' (ep_fails.py, line 3)"),
        ("def f():\n    raise ValueError('first\\nsecond')\nf()", "ValueError: first (ep_fails.py, line 2)"),
        ("raise RuntimeError", "RuntimeError: RuntimeError (ep_fails.py, line 1)"),
        ("import sys\nsys.exit(0)", "SystemExit: 0 (ep_fails.py, line 2)"),
        ("raise SystemExit", "SystemExit: SystemExit (ep_fails.py, line 1)"),
        ("from os import nothing_of_it", "ImportError: cannot import name 'nothing_of_it' from 'os'"),
    ],
)
def test_an_import_that_fails_says_why_and_where(write: Write, place: str, text: str, reason: str) -> None:
    write("ep_fails.py", text)

    with pytest.raises(UsageError) as caught:
        resolve(f"{place}:net")

    assert str(caught.value).startswith(f"'{place}:net': importing it raised {reason}")
    assert "(ep_fails.py, line " in str(caught.value)


@pytest.mark.parametrize("place", ["ep_stops.py", "ep_stops"])
def test_an_interrupt_while_importing_stays_one(write: Write, place: str) -> None:
    write("ep_stops.py", "raise KeyboardInterrupt")

    with pytest.raises(KeyboardInterrupt):
        resolve(f"{place}:net")


def test_build_calls_with_the_arguments(write: Write) -> None:
    write("model.py", "class Net:\n    def __init__(self, width=1, name='n'): self.given = (width, name)\n")

    assert build("model.py:Net", {}).given == (1, "n")
    assert build("model.py:Net", {"width": 5, "name": "wide"}).given == (5, "wide")


def test_an_object_is_returned_as_it_is(write: Write) -> None:
    write(
        "model.py",
        "class Net:\n    def __call__(self): ...\n    def state_dict(self): ...\nnet = Net()\nsizes = [1, 2]\n",
    )

    assert build("model.py:net", {}) is resolve("model.py:net")  # callable, as every module of torch is
    assert build("model.py:sizes", {}) == [1, 2]


@pytest.mark.parametrize("name", ["net", "sizes"])
def test_an_object_takes_no_arguments(write: Write, name: str) -> None:
    write(
        "model.py",
        "class Net:\n    def __call__(self): ...\n    def state_dict(self): ...\nnet = Net()\nsizes = [1, 2]\n",
    )

    with pytest.raises(UsageError) as caught:
        build(f"model.py:{name}", {"width": 3})

    assert str(caught.value) == (
        f"'model.py:{name}' is an object, not a factory, so it takes no --arch-arg; leave them out"
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            {},
            "called with no arguments raised TypeError: make() missing 1 required positional argument: 'width'; ",
        ),
        (
            {"width": 1, "hight": 2},
            "called with width, hight raised TypeError: make() got an unexpected keyword argument 'hight'; ",
        ),
        ({"width": 0}, "called with width raised ValueError: too narrow (model.py, line 2); "),
    ],
)
def test_a_factory_that_raises(write: Write, arguments: dict[str, object], reason: str) -> None:
    write("model.py", "def make(width):\n    if not width: raise ValueError('too narrow\\nby far')\n    return width\n")

    with pytest.raises(ArchitectureError) as caught:
        build("model.py:make", arguments)

    assert str(caught.value) == f"'model.py:make' {reason}give what it needs with --arch-arg name=value"
    assert isinstance(caught.value.__cause__, (TypeError, ValueError))


def test_a_factory_may_raise_an_error_of_ours(write: Write) -> None:
    write("model.py", "from deadcheck.errors import DataError\ndef make(): raise DataError('as it is')\n")

    with pytest.raises(DataError, match=r"^as it is$"):
        build("model.py:make", {})

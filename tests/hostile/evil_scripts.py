"""TorchScript that writes files while it is loaded, or once it is called; or that only looks like TorchScript."""

from __future__ import annotations

import functools
import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.hostile.cases import STOP, Case, called, into, text, zipped

FORWARD = """
def forward(self, x):
    torch.save(x, "MARKER")
    return x.relu()
"""

SETSTATE = """
def __getstate__(self):
    return (1, True)

def __setstate__(self, state: Tuple[int, bool]) -> None:
    torch.save(torch.zeros(1), "MARKER")
    self.training = state[1]

def forward(self, x):
    return x.relu()
"""


@functools.cache
def good_script() -> dict[str, bytes]:
    """Return the members of a small scripted model."""
    import torch

    held = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())), held)
    with zipfile.ZipFile(held) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def _written(source: str) -> Callable[[Path, Path], Path]:
    """Return what saves a module of these methods, which save a tensor to the marker."""

    def make(folder: Path, marker: Path) -> Path:
        import torch

        module = type("Net", (torch.jit.ScriptModule,), {})()  # methods are kept by class
        module.define(source.replace("MARKER", str(marker)))
        path = folder / "model.pt"
        torch.jit.save(module, str(path))
        return path

    return make


def _with(changes: Mapping[str, bytes | Callable[[Path], bytes]]) -> Callable[[Path, Path], Path]:
    """Return what writes that model with members beside its own, or in their place."""

    def content(marker: Path) -> bytes:
        made = {name: data(marker) if callable(data) else data for name, data in changes.items()}
        return zipped({**good_script(), **made})

    return into("model.pt", content)


def _payload(marker: Path) -> bytes:
    return b"\x80\x02" + called("posix", "mkdir", text(str(marker))) + STOP


def _code_bomb(folder: Path, marker: Path) -> Path:
    """Code that inflates to 1 GiB."""
    path = into("model.pt", zipped(good_script()))(folder, marker)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        for number in range(4):
            with archive.open(f"archive/code/__torch__/e{number}.py", "w") as member:
                for _ in range(256):
                    member.write(b"relu " * 209_715)
    return path


SCRIPT = "is a program"

CASES = (
    Case("script-forward-saves", _written(FORWARD), 4, "add --trust", found="writes or reads files", armed="script"),
    Case("script-setstate-saves", _written(SETSTATE), 4, "add --trust", found="writes or reads files", armed="script"),
    Case("script-evil-pickle", _with({"data.pkl": pickle.dumps(print)}), 4, "add --trust", found="builtins.print"),
    Case("script-of-no-code", _with({"code/__torch__/evil.py": b""}), 4, "add --trust", found=SCRIPT),
    Case("script-code-bomb", _code_bomb, 2, "code that would inflate without end"),
    Case("script-with-an-arch", _with({}), 2, "leave out --arch", flags=("--arch", "arch.py:net"), found=SCRIPT),
    Case("script-beside-a-pickle", _with({"data.pkl": _payload}), 4, "add --trust", found="names posix.mkdir"),
)

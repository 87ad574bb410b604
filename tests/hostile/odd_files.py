"""What is no model at all, or only looks like one: special files, other formats, half files."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

from tests.hostile.cases import Case, into, linear, relu, saved, sequential


def _fifo(folder: Path, _: Path) -> Path:
    os.mkfifo(folder / "model.pt")
    return folder / "model.pt"


def _link(target: str, name: str = "model.pt") -> Callable[[Path, Path], Path]:
    def make(folder: Path, _: Path) -> Path:
        (folder / name).symlink_to(target)
        return folder / name

    return make


def _socket(folder: Path, _: Path) -> Path:
    import socket

    before = os.getcwd()
    os.chdir(folder)  # a socket's path may not be long
    try:
        with socket.socket(socket.AF_UNIX) as held:
            held.bind("model.pt")
    finally:
        os.chdir(before)
    return folder / "model.pt"


def _npz() -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00")
    return held.getvalue()


def _package() -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name in (".data/extern_modules", "evil.py", "model/model.pkl"):
            archive.writestr(f"net/{name}", b"")
    return held.getvalue()


GOOD = saved(sequential(linear(), relu()))
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 132735\n"
HTML = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head></html>\n"

KINDS: dict[str, tuple[str, bytes, str]] = {
    "empty": ("model.pt", b"", "the file is empty"),
    "zeros": ("model.pt", bytes(1000), "no kind of model that is known"),
    "noise": ("model.pt", bytes((i * 7919 + 13) % 251 for i in range(4096)), "no kind of model that is known"),
    "text": ("model.pt", b"hello world\n" * 50, "text, not a model"),
    "text-in-utf-16": ("model.pt", "hello world\n".encode("utf-16"), "no kind of model that is known"),
    "html": ("model.pt", HTML, "a web page"),
    "html-after-spaces": ("model.safetensors", b"   \n" + HTML, "damaged safetensors"),
    "lfs-pointer": ("model.pt", LFS, "git lfs pull"),
    "lfs-pointer-of-safetensors": ("model.safetensors", LFS, "git lfs pull"),
    "npy": ("model.pt", b"\x93NUMPY\x01\x00" + bytes(100), "a NumPy array"),
    "npz": ("model.npz", _npz(), "NumPy arrays"),
    "onnx": ("model.onnx", b"\x08\x07\x12\x07pytorch", "an ONNX model"),
    "gguf": ("model.gguf", b"GGUF\x03\x00\x00\x00" + bytes(100), "a GGUF model"),
    "hdf5": ("model.h5", b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file"),
    "keras": ("model.keras", _npz(), "a Keras model"),
    "tensorflow": ("model.pb", b"\x0a\x0d\x0a\x03" + bytes(100), "not a PyTorch model"),
    "tflite": ("model.tflite", b"\x1c\x00\x00\x00TFL3" + bytes(100), "not a PyTorch model"),
    "torch-package": ("model.pt", _package(), "a torch.package"),
    "bin-index": (
        "pytorch_model.bin.index.json",
        b'{"metadata": {}, "weight_map": {}}',
        "the index of a sharded model",
    ),
    "safetensors-index": ("model.safetensors.index.json", b'{"metadata": {}}', "the index of a sharded model"),
    "gzip": ("model.pt", b"\x1f\x8b\x08" + bytes(100), "no kind of model that is known"),
    "one-byte": ("model.pt", b"\x80", "damaged"),
    "two-letters": ("model.pt", b"PK", "broken zip"),
    "cut-in-half": ("model.pt", GOOD[: len(GOOD) // 2], "broken zip"),
    "cut-at-the-end": ("model.pt", GOOD[:-1], "broken zip"),
    "elf": ("model.so", b"\x7fELF" + bytes(100), "no kind of model that is known"),
}

ENDS = frozenset(("one-byte", "html-after-spaces"))
"""What is told to be some kind of model first, so that an inspection ends well."""

CASES = (
    *(
        Case(f"odd-{name}", into(file, content), 2, says, inspect=0 if name in ENDS else 2)
        for name, (file, content, says) in KINDS.items()
    ),
    Case("odd-pipe", _fifo, 2, "not a regular file", inspect=2),
    Case("odd-zero", _link("/dev/zero"), 2, "not a regular file", inspect=2),
    Case("odd-random", _link("/dev/urandom", "model.safetensors"), 2, "not a regular file", inspect=2),
    Case("odd-socket", _socket, 2, "not a regular file", inspect=2),
    Case("odd-dangling", _link("nowhere"), 2, "no such file", inspect=2),
    Case("odd-loop", _link("model.pt"), 2, "model.pt", inspect=2),
    Case("odd-missing", lambda folder, _: folder / "nowhere.pt", 2, "no such file", inspect=2),
    Case("odd-folder", lambda folder, _: folder, 2, "is a folder, not a model file", inspect=2),
    Case("odd-nul", lambda folder, _: folder / "mo\x00del.pt", 2, "null byte", inspect=2),
    Case("odd-long", lambda folder, _: folder / ("x" * 5000), 2, "cannot be read", inspect=2),
    Case("odd-proc", lambda folder, _: Path("/proc/self/mem"), 2, "/proc/self/mem", inspect=2),
)

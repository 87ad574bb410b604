"""Zips that lie about their members, inflate without end, or show two readers two things."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from tests.hostile.cases import (
    STOP,
    Case,
    into,
    linear,
    mapping,
    parameter,
    relu,
    sequential,
    tensor,
    torch_zip,
    zipped,
)

NET = b"\x80\x02" + sequential(linear(), relu()) + STOP
GOOD = {"data.pkl": NET, "byteorder": b"little", "version": b"3\n", "data/0": bytes(48), "data/1": bytes(12)}
NEVER = "which torch never writes"


def _with(**changes: bytes) -> bytes:
    return zipped({**GOOD, **{name.replace("__", "/"): content for name, content in changes.items()}})


def _deflated(_: Path) -> bytes:
    return zipped(GOOD, method=zipfile.ZIP_DEFLATED)


def _bomb(_: Path) -> bytes:
    """A storage that is packed, and claims to hold 2 GiB."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name, content in GOOD.items():
            if name != "data/0":
                archive.writestr(f"archive/{name}", content)
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        block = bytes(1 << 20)
        packed = b"".join(packer.compress(block) for _ in range(32)) + packer.flush()
        info = zipfile.ZipInfo("archive/data/0")
        archive.writestr(info, packed)
    data = bytearray(held.getvalue())
    return bytes(_patched(data, b"archive/data/0", local={8: (8, "<H"), 22: (2 << 30, "<I")},
                          central={10: (8, "<H"), 24: (2 << 30, "<I")}))  # fmt: skip


def _patched(data: bytearray, name: bytes, *, local: dict[int, tuple[int, str]] | None = None,
             central: dict[int, tuple[int, str]] | None = None) -> bytearray:  # fmt: skip
    """Overwrite fields in the local header and in the central entry of a member."""
    place = -1
    while (place := data.find(name, place + 1)) >= 0:
        for signature, size, fields in ((b"PK\x03\x04", 30, local), (b"PK\x01\x02", 46, central)):
            if data[place - size : place - size + 4] == signature:
                for offset, (value, form) in (fields or {}).items():
                    struct.pack_into(form, data, place - size + offset, value)
    return data


def _field(name: str, **where: dict[int, tuple[int, str]]) -> Callable[[Path], bytes]:
    return lambda _: bytes(_patched(bytearray(zipped(GOOD)), f"archive/{name}".encode(), **where))


def _renamed(old: bytes, new: bytes, *, only: bytes) -> Callable[[Path], bytes]:
    """Give a member another name in its local header or in its central entry alone."""

    def make(_: Path) -> bytes:
        data = bytearray(zipped(GOOD))
        place = -1
        while (place := data.find(old, place + 1)) >= 0:
            size = 30 if only == b"PK\x03\x04" else 46
            if data[place - size : place - size + 4] == only:
                data[place : place + len(old)] = new
        return bytes(data)

    return make


def _twice(_: Path) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name, content in [*GOOD.items(), ("data.pkl", b"\x80\x02}.")]:
            import warnings

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                archive.writestr(f"archive/{name}", content)
    return held.getvalue()


def _two_folders(_: Path) -> bytes:
    held = io.BytesIO(zipped(GOOD))
    with zipfile.ZipFile(held, "a") as archive:
        archive.writestr("other/data.pkl", b"\x80\x02}.")
    return held.getvalue()


def _named(name: str) -> bytes:
    held = io.BytesIO(zipped(GOOD))
    with zipfile.ZipFile(held, "a") as archive:
        archive.writestr(name, b"x")
    return held.getvalue()


def _many_members(folder: Path, _: Path) -> Path:
    """A million members of nothing: 60 MiB of table."""
    path = folder / "model.pt"
    with path.open("wb") as file:
        name = b"archive/0000000"
        local = struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, 0, 0, 0, 0, 0, 0, 0, len(name), 0) + name
        file.write(local)
        start = file.tell()
        entry = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, 0, 0, len(name), 0, 0, 0, 0, 0, 0)
        for block in range(1000):
            file.write(b"".join(entry + b"archive/%07d" % (block * 1000 + i) for i in range(1000)))
        size = file.tell() - start
        record = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 10**6, 10**6, size, start)
        locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, start + size, 1)
        end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
        file.write(record + locator + end)
    return path


def _zip64_lie(_: Path) -> bytes:
    """A zip64 record that says the table of members is larger than the file."""
    data = zipped(GOOD)
    end = data.rindex(b"PK\x05\x06")
    start = struct.unpack_from("<I", data, end + 16)[0]
    record = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 5, 5, 1 << 40, start)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1)
    tail = bytearray(data[end:])
    struct.pack_into("<2H2I", tail, 8, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
    return data[:end] + record + locator + bytes(tail)


def _symlink(_: Path) -> bytes:
    held = io.BytesIO(zipped({key: value for key, value in GOOD.items() if key != "data/0"}))
    with zipfile.ZipFile(held, "a") as archive:
        info = zipfile.ZipInfo("archive/data/0")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, b"/etc/passwd".ljust(48))
    return held.getvalue()


def _storage(elements: int) -> bytes:
    """A storage that claims more than its record holds; mapped, it would be read beyond it."""
    state = mapping({"weight": tensor("0", (elements,)), "bias": tensor("1", (3,))})
    return torch_zip(b"\x80\x02" + state + STOP, _0=b"\x00" * 16, _1=bytes(12))


def _beyond(offset: int, shape: tuple[int, ...], stride: tuple[int, ...] | None = None) -> bytes:
    state = mapping({"weight": tensor("0", shape, stride=stride, elements=4, offset=offset), "b": tensor("1", (3,))})
    return torch_zip(b"\x80\x02" + state + STOP, _0=bytes(16), _1=bytes(12))


def _overlapping(_: Path) -> bytes:
    """The entry of one storage points into another."""
    data = bytearray(zipped(GOOD))
    first = data.index(b"archive/data/0") - 30
    return bytes(_patched(data, b"archive/data/1", central={42: (first, "<I")}))


def _sparse(folder: Path, _: Path) -> Path:
    """A file that is 1 TiB long and takes a few KiB on the disk."""
    path = folder / "model.pt"
    data = zipped(GOOD)
    path.write_bytes(data)
    os.truncate(path, 1 << 40)
    return path


SHAPES = {
    "beyond-its-end": _beyond(2, (4,)),
    "negative-offset": _beyond(-1, (4,)),
    "negative-shape": _beyond(0, (-4,)),
    "negative-stride": _beyond(3, (4,), (-1,)),
    "of-2-to-the-80": _beyond(0, (1 << 40, 1 << 40), (0, 0)),
}

CASES = (
    Case("zip-bomb", into("model.pt", _bomb), 2, "compressed members"),
    Case("zip-compressed", into("model.pt", _deflated), 2, "compressed members"),
    Case("zip-duplicates", into("model.pt", _twice), 2, "two members of one name"),
    Case("zip-two-folders", into("model.pt", _two_folders), 2, "more than one folder"),
    Case("zip-outside", into("model.pt", _named("archive/../../evil")), 2, "a member outside its folder"),
    Case("zip-absolute", into("model.pt", _named("/archive/evil")), 2, "a member outside its folder"),
    Case("zip-backslash", into("model.pt", _named("archive\\data.pkl")), 2, NEVER),
    Case("zip-nul-in-a-name", into("model.pt", _renamed(b"archive/data/0", b"archive/da\x00a/0", only=b"PK\x01\x02")), 2,
         "a member of two names"),
    Case("zip-two-names", into("model.pt", _renamed(b"archive/data/0", b"archive/data/9", only=b"PK\x03\x04")), 2,
         "a member of two names"),
    Case("zip-case-twin", into("model.pt", _with(DATA__0=bytes(48))), 2, "two members of one name"),
    Case("zip-encrypted", into("model.pt", _field("data.pkl", local={6: (1, "<H")}, central={8: (1, "<H")})), 2, "flags"),
    Case("zip-sizes-lie", into("model.pt", _field("data/0", central={24: (4800, "<I")})), 2, "sizes that do not add up"),
    Case("zip-larger-than-the-file", into("model.pt", _field("data/0", central={20: (1 << 30, "<I"), 24: (1 << 30, "<I")})),
         2, "larger than the file"),
    Case("zip-overlapping", into("model.pt", _overlapping), 2, NEVER),
    Case("zip-offset-outside", into("model.pt", _field("data/0", central={42: (1 << 30, "<I")})), 2, "broken zip"),
    Case("zip-no-header-there", into("model.pt", _field("data/0", central={42: (5, "<I")})), 2, "without a header"),
    Case("zip64-lie", into("model.pt", _zip64_lie), 2, "table of members", inspect=2),
    Case("zip-million-members", _many_members, 2, "table of members", inspect=2),
    Case("zip-appended", into("model.pt", zipped(GOOD) + b"x" * 100_000), 2, "broken zip", inspect=2),
    Case("zip-behind-a-pickle", into("model.pt", b"\x80\x02}." + zipped(GOOD)), 2, "no entry of it looks like weights"),
    Case("zip-symlink", into("model.pt", _symlink), 0, "of 3 units are dead", found="Linear"),
    Case("zip-1-tib", _sparse, 2, "broken zip", inspect=2),
    Case("zip-nested", into("model.pt", zipped({"archive.zip": zipped(GOOD)})), 2, "not one that torch.save writes",
         inspect=2),
    Case("zip-empty", into("model.pt", zipped({})), 2, "not one that torch.save writes", inspect=2),
    Case("zip-cut", into("model.pt", zipped(GOOD)[:-40]), 2, "cut-off or broken zip", inspect=2),
    Case("storage-larger-than-its-record", into("model.pt", _storage(1 << 20)), 2, "which holds 16",
         flags=("--arch", "arch.py:net"), found="weight"),
    Case("storage-of-2-to-the-62", into("model.pt", _storage(1 << 62)), 2, "damaged", found="damaged"),
    Case("storage-missing", into("model.pt", zipped({k: v for k, v in GOOD.items() if k != "data/0"})), 2,
         "the storage '0' is missing", found="Linear"),
    *(
        Case(f"tensor-{name}", into("model.pt", content), 2, "damaged", flags=("--arch", "arch.py:net"),
             found="FILE.py:FACTORY" if name.startswith(("beyond", "of-", "negative-off", "negative-str")) else "wrong")
        for name, content in SHAPES.items()
    ),
    Case("tensor-parameter-of-text", into("model.pt", torch_zip(b"\x80\x02" + mapping({"w": parameter(b"N")}) + STOP)), 2,
         "damaged", found="no entry of it looks like weights"),
)  # fmt: skip

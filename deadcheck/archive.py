"""Tells what a file is from its first bytes, and judges a zip and the names in it before anything opens them."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from deadcheck import pickles
from deadcheck.errors import ModelFileError, TrustRequired

MAX_PICKLE = 128 << 20
_MAX_MEMBERS = 200_000
_MAX_DIRECTORY = 32 << 20
"""Bytes of a zip's table of members: each entry becomes an object of some hundred bytes."""

_USUAL_FLAGS = 0x808
"""Sizes after the data, and names in UTF-8: what torch sets."""


def first_bytes(path: Path) -> bytes:
    """Return the start of a regular file; ModelFileError with what to do for everything else."""
    try:
        if not path.exists():
            raise ModelFileError(f"{path}: no such file; check the path")
        if not path.is_file():
            raise ModelFileError(f"{path}: not a regular file; give a saved model")
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    except ValueError as error:
        raise ModelFileError(f"{str(path)!r}: not a path ({error}); check it") from error
    if not start:
        raise ModelFileError(f"{path}: the file is empty; save the model again")
    if start.startswith(b"version https://git-lfs"):
        raise ModelFileError(f"{path}: a Git LFS pointer, not the model itself; run 'git lfs pull'")
    return start


def kind_of(path: Path) -> str:
    """Return ``torch``, ``torchscript``, ``pt2``, ``safetensors`` or ``hf-dir``, from what the file holds.

    ModelFileError names every other kind of file that is known, and what to do with it.
    """
    try:
        is_folder = path.is_dir()
    except (OSError, ValueError):
        is_folder = False  # what is wrong with the path is told below
    if is_folder:
        return _folder_kind(path)
    start = first_bytes(path)
    if start.startswith(b"PK"):
        return _zip_kind(path)
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        return "safetensors"
    if start[:1] == b"\x80" or _is_old_pickle(path, start):
        return "torch"
    _refuse_other_kinds(path, start)
    raise ModelFileError(f"{path}: damaged, or no kind of model that is known; save or download the model again")


def _is_old_pickle(path: Path, start: bytes) -> bool:
    """Tell a pickle of protocol 0 or 1, which begins with any of many letters and may look like text."""
    if start[:1] not in b"(cid]})lKIJMSVXUFG" or path.stat().st_size > MAX_PICKLE:
        return False
    try:
        pickles.read(path.read_bytes(), str(path))
    except ModelFileError:
        return False
    except TrustRequired:
        return True
    return True


def is_zip(path: Path) -> bool:
    """Tell a zip by its first bytes."""
    return first_bytes(path).startswith(b"PK")


def _folder_kind(path: Path) -> str:
    try:
        names = {item.name for item in path.iterdir()}
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if "config.json" in names or any(name.endswith(".safetensors") for name in names):
        return "hf-dir"
    for is_it, what in (
        (".metadata" in names, f"a distributed checkpoint (DCP); turn it into one file first: {_FROM_DCP}"),
        ("saved_model.pb" in names, "a TensorFlow model; scan a PyTorch model"),
        ("latest" in names and any(name.startswith("global_step") for name in names),
         "a DeepSpeed checkpoint; turn it into one file with its zero_to_fp32.py first"),
        ("pytorch_model.bin.index.json" in names, "shards in pickles without a config.json; add it, or name one file"),
    ):  # fmt: skip
        if is_it:
            raise ModelFileError(f"{path}: {what}")
    raise ModelFileError(f"{path}: is a folder, not a model file; name the file in it")


_FROM_DCP = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pt"


def _refuse_other_kinds(path: Path, start: bytes) -> None:
    """Raise ModelFileError for a file that is recognised and is no PyTorch model."""
    for is_it, what in (
        (start.startswith(b"\x93NUMPY"), "a NumPy array, not a model; give it with --data"),
        (start.startswith(b"GGUF"), "a GGUF model, which torch cannot run; scan the PyTorch model it was made from"),
        (start.startswith(b"\x89HDF"), "an HDF5 file, as Keras writes, not a PyTorch model; scan a PyTorch model"),
        (path.suffix == ".onnx", "an ONNX model; scan the PyTorch model it was exported from"),
        (path.suffix in (".pb", ".tflite", ".mlmodel"), "not a PyTorch model; scan the PyTorch model it came from"),
        (start[257:262] == b"ustar", "a tar file of torch before 0.2; load and save it again with a newer torch"),
        (_is_shard_index(path, start), "the index of a sharded model, not the model; name the folder it is in"),
        (_is_html(start), "a web page, not a model; the download failed, fetch it again"),
        (_is_text(start), "text, not a model; check the path"),
    ):
        if is_it:
            raise ModelFileError(f"{path}: {what}")


def _is_shard_index(path: Path, start: bytes) -> bool:
    return path.suffix == ".json" and b"{" in start[:8] and path.name.endswith(".index.json")


def _is_html(start: bytes) -> bool:
    return start.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html"))


def _is_text(start: bytes) -> bool:
    try:
        text = start[:-3].decode() if len(start) == 512 else start.decode()
    except UnicodeDecodeError:
        return False
    return all(c.isprintable() or c in "\r\n\t" for c in text)


def unreadable(path: Path, error: OSError) -> ModelFileError:
    """Return what to say of a file that the system does not let us read."""
    return ModelFileError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions")


@dataclass(frozen=True)
class Member:
    """A member of a zip."""

    name: str
    offset: int
    """Where its bytes begin in the file."""

    size: int
    packed: bool = False
    """Whether it is compressed, as the code of a TorchScript program may be."""

    inflated: int = 0
    """Bytes that it claims to hold when it is unpacked."""

    @property
    def inner(self) -> str:
        """Name below the archive's folder."""
        return self.name.partition("/")[2]


def check_zip(path: Path, *, packed: str | None = None) -> list[Member]:
    """Return the members of a zip that torch may open, or raise ModelFileError for one that is made to deceive.

    Members whose inner name begins with ``packed`` may be compressed.
    """
    try:
        with path.open("rb") as file:
            return members_of(file, str(path), packed=packed)
    except OSError as error:
        raise unreadable(path, error) from error


def members_of(file: BinaryIO, source: str, *, packed: str | None = None) -> list[Member]:
    """Judge an open zip: stored, unique, in one folder, without odd flags, and of sizes that add up."""
    try:
        infos = _infos(file)
        size = file.seek(0, 2)
        members = [_member(file, info) for info in infos[:_MAX_MEMBERS]]
    except _ZIP_DAMAGE as error:
        raise ModelFileError(
            f"{source}: damaged, a cut-off or broken zip ({error}); save or download the model again"
        ) from error
    names = [info.filename for info in infos]
    may_pack = [packed is not None and name.partition("/")[2].startswith(packed) for name in names]
    stored = [info for info, may in zip(infos, may_pack, strict=True) if not may]
    inflated = sum(info.file_size for info, may in zip(infos, may_pack, strict=True) if may)
    ends = sorted((member.offset, member.offset + member.size) for member in members)
    for wrong, what in (
        (len(infos) > _MAX_MEMBERS, "too many members"),
        (len({name.lower() for name in names}) != len(names), "two members of one name"),
        (any(".." in name.split("/") or name.startswith(("/", "\\")) for name in names), "a member outside its folder"),
        (any(info.flag_bits & ~_USUAL_FLAGS for info in infos), "flags that torch never sets, as for encryption"),
        (any(info.compress_type != zipfile.ZIP_STORED for info in stored), "compressed members"),
        (any(info.compress_size != info.file_size for info in stored), "sizes that do not add up"),
        (inflated > MAX_PICKLE, "code that would inflate without end"),
        (any(end > size for _, end in ends), "members that are larger than the file"),
        (any(end > after for (_, end), (after, _) in pairwise(ends)), "members that overlap"),
        (
            any(member.name != info.filename for member, info in zip(members, infos, strict=False)),
            "a member of two names",
        ),
        (len({name.partition("/")[0] for name in names}) > 1, "more than one folder"),
    ):
        if wrong:
            raise ModelFileError(
                f"{source}: a zip with {what}, which torch never writes, so it was not read; save the model again"
            )
    return members


_ZIP_DAMAGE = (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error, IndexError, OverflowError)


def _infos(file: BinaryIO) -> list[zipfile.ZipInfo]:
    """Return the entries of an open zip, whose table is not read where it could take the memory."""
    end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    if end is not None and end[zipfile._ECD_SIZE] > _MAX_DIRECTORY:  # type: ignore[attr-defined]
        raise ValueError("a table of members that no model needs")
    with zipfile.ZipFile(file) as archive:
        return archive.infolist()


def entries_of(path: Path) -> list[zipfile.ZipInfo]:
    """Return the entries of a zip that was not judged; ModelFileError where it is damaged."""
    try:
        with path.open("rb") as file:
            return _infos(file)
    except _ZIP_DAMAGE as error:
        raise ModelFileError(f"{path}: damaged, a cut-off or broken zip ({error}); save it again") from error


def _member(file: BinaryIO, info: zipfile.ZipInfo) -> Member:
    """Return a member under the name and at the place that its own header gives."""
    file.seek(info.header_offset)
    header = file.read(30)
    signature, flags, length, extra = struct.unpack("<4s2xH18xHH", header)
    if signature != b"PK\x03\x04":
        raise ValueError("a member without a header")
    name = file.read(length).decode("utf-8" if flags & 0x800 else "cp437")
    place = info.header_offset + 30 + length + extra
    return Member(name, place, info.compress_size, info.compress_type != 0, info.file_size)


def needed(members: Mapping[str, Member], name: str, source: str) -> Member:
    """Return the member of that name; ModelFileError where there is none."""
    if name not in members:
        raise ModelFileError(f"{source}: a zip, but not one that torch.save writes; give what torch.save wrote")
    return members[name]


def read_member(path: Path, member: Member) -> bytes:
    """Return the bytes of a small member."""
    with path.open("rb") as file:
        return member_bytes(file, str(path), member)


def member_bytes(file: BinaryIO, source: str, member: Member, *, limit: int = MAX_PICKLE) -> bytes:
    """Return the bytes of a member of an open zip."""
    if member.size > limit:
        raise ModelFileError(f"{source}: {member.name} takes {member.size} bytes, which no model needs; not read")
    file.seek(member.offset)
    return file.read(member.size)


def _zip_kind(path: Path) -> str:
    """Tell which program wrote a zip; ModelFileError for one that is no PyTorch model."""
    if path.suffix == ".keras":
        raise ModelFileError(f"{path}: a Keras model; scan a PyTorch model")
    names = [info.filename for info in entries_of(path)]
    inner = {name.partition("/")[2] for name in names} | {name for name in names if "/" not in name}
    if "archive_format" in inner or any(name.startswith(("models/", "serialized_")) for name in inner):
        return "pt2"
    if any(name.startswith(".data/extern_modules") for name in inner):
        raise ModelFileError(
            f"{path}: a torch.package, which is a program; load it where you trust it and save it with torch.save"
        )
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        return "torchscript"
    if names and all(name.endswith(".npy") for name in names):
        raise ModelFileError(f"{path}: NumPy arrays (.npz), not a model; give them with --data")
    if "data.pkl" not in inner:
        raise ModelFileError(f"{path}: a zip, but not one that torch.save writes; give a saved model")
    return "torch"


def pickles_in(data: bytes, source: str, maker: pickles.Maker | None = None) -> list[pickles.Pickled]:
    """Read the pickles of a torch file: one in a zip; one alone, or five in a row before torch 1.6."""
    if not data.startswith(b"PK"):
        found = [pickles.read(data, source, 0, maker)]
        while found[0].root == LEGACY_MAGIC and len(found) < LEGACY_PICKLES:
            found.append(pickles.read(data, source, found[-1].stop, maker))
        return found
    members = {member.inner: member for member in members_of(BytesIO(data), source)}
    data = member_bytes(BytesIO(data), source, needed(members, "data.pkl", source))
    return [pickles.read(data, source, 0, maker)]


LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""First pickle of a torch file before torch 1.6."""

LEGACY_PICKLES = 5
"""That one, the version, the machine, what was saved, and the keys of its storages."""

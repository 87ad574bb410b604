"""Judges the archive of an exported program (.pt2) before torch opens it: what in it would run code of the file.

``torch.export.load`` unpickles weights, constants and sample inputs, loads native libraries, evaluates expressions as
Python, imports modules that a tree of inputs names, and writes names into Python source. A program that needs none of
that passes, and everything else is listed. What was judged is also all that torch is given: see ``Audited``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from deadcheck import archive, graph_text
from deadcheck.archive import Member
from deadcheck.denied import is_plain, refuse_denied
from deadcheck.errors import ModelFileError

MODEL = "models/model.json"
"""The program in the archive that ``torch.export.load`` returns."""

SAMPLE = "data/sample_inputs/model.pt"
TABLES = {"data/weights/": "model_weights_config.json", "data/constants/": "model_constants_config.json"}
"""Folders of tensors, and the table in each that says what its files are."""

LEGACY = tuple(f"{folder}model.pt" for folder in TABLES)
"""Pickles that stand for a table and its files in what torch 2.8 wrote."""

_MAX_MARKS = 5_000_000
"""Brackets and commas of a JSON text: each may become an object."""

_ITEM_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 2, 7: 4, 8: 8, 9: 4, 10: 8, 11: 16, 12: 1, 13: 2, 28: 2, 29: 1, 30: 1,
               31: 1, 32: 1, 33: 1, 34: 4, 35: 8}  # fmt: skip
"""Bytes of an element, by the number of its type in the schema of torch.export."""

_SHARES, _SPARE = 4, 256 << 20
_KEPT = ("stack_trace", "nn_module_stack", "torch_fn")
"""What is kept of the notes on an operator; the rest is looked up in torch, or parsed."""


@dataclass(frozen=True)
class Audited:
    """What an archive holds."""

    dangers: tuple[str, ...]
    """What in it would run code of the file, in words; empty for one that may be loaded."""

    needs: tuple[str, ...]
    """Classes outside torch that its inputs or outputs are made of."""

    members: dict[str, Member]
    """Every member, by its name below the archive's folder."""

    documents: dict[str, Any]
    """The program and the tables of its tensors, as parsed and judged, by the names of their members."""

    pickles: tuple[str, ...]
    """Members that torch unpickles: nothing but tensors, containers and numbers where nothing is dangerous."""

    @property
    def has_sample(self) -> bool:
        """Whether it holds the inputs it was exported with."""
        return SAMPLE in self.members

    def payloads(self) -> Iterator[str]:
        """Yield the members that hold the numbers of tensors."""
        for folder, table in TABLES.items():
            for _, meta in entries(self.documents.get(folder + table)):
                yield folder + meta["path_name"]


def audit(file: BinaryIO, source: str) -> Audited:
    """Judge an archive; ModelFileError where it is damaged or no program is in it, TrustRequired for what is denied."""
    members = {member.inner: member for member in archive.members_of(file, source)}
    if not any(name.startswith("models/") for name in members):
        raise ModelFileError(f"{source}: an exported program of torch before 2.7, or none at all; export it again")
    if MODEL not in members:
        raise ModelFileError(f"{source}: holds no program called 'model'; save it with torch.export.save")
    pickled = tuple(name for name in (*LEGACY, SAMPLE) if name in members)
    tables = [folder + table for folder, table in TABLES.items() if f"{folder}model.pt" not in members]
    documents = {name: _parsed(file, source, name, members.get(name)) for name in (MODEL, *tables)}
    if not isinstance(_module(documents[MODEL]), dict):
        raise ModelFileError(f"{source}: damaged, {MODEL} describes no program; export it again")
    judge = graph_text.Judge()
    judge.program(documents[MODEL])
    dangers = [*judge.dangers]
    for name in tables:
        dangers += _judged_table(documents[name], name, members, judge, source)
    dangers += _code_in(members)
    for name in pickled:
        dangers += _judged_pickle(archive.member_bytes(file, source, members[name]), name, source)
    _check_memory(documents, tables, file.seek(0, 2), source)
    _drop_notes(documents[MODEL])
    return Audited(tuple(dict.fromkeys(dangers)), tuple(sorted(judge.needs)), members, documents, pickled)


def _module(document: Any) -> Any:
    return document.get("graph_module") if isinstance(document, dict) else None


def entries(table: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name of the tensor, what is said of it) of a table that was judged."""
    if table is not None:
        yield from table["config"].items()


def _code_in(members: dict[str, Member]) -> Iterator[str]:
    for name in members:
        suffix = PurePosixPath(name).suffix.lower()
        if name.lower().startswith("data/aotinductor/") or suffix in (".so", ".o", ".dll", ".dylib", ".cubin"):
            yield f"{name} is compiled code"


def _judged_table(
    table: Any, name: str, members: dict[str, Member], judge: graph_text.Judge, source: str
) -> Iterator[str]:
    """Yield what is dangerous in a table of tensors; ModelFileError where it is no such table."""
    folder = name.rpartition("/")[0] + "/"
    config = table.get("config") if isinstance(table, dict) else None
    if not isinstance(config, dict) or not all(isinstance(meta, dict) for meta in config.values()):
        raise ModelFileError(f"{source}: damaged, {name} is no table of tensors; export the program again")
    for key, meta in config.items():
        path = meta.get("path_name")
        if not isinstance(path, str) or not re.fullmatch(r"[A-Za-z0-9_]+", path) or folder + path not in members:
            raise ModelFileError(f"{source}: damaged, the file of the tensor {key[:80]!r} is missing; export it again")
        if meta.get("use_pickle") or not path.startswith(("weight_", "tensor_")):
            yield f"{folder}{path} is a pickled object"
        judge.path("the name of a tensor", key)
        judge.walk("", meta)


def _judged_pickle(data: bytes, name: str, source: str) -> Iterator[str]:
    """Yield what is dangerous in a pickle that torch reads."""
    names = {name for pickled in archive.pickles_in(data, f"{source}: {name}") for name in pickled.globals}
    refuse_denied(f"{source}: {name}", names)
    for strange in sorted(name for name in names if not is_plain(name)):
        yield f"{name} is a pickle that names {strange}"


def _parsed(file: BinaryIO, source: str, name: str, member: Member | None) -> Any:
    if member is None:
        raise ModelFileError(f"{source}: damaged, {name} is missing; export the program again")
    data = archive.member_bytes(file, source, member)
    if sum(data.count(mark) for mark in (b"[", b"{", b",")) > _MAX_MARKS:
        raise ModelFileError(f"{source}: {name} holds more than any program needs; not read")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{source}: damaged, {name} cannot be read; export the program again") from error


def _check_memory(documents: dict[str, Any], tables: list[str], size: int, source: str) -> None:
    """Refuse tensors that would take memory out of nothing: a size of its own for each, and one number behind it."""
    taken = 0
    for name in tables:
        for key, meta in entries(documents[name]):
            try:
                tensor = meta.get("tensor_meta") or {"sizes": [], "dtype": 0}
                shape = [item["as_int"] for item in tensor["sizes"]]
                if not all(type(number) is int and 0 <= number < 1 << 60 for number in shape):
                    raise ValueError
                taken += math.prod(shape) * _ITEM_SIZES.get(tensor["dtype"], 16)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelFileError(
                    f"{source}: damaged, the tensor {key[:80]!r} has no shape; export the program again"
                ) from error
    if taken > _SHARES * size + _SPARE:
        raise ModelFileError(
            f"{source}: its tensors would take {taken} bytes of memory, out of a file of {size}; not read"
        )


def _drop_notes(program: Any) -> None:
    """Take out what no forward pass needs, and what torch looks up, parses or runs."""
    program["guards_code"] = []
    program["graph_module"]["metadata"] = {}
    for node in graph_text.nodes(program):
        notes = node.get("metadata")
        notes = notes if isinstance(notes, dict) else {}
        node["metadata"] = {key: notes[key] for key in _KEPT if isinstance(notes.get(key), str)}

"""Looks at TorchScript and exported programs."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deadcheck import archive, pickles
from deadcheck.archive import Member
from deadcheck.audit import MODEL, TABLES, audit, entries
from deadcheck.denied import is_plain, refuse_denied
from deadcheck.errors import ModelFileError
from deadcheck.graph_text import nodes
from deadcheck.inspectors.base import Found, TensorInfo
from deadcheck.inspectors.of_saved import Describer, say_refusal
from deadcheck.module_tree import MAX_DEPTH, items
from deadcheck.pickles import Inert

_OPERATORS = re.compile(
    r"\b(relu6?_?|leaky_relu_?|prelu|rrelu|elu_?|selu_?|celu_?|gelu|silu_?|mish|softplus|hardswish_?|glu|sigmoid_?|tanh_?"
    r"|hardsigmoid_?|hardtanh_?|clamp_?|clamp_min_?|threshold_?)\b"
)
_MAX_FOUND = 100_000
_MAX_LETTERS = 32 << 20
"""Letters in the paths of a program's weights together."""


def look_at_torchscript(path: Path, found: Found) -> None:
    """Say what a TorchScript program holds and calls; its code is read, not run."""
    found.kind, found.what = "torchscript", "a TorchScript program"
    found.flags.append("--trust")
    found.refused = True
    found.problems.append("is a program, which can write files and run whatever it holds")
    members = {member.inner: member for member in archive.check_zip(path, packed="code/")}
    for name, member in sorted(members.items()):
        if name.startswith("code/") and name.endswith(".py"):
            _look_at_code(name, _text(path, member), found)
    if "data.pkl" in members:
        read = pickles.read(archive.read_member(path, members["data.pkl"]), str(path), maker=Describer())
        found.names |= {name for name in read.globals if not name.startswith("__torch__.") and not _is_usual(name)}
        say_refusal(found, path, lambda: refuse_denied(str(path), found.names))
        _walk(read.root, str(path), found)
    if "constants.pkl" in members:
        read = pickles.read(archive.read_member(path, members["constants.pkl"]), str(path), maker=Describer())
        for number, value in enumerate(read.root if isinstance(read.root, tuple) else ()):
            if isinstance(value, TensorInfo):
                found.tensors.append(TensorInfo(f"CONSTANTS.c{number}", value.dtype, value.shape))


def _look_at_code(name: str, code: str, found: Found) -> None:
    for match in _OPERATORS.finditer(code):
        if len(found.activations) < _MAX_FOUND:
            found.activations.append((name, match[0]))
    if re.search(r"\bops\.(?!prim\b|aten\b|quantized\b)\w+\.", code):
        found.problems.append(f"{name} calls operators that are not torch's own")
    if re.search(r"\bsave\(|from_file\(", code):
        found.problems.append(f"{name} writes or reads files")


def _is_usual(name: str) -> bool:
    return is_plain(name) or name.startswith("torch.jit._pickle.")


def _text(path: Path, member: Member) -> str:
    data = archive.read_member(path, member)
    if member.packed:
        try:
            data = zlib.decompressobj(-15).decompress(data, member.inflated)
        except zlib.error as error:
            raise ModelFileError(f"{path}: damaged, {member.inner} cannot be inflated; save it again") from error
    return data.decode("utf-8", "replace")


def _walk(root: Any, source: str, found: Found) -> None:
    """Go through the objects of a program without recursion, each of them once."""
    queue: list[tuple[Any, str]] = [(root, "")]
    met: set[int] = set()
    letters = 0
    while queue:
        node, path = queue.pop()
        if isinstance(node, TensorInfo):
            found.tensors.append(TensorInfo(path, node.dtype, node.shape))
        if not isinstance(node, Inert) or id(node) in met or path.count(".") > MAX_DEPTH:
            continue
        met.add(id(node))
        if node.name.startswith("__torch__."):
            name = re.sub(r"___torch_mangle_\d+\.", "", node.name).removeprefix("__torch__.")
            found.classes[name] = found.classes.get(name, 0) + 1
        children = [(value, f"{path}.{key}" if path else key) for key, value in items(node.state)]
        letters += sum(len(where) for _, where in children)
        if letters > _MAX_LETTERS:
            raise ModelFileError(f"{source}: holds names longer than any program has; not read further")
        queue += reversed(children)


def look_at_export(path: Path, found: Found) -> None:
    """Say what an exported program holds, and what of it would run."""
    found.kind, found.what = "pt2", "an exported program"
    with path.open("rb") as file:
        judged = audit(file, str(path))
    found.problems += judged.dangers
    for node in nodes(judged.documents[MODEL]):
        name = str(node.get("target", "")).removeprefix("torch.ops.aten.").partition(".")[0]
        if _OPERATORS.fullmatch(name):
            stack = str(node["metadata"].get("nn_module_stack", "")).split(";")[-1].split(",")
            found.activations.append((stack[1] if len(stack) > 1 else "", name))
    for folder, table in TABLES.items():
        found.tensors += [_tensor_of(key, meta) for key, meta in entries(judged.documents.get(folder + table))]
    found.has_sample = judged.has_sample
    if judged.dangers:
        found.refused = True
        found.flags.append("--trust")
    if judged.needs:
        found.refused = True
        found.problems.append(f"its inputs or outputs are made of {', '.join(judged.needs)}")
        found.flags += [f"--allow-class {name}" for name in judged.needs]


_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
          9: "complex32", 10: "complex64", 11: "complex128", 12: "bool", 13: "bfloat16"}  # fmt: skip


def _tensor_of(name: str, meta: Mapping[str, Any]) -> TensorInfo:
    tensor = meta.get("tensor_meta") or {"sizes": (), "dtype": 0}
    return TensorInfo(name, _TYPES.get(tensor["dtype"], "pickled"), tuple(size["as_int"] for size in tensor["sizes"]))

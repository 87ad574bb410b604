"""Says what a model file holds and names, what is wrong with it and how to scan it; runs nothing, needs no torch."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from deadcheck import archive, pickles
from deadcheck.archive import Member
from deadcheck.audit import MODEL, audit
from deadcheck.errors import DeadcheckError, ModelFileError, TrustRequired
from deadcheck.pickles import Inert, Stored

_SUFFIXES = (".sample.npz", ".sample.pt", ".sample.safetensors", ".sample.npy")
_WRAPPERS = ("module.", "_orig_mod.")
_MAX_WALK = 1_000_000
_MAX_DEPTH = 100

ACTIVATIONS = frozenset(
    ("ReLU", "ReLU6", "LeakyReLU", "PReLU", "RReLU", "ELU", "SELU", "CELU", "GELU", "SiLU", "Mish", "Softplus",
     "Hardswish", "GLU", "Sigmoid", "Tanh", "Hardsigmoid", "Hardtanh", "LogSigmoid", "Threshold", "Hardshrink",
     "Softshrink")
)  # fmt: skip
"""Classes of ``torch.nn.modules.activation`` that are activations."""

_OPERATORS = re.compile(
    r"\b(relu6?_?|leaky_relu_?|prelu|rrelu|elu_?|selu_?|celu_?|gelu|silu_?|mish|softplus|hardswish_?|glu|sigmoid_?|tanh_?"
    r"|hardsigmoid_?|hardtanh_?|clamp_?|clamp_min_?|threshold_?)\b"
)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that a file claims to hold."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Inspection:
    """What a file claims to hold and the names it would import; made without building anything."""

    path: str
    bytes: int
    kind: str
    """``torch-module``, ``state-dict``, ``checkpoint``, ``torchscript``, ``pt2``, ``safetensors`` or ``hf-dir``."""

    what: str
    """The same in words."""

    tensors: tuple[TensorInfo, ...] = ()
    classes: tuple[tuple[str, int], ...] = ()
    """Classes of modules that it names, and how many modules of each."""

    names: tuple[str, ...] = ()
    """Other classes and functions that it names."""

    activations: tuple[tuple[str, str], ...] = ()
    """(module path or place, activation), as far as the file tells."""

    entries: tuple[tuple[str, str], ...] = ()
    """Entries of a checkpoint, and what each holds."""

    prefix: str | None = None
    """Prefix that a wrapper left on the names of the weights."""

    sample: str | None = None
    """The sample that a scan would use."""

    problems: tuple[str, ...] = ()
    """What is wrong with it, or would run; empty for a file that is fine."""

    refused: bool = False
    """Whether a scan would refuse it as it is."""

    next: str = ""
    """The command to type next; empty where there is none."""


@dataclass
class _Found:
    """What is put together while a file is read."""

    kind: str = ""
    what: str = ""
    tensors: list[TensorInfo] = field(default_factory=list)
    classes: dict[str, int] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    activations: list[tuple[str, str]] = field(default_factory=list)
    entries: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    refused: bool = False
    has_sample: bool = False
    """Whether the file itself holds inputs to run it on."""


def inspect(path: Path) -> Inspection:
    """Look at a model file; ModelFileError for what is no model, with what it is and what to do with it."""
    kind = archive.kind_of(path)
    found = _Found()
    try:
        _READERS[kind](path, found)
    except DeadcheckError as error:
        found.kind = found.kind or kind
        found.what = found.what or _WORDS.get(kind, kind)
        found.problems.append(str(error).removeprefix(f"{path}: "))
        found.refused = found.refused or isinstance(error, TrustRequired)
    sample = next((p for s in _SUFFIXES if (p := path.with_name(_stem(path) + s)).is_file()), None)
    size = sum(f.stat().st_size for f in path.iterdir() if f.is_file()) if path.is_dir() else path.stat().st_size
    return Inspection(
        path=str(path),
        bytes=size,
        kind=found.kind,
        what=found.what,
        tensors=tuple(found.tensors),
        classes=tuple(sorted(found.classes.items())),
        names=tuple(sorted(found.names - set(found.classes))),
        activations=tuple(found.activations),
        entries=tuple(found.entries),
        prefix=_prefix([tensor.name for tensor in found.tensors]),
        sample=None if sample is None else str(sample),
        problems=tuple(found.problems),
        refused=found.refused,
        next=_next(path, found, has_sample=found.has_sample or sample is not None),
    )


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def _next(path: Path, found: _Found, *, has_sample: bool) -> str:
    usable = not found.problems or found.flags
    if not usable:
        return ""
    data = [] if has_sample else ["--data DATA"]
    name = str(path)
    quoted = name if re.fullmatch(r"[\w./\\-]+", name) else "'" + name.replace("'", "'\\''") + "'"
    return " ".join(["deadcheck scan", quoted, *found.flags, *data])


def _prefix(names: list[str]) -> str | None:
    for prefix in _WRAPPERS:
        if names and all(name.startswith(prefix) for name in names):
            return prefix
    return "_orig_mod." if any("_orig_mod." in name for name in names) else None


# Files of torch.save.


class _Describer(pickles.Maker):
    """Turns the calls that make tensors into descriptions of them."""

    def called(self, name: str, args: Any) -> Any:
        """Return a description of a tensor, the plain value, or an inert record."""
        if name.startswith("torch._utils._rebuild_tensor") and isinstance(args, tuple) and len(args) > 2:
            return _described(args)
        if name.startswith("torch._utils._rebuild_parameter") and isinstance(args, tuple) and args:
            return args[0]
        if name == "torch._utils._rebuild_qtensor" and isinstance(args, tuple) and len(args) > 2:
            return _described(args)
        if name in ("collections.OrderedDict", "builtins.dict", "collections.defaultdict"):
            return pickles.ordered(args)
        return super().called(name, args)


def _described(args: tuple[Any, ...]) -> Any:
    storage, _, shape = args[:3]
    whole = isinstance(shape, tuple) and all(type(size) is int and 0 <= size < 1 << 60 for size in shape)
    if not isinstance(storage, Stored) or not whole:
        return Inert("torch.Tensor", args)
    return TensorInfo("", _dtype(storage.kind), shape)


def _dtype(storage: str) -> str:
    name = storage.rpartition(".")[2].removesuffix("Storage").lower()
    return {"float": "float32", "double": "float64", "half": "float16", "long": "int64", "int": "int32",
            "short": "int16", "char": "int8", "byte": "uint8", "cdouble": "complex128"}.get(name, name)  # fmt: skip


def _read_torch(path: Path, found: _Found) -> None:
    found.kind, found.what = "torch", _WORDS["torch"]
    read = _read_zip_pickle if archive.is_zip(path) else _read_old_pickle
    inert = read(path)
    found.names = {name for name in inert.globals if not archive.is_plain(name)}
    _say_denied(path, found)
    if _is_module(inert.root):
        found.kind, found.what = "torch-module", "a whole pickled module"
        _walk_module(inert.root, found)
        _say_classes(path, found)
    elif isinstance(inert.root, Mapping):
        _read_mapping(inert.root, found)
    else:
        found.problems.append(f"holds a {_type(inert.root)}, which is neither a model nor its weights")


def _read_zip_pickle(path: Path) -> pickles.Pickled:
    members = {member.inner: member for member in archive.check_zip(path)}
    if "data.pkl" not in members:
        raise ModelFileError(f"{path}: a zip, but not one that torch.save writes")
    return pickles.read(archive.read_member(path, members["data.pkl"]), str(path), maker=_Describer())


def _read_old_pickle(path: Path) -> pickles.Pickled:
    with path.open("rb") as file:
        data = file.read(archive.MAX_PICKLE)
    first = pickles.read(data, str(path), maker=_Describer())
    if first.root != archive.LEGACY_MAGIC:
        return first
    version = pickles.read(data, str(path), first.stop)
    system = pickles.read(data, str(path), version.stop)
    return pickles.read(data, str(path), system.stop, _Describer())


def _say_denied(path: Path, found: _Found) -> None:
    try:
        archive.refuse_denied(str(path), found.names)
    except TrustRequired as error:
        found.problems.append(str(error).removeprefix(f"{path}: "))
        found.refused = True


def _is_module(value: Any) -> bool:
    return isinstance(value, Inert) and isinstance(value.state, dict) and "_parameters" in value.state


def _walk_module(root: Inert, found: _Found) -> None:
    """Go through a tree of modules without recursion; shared modules are met under each of their paths once."""
    queue: list[tuple[Inert, str]] = [(root, "")]
    met: set[tuple[int, str]] = set()
    while queue and len(met) < _MAX_WALK:
        node, path = queue.pop()
        state = node.state
        if (id(node), path) in met or not isinstance(state, dict) or path.count(".") > _MAX_DEPTH:
            continue
        met.add((id(node), path))
        found.classes[node.name] = found.classes.get(node.name, 0) + 1
        package, _, name = node.name.rpartition(".")
        if package == "torch.nn.modules.activation" and name in ACTIVATIONS:
            found.activations.append((path, name))
        for table in ("_parameters", "_buffers"):
            for key, value in _items(state.get(table)):
                if isinstance(value, TensorInfo):
                    found.tensors.append(TensorInfo(f"{path}.{key}" if path else key, value.dtype, value.shape))
        children = [(child, f"{path}.{key}" if path else key) for key, child in _items(state.get("_modules"))]
        queue += [(child, name) for child, name in reversed(children) if isinstance(child, Inert)]


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key), item


def _say_classes(path: Path, found: _Found) -> None:
    """Say which classes of the file a scan needs to be told of."""
    own = sorted(name for name in found.classes if not name.startswith("torch."))
    if not own:
        return
    found.refused = True
    module, _, name = own[0].rpartition(".")
    if module == "__main__":
        found.problems.append(f"{own[0]} is a class of the script that saved it, and a class is code")
        found.flags.append(f"--arch FILE.py:{name}")
        return
    found.problems.append(f"{', '.join(own[:3])} is no class of torch, and a class is code")
    found.flags += [f"--allow-class {name}" for name in own]


def _read_mapping(data: Mapping[Any, Any], found: _Found) -> None:
    if _is_weights(data):
        found.kind, found.what = "state-dict", "a state dict: weights without the code that runs them"
        found.tensors = [TensorInfo(str(k), v.dtype, v.shape) for k, v in data.items() if isinstance(v, TensorInfo)]
        found.flags.append("--arch FILE.py:FACTORY")
        return
    found.kind, found.what = "checkpoint", "a checkpoint"
    found.entries = [(str(key), _holds(value)) for key, value in list(data.items())[:1000]]
    holding = [(str(key), value) for key, value in data.items() if _is_weights(value) or _is_module(value)]
    if not holding:
        found.problems.append("no entry of it looks like weights or a module")
    for _, value in holding[:1]:
        if _is_module(value):
            _walk_module(value, found)
        else:
            found.tensors = [
                TensorInfo(str(k), v.dtype, v.shape) for k, v in value.items() if isinstance(v, TensorInfo)
            ]
            found.flags.append("--arch FILE.py:FACTORY")
    if len(holding) > 1:
        found.flags.append(f"--key {holding[0][0]}")


def _is_weights(value: Any) -> bool:
    if not isinstance(value, Mapping) or not value or {"param_groups", "state"} <= set(map(str, value)):
        return False
    return 2 * sum(isinstance(item, TensorInfo) for item in value.values()) > len(value)


def _holds(value: Any) -> str:
    if _is_module(value):
        return f"a module, {value.name}"
    if _is_weights(value):
        return f"weights, {sum(isinstance(item, TensorInfo) for item in value.values())} tensors"
    if isinstance(value, TensorInfo):
        return f"a tensor, {'x'.join(map(str, value.shape)) or 'one number'} {value.dtype}"
    if isinstance(value, (Mapping, list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, (int, float, bool, str)) or value is None:
        return str(value)[:60]
    return f"a {_type(value)}"


def _type(value: Any) -> str:
    return value.name if isinstance(value, (Inert, pickles.Global)) else type(value).__name__


# Programs.


def _read_torchscript(path: Path, found: _Found) -> None:
    found.kind, found.what = "torchscript", "a TorchScript program"
    found.flags.append("--trust")
    found.refused = True
    found.problems.append("is a program, which can write files and run whatever it holds")
    members = {member.inner: member for member in archive.check_zip(path, packed="code/")}
    for name, member in sorted(members.items()):
        if name.startswith("code/") and name.endswith(".py"):
            code = _text(path, member)
            found.activations += [(name, match) for match in _OPERATORS.findall(code)]
            if re.search(r"\bops\.(?!prim\b|aten\b|quantized\b)\w+\.", code):
                found.problems.append(f"{name} calls operators that are not torch's own")
            if re.search(r"\bsave\(|from_file\(", code):
                found.problems.append(f"{name} writes or reads files")
    if "data.pkl" in members:
        read = pickles.read(archive.read_member(path, members["data.pkl"]), str(path), maker=_Describer())
        _walk_program(read.root, found)
        found.names |= {name for name in read.globals if not name.startswith("__torch__.") and not _is_usual(name)}
        _say_denied(path, found)
    if "constants.pkl" in members:
        read = pickles.read(archive.read_member(path, members["constants.pkl"]), str(path), maker=_Describer())
        for number, value in enumerate(read.root if isinstance(read.root, tuple) else ()):
            if isinstance(value, TensorInfo):
                found.tensors.append(TensorInfo(f"CONSTANTS.c{number}", value.dtype, value.shape))


def _is_usual(name: str) -> bool:
    return archive.is_plain(name) or name.startswith("torch.jit._pickle.")


def _text(path: Path, member: Member) -> str:
    data = archive.read_member(path, member)
    if member.packed:
        data = zlib.decompressobj(-15).decompress(data, archive.MAX_PICKLE)
    return data.decode("utf-8", "replace")


def _walk_program(root: Any, found: _Found) -> None:
    queue: list[tuple[Any, str]] = [(root, "")]
    met: set[int] = set()
    while queue and len(met) < _MAX_WALK:
        node, path = queue.pop()
        if not isinstance(node, Inert) or id(node) in met or path.count(".") > _MAX_DEPTH:
            continue
        met.add(id(node))
        if node.name.startswith("__torch__."):
            name = re.sub(r"___torch_mangle_\d+\.", "", node.name).removeprefix("__torch__.")
            found.classes[name] = found.classes.get(name, 0) + 1
        for key, value in reversed(list(_items(node.state))):
            where = f"{path}.{key}" if path else key
            if isinstance(value, TensorInfo):
                found.tensors.insert(0, TensorInfo(where, value.dtype, value.shape))
            queue.append((value, where))


def _read_pt2(path: Path, found: _Found) -> None:
    found.kind, found.what = "pt2", "an exported program"
    data = BytesIO(path.read_bytes())
    judged = audit(data, str(path))
    found.problems += judged.dangers
    members = {member.inner: member for member in archive.members_of(data, str(path))}
    program = json.loads(archive.member_bytes(data, str(path), members[MODEL]))
    for node in _nodes(program):
        name = str(node.get("target", "")).removeprefix("torch.ops.aten.").partition(".")[0]
        if _OPERATORS.fullmatch(name):
            stack = str((node.get("metadata") or {}).get("nn_module_stack", "")).split(";")[-1].split(",")
            found.activations.append((stack[1] if len(stack) > 1 else "", name))
    for name, member in members.items():
        if name.endswith("_config.json"):
            for key, item in _items(json.loads(archive.member_bytes(data, str(path), member)).get("config")):
                found.tensors.append(_tensor_of_config(key, item))
    found.has_sample = judged.has_sample
    if judged.dangers:
        found.refused = True
        found.flags.append("--trust")
    if judged.needs:
        found.refused = True
        found.problems.append(f"its inputs or outputs are made of {', '.join(judged.needs)}")
        found.flags += [f"--allow-class {name}" for name in judged.needs]


def _nodes(program: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the nodes of a program's graphs, those of its branches too."""
    queue = [program]
    while queue:
        value = queue.pop()
        if isinstance(value, dict):
            if "target" in value:
                yield value
            queue += value.values()
        elif isinstance(value, list):
            queue += reversed(value)


_PT2_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
              9: "complex32", 10: "complex64", 11: "complex128", 12: "bool", 13: "bfloat16"}  # fmt: skip


def _tensor_of_config(name: str, item: Any) -> TensorInfo:
    meta = item.get("tensor_meta") or {} if isinstance(item, Mapping) else {}
    sizes = tuple(size.get("as_int", 0) for size in meta.get("sizes", ()) if isinstance(size, Mapping))
    return TensorInfo(name, _PT2_TYPES.get(meta.get("dtype", 0), "pickled"), sizes)


# Weights alone.


def _read_safetensors(path: Path, found: _Found) -> None:
    found.kind, found.what = "safetensors", "safetensors: weights without the code that runs them"
    found.flags.append("--arch FILE.py:FACTORY")
    found.tensors = list(_header(path))


def _header(path: Path) -> Iterator[TensorInfo]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(name)
                yield TensorInfo(name, _SAFE_TYPES.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape()))
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise ModelFileError(f"{path}: damaged safetensors ({str(error)[:200]}); download the model again") from error


_SAFE_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
               "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}  # fmt: skip


def _read_folder(path: Path, found: _Found) -> None:
    found.kind, found.what = "hf-dir", "a Hugging Face folder"
    for shard in sorted(path.glob("*.safetensors")):
        found.tensors += _header(shard)
    if not (path / "config.json").is_file():
        found.flags.append("--arch FILE.py:FACTORY")
        return
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: its config.json is damaged ({str(error)[:100]})") from error
    if not isinstance(config, dict):
        raise ModelFileError(f"{path}: its config.json holds no table of settings")
    found.what += f" ({config.get('model_type', 'of an unnamed type')})"
    names = config.get("architectures")
    found.names = {str(name) for name in names} if isinstance(names, list) else set()
    if act := config.get("hidden_act") or config.get("activation_function"):
        found.activations.append(("", str(act)))
    if "auto_map" in config:
        found.refused = True
        found.problems.append("its model is code that comes with the folder, which is never run")
        found.flags.append("--arch FILE.py:FACTORY")
    if not found.tensors:
        found.problems.append("holds no .safetensors file")


_READERS: dict[str, Callable[[Path, _Found], None]] = {
    "torch": _read_torch,
    "torchscript": _read_torchscript,
    "pt2": _read_pt2,
    "safetensors": _read_safetensors,
    "hf-dir": _read_folder,
}
_WORDS = {
    "torch": "a file of torch.save",
    "torchscript": "a TorchScript program",
    "pt2": "an exported program",
    "safetensors": "safetensors",
    "hf-dir": "a Hugging Face folder",
}

"""Looks at what ``torch.save`` wrote: a whole module, a state dict, or a checkpoint that holds one of them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deadcheck import archive, module_tree, pickles
from deadcheck.denied import is_plain, refuse_denied
from deadcheck.errors import TrustRequired
from deadcheck.inspectors.base import Found, TensorInfo
from deadcheck.module_tree import is_module
from deadcheck.pickles import Inert, Stored

ACTIVATIONS = frozenset(
    ("ReLU", "ReLU6", "LeakyReLU", "PReLU", "RReLU", "ELU", "SELU", "CELU", "GELU", "SiLU", "Mish", "Softplus",
     "Hardswish", "GLU", "Sigmoid", "Tanh", "Hardsigmoid", "Hardtanh", "LogSigmoid", "Threshold", "Hardshrink",
     "Softshrink")
)  # fmt: skip
"""Classes of ``torch.nn.modules.activation`` that are activations."""

_MAX_ENTRIES = 1000


class Describer(pickles.Maker):
    """Turns the calls that make tensors into descriptions of them."""

    def called(self, name: str, args: Any) -> Any:
        """Return a description of a tensor, or an inert record."""
        if name in _TENSORS and isinstance(args, tuple) and len(args) > 2:
            return _described(args)
        if name.startswith("torch._utils._rebuild_parameter") and isinstance(args, tuple) and args:
            return args[0]
        return super().called(name, args)


_TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3",
            "torch._utils._rebuild_qtensor")  # fmt: skip


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


def look_at_saved(path: Path, found: Found) -> None:
    """Say what a file of ``torch.save`` holds, the format before torch 1.6 included."""
    found.kind, found.what = "torch", "a file of torch.save"
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            members = {member.inner: member for member in archive.members_of(file, str(path))}
            data = archive.member_bytes(file, str(path), archive.needed(members, "data.pkl", str(path)))
        else:
            file.seek(0)
            data = file.read(archive.MAX_PICKLE)
    parts = archive.pickles_in(data, str(path), Describer())
    found.names = {name for part in parts for name in part.globals if not is_plain(name)}
    say_refusal(found, path, lambda: refuse_denied(str(path), found.names))
    root = parts[3].root if len(parts) == archive.LEGACY_PICKLES else parts[0].root
    if is_module(root):
        found.kind, found.what = "torch-module", "a whole pickled module"
        _look_at_module(path, root, found)
    elif isinstance(root, Mapping):
        _look_at_mapping(path, root, found)
    else:
        found.problems.append(f"holds a {_type(root)}, which is neither a model nor its weights")


def say_refusal(found: Found, path: Path, judge: Callable[[], None]) -> None:
    """Note what a judge refuses for good, and go on."""
    try:
        judge()
    except TrustRequired as error:
        found.problems.append(str(error).removeprefix(f"{path}: "))
        found.refused = found.is_hopeless = True


def _look_at_module(path: Path, root: Inert, found: Found) -> None:
    def walk() -> None:
        for where, node in module_tree.walk(root, str(path)):
            _look_at_one(where, node, found)
        module_tree.check(root, str(path))

    say_refusal(found, path, walk)
    if not found.is_hopeless:
        _say_classes(found)


def _look_at_one(path: str, node: Inert, found: Found) -> None:
    found.classes[node.name] = found.classes.get(node.name, 0) + 1
    package, _, name = node.name.rpartition(".")
    if package == "torch.nn.modules.activation" and name in ACTIVATIONS:
        found.activations.append((path, name))
    state = node.state if isinstance(node.state, dict) else {}
    for table in ("_parameters", "_buffers"):
        for key, value in module_tree.items(state.get(table)):
            if isinstance(value, TensorInfo):
                found.tensors.append(TensorInfo(f"{path}.{key}" if path else key, value.dtype, value.shape))


def _say_classes(found: Found) -> None:
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


def _look_at_mapping(path: Path, data: Mapping[Any, Any], found: Found) -> None:
    if is_weights(data):
        found.kind, found.what = "state-dict", "a state dict: weights without the code that runs them"
        found.tensors = _tensors(data)
        found.flags.append("--arch FILE.py:FACTORY")
        return
    found.kind, found.what = "checkpoint", "a checkpoint"
    looked: dict[int, bool] = {}  # one and the same dict may stand under a million names
    holding = []
    for key, value in data.items():
        if id(value) not in looked:
            looked[id(value)] = is_module(value) or is_weights(value)
        if looked[id(value)]:
            holding.append((str(key), value))
        if len(found.entries) < _MAX_ENTRIES:
            found.entries.append((str(key), _holds(value, is_holding=looked[id(value)])))
    if not holding:
        found.problems.append("no entry of it looks like weights or a module")
        return
    key, value = holding[0]
    if is_module(value):
        _look_at_module(path, value, found)
    else:
        found.tensors = _tensors(value)
        found.flags.append("--arch FILE.py:FACTORY")
    if len(holding) > 1:
        found.flags.append(f"--key {shlex.quote(key)}")


def _tensors(data: Mapping[Any, Any]) -> list[TensorInfo]:
    return [TensorInfo(str(key), item.dtype, item.shape) for key, item in data.items() if isinstance(item, TensorInfo)]


def is_weights(value: Any) -> bool:
    """Tell a state dict: names to tensors, most of all; an optimiser's state is none."""
    if not isinstance(value, Mapping) or not value or ("param_groups" in value and "state" in value):
        return False
    return 2 * sum(isinstance(item, TensorInfo) for item in value.values()) > len(value)


def _holds(value: Any, *, is_holding: bool) -> str:
    if is_module(value):
        return f"a module, {value.name}"
    if is_holding:
        return f"weights, {sum(isinstance(item, TensorInfo) for item in value.values())} tensors"
    if isinstance(value, TensorInfo):
        return f"a tensor, {'x'.join(map(str, value.shape)) or 'one number'} {value.dtype}"
    if isinstance(value, (Mapping, list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    if type(value) is int and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, (int, float, bool, str)) or value is None:
        return str(value)[:60]
    return f"a {_type(value)}"


def _type(value: Any) -> str:
    return value.name if isinstance(value, (Inert, pickles.Global)) else type(value).__name__

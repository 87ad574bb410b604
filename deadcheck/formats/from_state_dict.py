"""Loads weights into a model that the user's own code builds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deadcheck.boundary import tensors_in
from deadcheck.entrypoint import build
from deadcheck.errors import ArchitectureError, UsageError
from deadcheck.formats.base import LoadedModel, LoadOptions, identity_of
from deadcheck.module_tree import is_module
from deadcheck.pickles import Global, Inert
from deadcheck.safe_text import brief

_AVERAGED = "n_averaged"
"""How many weights a ``torch.optim.swa_utils.AveragedModel`` is the mean of."""
_OPTIMISER = ("param_groups", "state")

LARGE = 256 << 20
"""Bytes of weights from which the model is built without memory of its own, and takes the file's pages."""


def load_weights(path: Path, state: Mapping[str, Tensor], options: LoadOptions, format_name: str) -> LoadedModel:
    """Build the architecture and load the weights into it, every key and shape agreeing."""
    if options.arch is None:
        raise UsageError(
            f"{path}: holds weights only ({len(state)} tensors), and a scan needs the code that runs them; "
            "add --arch package.module:factory or --arch file.py:factory"
        )
    weights = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    large = sum(tensor.nbytes for tensor in weights.values() if not tensor.is_sparse) >= LARGE
    model = (_built_without_memory(options) if large else None) or _built(options)
    fitted, stripped, notes = _fitted(dict(state), set(model.state_dict()))
    _check(path, fitted, model, options.arch)
    if large:
        _assign(model, fitted)
        if left := _on_meta(model):
            notes.append(f"{left[0]} is no part of the weights, so the model was built in memory after all")
            model = _built(options)
            _assign(model, fitted)
    else:
        model.load_state_dict(fitted, strict=True)
    identity = identity_of(path, format_name, "arch", arch=options.arch, prefix=stripped)
    return LoadedModel(model, identity, tuple(notes))


def _built(options: LoadOptions) -> nn.Module:
    assert options.arch is not None
    model = build(options.arch, options.arch_args)
    if not isinstance(model, nn.Module):
        raise ArchitectureError(
            f"--arch {options.arch} gave a {type(model).__name__}, not a torch.nn.Module; name the factory of the model"
        )
    return model


def _built_without_memory(options: LoadOptions) -> nn.Module | None:
    """Build the model on the meta device, where weights take no memory; None where its code needs real numbers."""
    try:
        with torch.device("meta"):
            return _built(options)
    except ArchitectureError:
        return None


def _assign(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Put the file's own tensors into the model, in the type that the model has."""
    own = model.state_dict()
    fitted = {
        name: value.to(own[name].dtype) if isinstance(own.get(name), Tensor) and isinstance(value, Tensor) else value
        for name, value in state.items()
    }
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.load_state_dict(fitted, strict=True, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags.get(name, parameter.requires_grad))


def _on_meta(model: nn.Module) -> list[str]:
    """Return what holds no numbers: buffers outside the weights, and tensors kept as plain attributes."""
    found = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if not attribute.startswith("_") and any(tensor.is_meta for _, tensor in tensors_in(value)):
                found.append(f"{name}.{attribute}" if name else attribute)
    return found


def weights_in(path: Path, data: Any, key: str | None) -> tuple[Any, list[str]]:
    """Return the entry of a checkpoint that holds weights or a whole module, and what was met beside it."""
    if key is not None:
        return _entry(path, data, key), []
    if not isinstance(data, Mapping) or _is_weights(data):
        return data, []
    distinct = {id(value): value for value in data.values()}  # a million entries may be one and the same dict
    holding = {key for key, value in distinct.items() if _is_weights(value) or _is_module(value)}
    found = {str(name): value for name, value in data.items() if id(value) in holding}
    strays = sorted({name for value in distinct.values() for name in _stray(value)})
    notes = [f"{name} in the checkpoint was left unread, as it is no weight" for name in strays[:5]]
    if len(found) == 1:
        name, value = next(iter(found.items()))
        return value, [f"the weights were taken from the entry {name!r}", *notes]
    if not found:
        raise UsageError(
            f"{path}: no entry of it looks like weights (it holds {_named(data)}); name the entry with --key"
        )
    raise UsageError(f"{path}: several entries hold weights ({_named(found)}); choose one with --key")


def _entry(path: Path, data: Any, key: str) -> Any:
    value = data
    for part in [key] if isinstance(data, Mapping) and key in data else key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise UsageError(f"{path}: has no entry {key!r}; it holds {_named(value)}")
        value = value[part]
    if not (_is_weights(value) or _is_module(value)):
        raise UsageError(f"{path}: the entry {key!r} holds no weights; the file holds {_named(data)}")
    return value


def _named(value: Any) -> str:
    if not isinstance(value, Mapping):
        return f"a {type(value).__name__}"
    names = [f"'{brief(str(name))}'" for name in islice(value, 8)]
    return (", ".join(names) or "nothing") + (f" and {len(value) - 8} more" if len(value) > 8 else "")


def _is_weights(value: Any) -> bool:
    """Tell a state dict: names to tensors, most of all; an optimiser's state is none."""
    if not isinstance(value, Mapping) or not value or all(name in value for name in _OPTIMISER):
        return False
    tensors = sum(isinstance(item, Tensor) for item in value.values())
    return all(isinstance(name, str) for name in value) and tensors * 2 > len(value)


def _is_module(value: Any) -> bool:
    return isinstance(value, nn.Module) or is_module(value)


def _stray(value: Any) -> list[str]:
    return [value.name] if isinstance(value, (Inert, Global)) else []


def _fitted(state: dict[str, Any], wanted: set[str]) -> tuple[dict[str, Any], str | None, list[str]]:
    """Strip wrappers' prefixes where that makes the keys those of the model."""
    state = {name: value for name, value in state.items() if isinstance(value, Tensor) or name in wanted}
    if set(state) == wanted:
        return state, None, []
    notes = []
    others = [name for name in state if name != _AVERAGED]
    if len(others) < len(state) and _AVERAGED not in wanted and all(name.startswith("module.") for name in others):
        del state[_AVERAGED]
        notes.append(f"{_AVERAGED} in the file was left unread, as it is no weight: the weights are a mean of others")
    steps: list[tuple[str, Callable[[str], str]]] = [
        ("_orig_mod.", lambda name: name.replace("_orig_mod.", "")),
        ("module.", lambda name: name.removeprefix("module.")),
    ]
    stripped = []
    for prefix, strip in steps:
        changed = [name for name in state if strip(name) != name]
        usable = len(changed) == len(state) if prefix == "module." else bool(changed)
        if usable and not any(name.startswith(prefix) or f".{prefix}" in name for name in wanted):
            state = {strip(name): value for name, value in state.items()}
            stripped.append(prefix)
    common = _common_prefix(state)
    if common and set(state) != wanted:
        shorter = {name.removeprefix(common): value for name, value in state.items()}
        if set(shorter) == wanted:
            state = shorter
            stripped.append(common)
    notes += [f"the prefix {prefix!r} was stripped from the names of the weights" for prefix in stripped]
    return state, "".join(stripped) or None, notes


def _common_prefix(state: Mapping[str, Any]) -> str:
    heads = {name.partition(".")[0] for name in state if "." in name}
    return f"{heads.pop()}." if len(heads) == 1 and all("." in name for name in state) else ""


def _check(path: Path, state: Mapping[str, Any], model: nn.Module, arch: str) -> None:
    own = model.state_dict()
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    misshaped = [
        f"{name!r} is {tuple(state[name].shape)} in the file and {tuple(own[name].shape)} in the model"
        for name in sorted(set(own) & set(state))
        if isinstance(own[name], Tensor) and hasattr(state[name], "shape") and own[name].shape != state[name].shape
    ]
    lines = [
        f"{len(items)} {what}: {', '.join(items[:3])}{', …' if len(items) > 3 else ''}"
        for items, what in (
            ([repr(name) for name in missing], "missing from the file"),
            ([repr(name) for name in unexpected], "unexpected in the file"),
            (misshaped, "of another shape"),
        )
        if items
    ]
    if lines:
        raise ArchitectureError(
            f"{path}: the weights do not fit --arch {arch}:\n  "
            + "\n  ".join(lines)
            + "\n  check the factory and its --arch-arg, or choose another entry with --key"
        )

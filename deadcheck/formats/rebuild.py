"""Rebuilds real modules from an inert tree, for classes of torch.nn and those the user allowed."""

from __future__ import annotations

import enum
import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import prune

from deadcheck.entrypoint import resolve
from deadcheck.errors import ModelFileError, TrustRequired, UsageError
from deadcheck.pickles import Global, Inert

_MAX_DEPTH = 100
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, torch.layout)
_HOOKS = ("_hooks", "_pre_hooks", "_hooks_with_kwargs", "_hooks_always_called")
_WRAPPERS = ("torch.nn.parallel.data_parallel.DataParallel", "torch.nn.parallel.distributed.DistributedDataParallel")
_GONE = ("_backend", "_is_full_backward_hook")
"""Attributes that an older torch kept and that do nothing today."""

_COMPILED = "torch._dynamo.eval_frame.OptimizedModule"


def _subclasses(base: type[nn.Module]) -> Iterator[type[nn.Module]]:
    """Yield a class and all that derive from it."""
    yield base
    for cls in base.__subclasses__():
        yield from _subclasses(cls)


_QUANTISED = "torch.ao.nn.quantized."


def _torch_classes() -> dict[str, type[nn.Module]]:
    """Return every module class of torch.nn by its full name."""
    return {
        f"{cls.__module__}.{cls.__qualname__}": cls
        for cls in _subclasses(nn.Module)
        if cls.__module__.startswith("torch.nn.modules.")
    }


CLASSES = _torch_classes()

FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        f"torch.nn.functional.{name}": getattr(F, name)
        for name in ("relu", "gelu", "silu", "elu", "selu", "celu", "leaky_relu", "relu6", "tanh", "sigmoid", "mish",
                     "hardtanh", "hardswish", "hardsigmoid", "softplus", "logsigmoid", "softmax")
    },
    **{f"torch._C._nn.{name}": getattr(torch._C._nn, name) for name in ("gelu", "softplus", "log_sigmoid")},
    **{f"torch.{name}": getattr(torch, name) for name in ("relu", "tanh", "sigmoid", "selu", "celu")},
    **{f"torch._VF.{name}": getattr(torch, name) for name in ("relu", "tanh", "sigmoid")},
}  # fmt: skip
"""Functions that modules of torch.nn keep as attributes."""


HOOK_CLASSES: dict[str, type] = {
    f"{cls.__module__}.{cls.__name__}": cls
    for cls in (
        prune.Identity, prune.RandomUnstructured, prune.L1Unstructured, prune.RandomStructured, prune.LnStructured,
        prune.CustomFromMask, prune.PruningContainer, sys.modules["torch.nn.utils.weight_norm"].WeightNorm,
        sys.modules["torch.nn.utils.spectral_norm"].SpectralNorm,
    )
}  # fmt: skip
"""Hooks that torch's own utilities leave on a module: they compute its weight from others."""


class Rebuilder:
    """Turns stand-ins into modules; every refusal names what it met and where."""

    def __init__(self, source: str, allowed: tuple[str, ...] = ()) -> None:
        self.source = source
        self.allowed = allowed
        self.warnings: list[str] = []
        self._built: dict[int, Any] = {}
        self._running: set[int] = set()

    def module(self, inert: Inert, path: str = "", depth: int = 0) -> nn.Module:
        """Rebuild a module and all below it; shared ones stay shared."""
        if id(inert) in self._running:
            raise self._refusal(path, "holds itself, which no model does")
        if id(inert) in self._built:
            known: nn.Module = self._built[id(inert)]
            return known
        if depth > _MAX_DEPTH:
            raise self._refusal(path, f"is nested more than {_MAX_DEPTH} modules deep")
        self._running.add(id(inert))
        built = self._wrapped(inert, path, depth) or self._one(inert, path, depth)
        self._running.discard(id(inert))
        self._built[id(inert)] = built
        return built

    def _wrapped(self, inert: Inert, path: str, depth: int) -> nn.Module | None:
        """Return the module inside a data-parallel or compiled wrapper."""
        if inert.name == _COMPILED:  # it pickles as a call with the model and what compiled it
            child = inert.args[0] if isinstance(inert.args, tuple) and inert.args else None
        elif inert.name in _WRAPPERS:
            modules = inert.state.get("_modules") if isinstance(inert.state, dict) else None
            child = modules.get("module") if isinstance(modules, Mapping) else None
        else:
            return None
        if not isinstance(child, Inert):
            raise self._refusal(path, f"is a {inert.name} without a module in it")
        self.warnings.append(f"the model inside {inert.name.rpartition('.')[2]} was read")
        return self.module(child, path, depth + 1)

    def _one(self, inert: Inert, path: str, depth: int) -> nn.Module:
        cls = self._class(inert, path)
        if not issubclass(cls, nn.Module):
            raise self._refusal(path, f"is a {inert.name}, which is no module")
        if issubclass(cls, LazyModuleMixin):
            raise ModelFileError(
                f"{self.source}: {path or 'the model'} is a {cls.__name__} that never ran, so it has no weights; "
                "run the model on one batch and save it again"
            )
        if inert.args:
            raise self._refusal(path, f"calls {inert.name} with arguments, which torch.save never writes")
        state = inert.state
        if not isinstance(state, dict) or not all(type(key) is str for key in state):
            raise self._refusal(path, "has a state that is no dict of names")
        state = {name: value for name, value in state.items() if name not in _GONE}
        built: nn.Module = cls.__new__(cls)
        nn.Module.__init__(built)
        clean = {name: self._attribute(cls, name, value, path, depth) for name, value in state.items()}
        for table in ("_parameters", "_buffers", "_modules"):
            clean.setdefault(table, {})
        built.__setstate__(clean)
        _fill_newer(built)
        return built

    def _class(self, inert: Inert, path: str) -> Any:
        name = inert.name
        if name in CLASSES:
            return CLASSES[name]
        if name.startswith(_QUANTISED):
            return self._quantised_class(name, path)
        if name in self.allowed:
            module, _, attribute = name.rpartition(".")
            if module == "__main__":
                raise UsageError(
                    f"{self.source}: {name} was defined in a script, so it cannot be imported; "
                    f"build it with --arch file.py:{attribute}"
                )
            return resolve(f"{module}:{attribute}")
        raise TrustRequired(needs_class(self.source, name))

    def _quantised_class(self, name: str, path: str) -> type[nn.Module]:
        """Return a class of torch's quantised linear layers, whose packed weights can be packed again."""

        found = {f"{cls.__module__}.{cls.__qualname__}": cls for cls in _subclasses(nn.Module)}.get(name)
        if found is None or "conv" in name.lower():
            raise TrustRequired(
                f"{self.source}: {path or 'the model'} is a {name}, whose packed weights only torch itself can unpack; "
                "save the model with torch.jit.save(torch.jit.script(model), ...) and scan that with --trust"
            )
        return found

    def _attribute(self, cls: type, name: str, value: Any, path: str, depth: int) -> Any:
        where = f"{path}.{name}" if path else name
        if name == "_modules":
            return self._children(value, path, depth)
        if name in ("_parameters", "_buffers"):
            return self._tensors(name, value, where)
        if name.endswith(_HOOKS) or name == "_forward_hooks_always_called":
            return self._hooks(name, value, where)
        shadowed = getattr(cls, name, None)
        if name.startswith("__") or callable(shadowed) or isinstance(shadowed, property):
            raise self._refusal(where, "takes the place of a method, so the file would change what the model does")
        return self.plain(value, where)

    def _hooks(self, name: str, value: Any, where: str) -> OrderedDict[int, Any]:
        """Return the hooks that torch's own pruning and normalisation leave behind; others run its code."""
        if not value or "state_dict" in name:  # hooks on saving and loading have no part in a forward pass
            return OrderedDict()
        hooks = list(value.values()) if isinstance(value, Mapping) else [value]
        if not all(isinstance(hook, Inert) and hook.name in HOOK_CLASSES for hook in hooks):
            raise self._refusal(where, "is a hook, which would run code of the file")
        return OrderedDict((number, self._hook(hook, where)) for number, hook in enumerate(hooks))

    def _hook(self, inert: Inert, where: str) -> Any:
        built: Any = object.__new__(HOOK_CLASSES[inert.name])
        state = inert.state if isinstance(inert.state, dict) else {}
        for key, value in state.items():
            if key == "_pruning_methods" and isinstance(value, (tuple, list)):
                methods = [item for item in value if isinstance(item, Inert) and item.name in HOOK_CLASSES]
                vars(built)[key] = tuple(self._hook(method, where) for method in methods)
            elif type(value) in _PLAIN:
                vars(built)[str(key)] = value
            else:
                raise self._refusal(f"{where}.{key}", f"is a {type(value).__name__}, which no hook of torch keeps")
        return built

    def _children(self, value: Any, path: str, depth: int) -> dict[str, nn.Module | None]:
        if not isinstance(value, Mapping):
            raise self._refusal(path, "has children that are no dict")
        children: dict[str, nn.Module | None] = OrderedDict()
        for name, child in value.items():
            where = f"{path}.{name}" if path else str(name)
            if child is not None and not isinstance(child, Inert):
                raise self._refusal(where, f"is a {type(child).__name__} where a module must stand")
            children[str(name)] = None if child is None else self.module(child, where, depth + 1)
        return children

    def _tensors(self, table: str, value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise self._refusal(where, "is no dict")
        wanted = nn.Parameter if table == "_parameters" else Tensor
        for name, tensor in value.items():
            if tensor is not None and not isinstance(tensor, wanted):
                raise self._refusal(f"{where}.{name}", f"is a {type(tensor).__name__} where a tensor must stand")
        return OrderedDict(value)

    def plain(self, value: Any, where: str, depth: int = 0) -> Any:
        """Return an attribute that is plain data, a tensor, a known function, or of an allowed class."""
        if depth > 32:
            raise self._refusal(where, "is nested too deeply")
        if isinstance(value, (*_PLAIN, Tensor)):
            return value
        if isinstance(value, Global):
            if value.name in FUNCTIONS:
                return FUNCTIONS[value.name]
            raise self._refusal(where, f"holds {value.name}, a function or class that is not known to be harmless")
        if isinstance(value, Inert):
            return self._object(value, where, depth)
        if id(value) in self._built:
            return self._built[id(value)]
        if type(value) in (list, tuple, set):
            built: Any = type(value)(self.plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value))
        elif type(value) in (dict, OrderedDict):
            built = type(value)((key, self.plain(item, f"{where}[{key!r}]", depth + 1)) for key, item in value.items())
        else:
            raise self._refusal(where, f"is a {type(value).__name__}, which is no plain value")
        self._built[id(value)] = built
        return built

    def _packed(self, state: Any, where: str) -> Any:
        """Pack the weights of a quantised linear layer as ``torch.ao.nn.quantized.Linear`` does."""
        weight, bias = state[0] if isinstance(state, tuple) and state and isinstance(state[0], tuple) else (None, None)
        if not isinstance(weight, Tensor) or not weight.is_quantized or weight.dim() != 2:
            raise self._refusal(where, "is packed in a way that is not known")
        if bias is not None and not isinstance(bias, Tensor):
            raise self._refusal(where, "is packed with a bias that is no tensor")
        return torch.ops.quantized.linear_prepack(weight, bias)

    def _object(self, inert: Inert, where: str, depth: int) -> Any:
        name = inert.name
        if name == "torch.ScriptObject":
            return self._packed(inert.state, where)
        if name in CLASSES:
            return self.module(inert, where, depth + 1)
        if name not in self.allowed:
            raise TrustRequired(needs_class(self.source, name))
        cls = self._class(inert, where)
        if isinstance(cls, type) and issubclass(cls, nn.Module):
            return self.module(inert, where, depth + 1)
        if isinstance(cls, type) and issubclass(cls, enum.Enum):
            return cls(*inert.args)
        built = cls.__new__(cls)
        state = inert.state if isinstance(inert.state, dict) else {}
        for key, item in state.items():
            object.__setattr__(built, str(key), self.plain(item, f"{where}.{key}", depth + 1))
        return built

    def _refusal(self, where: str, what: str) -> TrustRequired:
        return TrustRequired(f"{self.source}: {where or 'the model'} {what}; nothing was run; do not load this file")


def _fill_newer(module: nn.Module) -> None:
    """Give a module saved by an older torch the attributes that its class has gained since, at their defaults."""
    declared = {*getattr(type(module), "__constants__", ())}
    for cls in type(module).__mro__:
        declared |= set(inspect.get_annotations(cls))
    for name, parameter in inspect.signature(type(module).__init__).parameters.items():
        if name in declared and parameter.default is not parameter.empty and not hasattr(module, name):
            setattr(module, name, parameter.default)


def needs_class(source: str, name: str) -> str:
    """Say that a file needs the user's class, and what to type."""
    module, _, attribute = name.rpartition(".")
    if module == "__main__":
        return (
            f"{source}: holds an object of {name}, a class of the script that saved it; give the code that builds the "
            f"model: --arch file.py:{attribute}"
        )
    return (
        f"{source}: holds an object of {name}, and a class is code; give the code that builds the model "
        f"(--arch {module}:{attribute}), or allow this class of your environment: --allow-class {name}"
    )


def state_of(inert: Inert) -> dict[str, Tensor]:
    """Return the state dict of an inert module tree, without building any module."""
    out: dict[str, Tensor] = {}
    queue: list[tuple[Inert, str]] = [(inert, "")]
    met: set[tuple[int, str]] = set()
    while queue and len(met) < 1_000_000:
        node, prefix = queue.pop()
        state = node.state
        if (id(node), prefix) in met or not isinstance(state, dict) or prefix.count(".") > _MAX_DEPTH:
            continue
        met.add((id(node), prefix))
        transient = state.get("_non_persistent_buffers_set") or ()
        for table in ("_parameters", "_buffers"):
            for name, tensor in _items(state.get(table)):
                if isinstance(tensor, Tensor) and name not in transient:
                    out[f"{prefix}{name}"] = tensor
        queue += [(c, f"{prefix}{n}.") for n, c in _items(state.get("_modules")) if isinstance(c, Inert)]
    return out


def _items(value: Any) -> list[tuple[str, Any]]:
    return [(str(key), item) for key, item in value.items()] if isinstance(value, Mapping) else []

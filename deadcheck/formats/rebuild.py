"""Rebuilds real modules from an inert tree, for classes of torch.nn and those the user allowed."""

from __future__ import annotations

import enum
import importlib
import inspect
import operator
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from deadcheck import module_tree
from deadcheck.entrypoint import resolve
from deadcheck.errors import ModelFileError, TrustRequired, UsageError, first_line
from deadcheck.pickles import Global, Inert

_MAX_NESTED = 32
_MAX_RNN_LAYERS = 1000
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, torch.layout)
_GONE = ("_backend", "_is_full_backward_hook", "_compiled_call_impl")
"""Attributes that an older torch kept and that do nothing today, or nothing where the tree was judged."""

_SAVE_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
               "_load_state_dict_post_hooks")  # fmt: skip


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


def _is_torchs(name: str) -> bool:
    """Tell a class of torch, whose attributes are all known."""
    return name in CLASSES or name.startswith(_QUANTISED)


_FUNCTIONS: dict[str, Any] = {
    # torch._VF holds torch's own functions under another name.
    name: operator.attrgetter(name.removeprefix("torch.").removeprefix("_VF."))(torch)
    for name in module_tree.FUNCTIONS
}
_HOOK_CLASSES: dict[str, Any] = {
    name: getattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2])
    for name in module_tree.HOOKS
}


class Rebuilder:
    """Turns stand-ins into modules; every refusal names what it met and where."""

    def __init__(self, source: str, allowed: tuple[str, ...] = ()) -> None:
        self.source = source
        self.allowed = allowed
        self.warnings: list[str] = []
        self._built: dict[int, Any] = {}
        self._running: set[int] = set()

    def root(self, inert: Inert) -> nn.Module:
        """Rebuild a whole model."""
        module_tree.check(inert, self.source)
        return self.module(inert)

    def module(self, inert: Inert, path: str = "", depth: int = 0) -> nn.Module:
        """Rebuild a module and all below it; shared ones stay shared."""
        if id(inert) in self._running:
            raise self._refusal(path, "holds itself, which no model does")
        if id(inert) in self._built:
            known: nn.Module = self._built[id(inert)]
            return known
        if depth > module_tree.MAX_DEPTH:
            raise self._refusal(path, f"is nested more than {module_tree.MAX_DEPTH} modules deep")
        self._running.add(id(inert))
        built = self._wrapped(inert, path, depth) or self._one(inert, path, depth)
        self._running.discard(id(inert))
        self._built[id(inert)] = built
        return built

    def _wrapped(self, inert: Inert, path: str, depth: int) -> nn.Module | None:
        """Return the module inside a data-parallel or compiled wrapper."""
        if inert.name not in module_tree.WRAPPERS:
            return None
        child = module_tree.inner(inert)
        if child is None:
            raise self._refusal(path, f"is a {inert.name} without a module in it")
            return None
        self.warnings.append(f"the model inside {inert.name.rpartition('.')[2]} was read")
        return self.module(child, path, depth + 1)

    def _one(self, inert: Inert, path: str, depth: int) -> nn.Module:
        cls = self._class(inert, path)
        if not issubclass(cls, nn.Module) or not module_tree.is_module(inert):
            raise self._refusal(path, f"is a {inert.name}, which is no module")
        if issubclass(cls, LazyModuleMixin):
            raise ModelFileError(
                f"{self.source}: {path or 'the model'} is a {cls.__name__} that never ran, so it has no weights; "
                "run the model on one batch and save it again"
            )
        state = {name: value for name, value in inert.state.items() if name not in _GONE}
        layers = state.get("num_layers")
        if issubclass(cls, nn.RNNBase) and not (type(layers) is int and 0 < layers <= _MAX_RNN_LAYERS):
            raise self._refusal(f"{path}.num_layers".lstrip("."), "is no number of layers")
        clean = {name: self._attribute(inert, cls, name, path, depth) for name in state}
        for table in ("_parameters", "_buffers", "_modules"):
            clean.setdefault(table, {})
        try:
            built: nn.Module = cls.__new__(cls)
            nn.Module.__init__(built)
            built.__setstate__(clean)
            _fill_newer(built)
        except Exception as error:  # code of the user's class, or torch's own on a state that may lack much
            raise ModelFileError(
                f"{self.source}: {path or 'the model'} cannot be rebuilt as {inert.name} ({first_line(error)[:200]}); "
                "save the model again, or give the code that builds it with --arch"
            ) from error
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
            found = resolve(f"{module}:{attribute}")
            if not isinstance(found, type):
                raise UsageError(f"--allow-class {name}: is no class; name a class")
            return found
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

    def _attribute(self, inert: Inert, cls: type, name: str, path: str, depth: int) -> Any:
        where, value = f"{path}.{name}" if path else name, inert.state[name]
        if name == "_modules":
            return self._children(value, path, depth)
        if name in ("_parameters", "_buffers"):
            return self._tensors(name, value, where)
        if name in _SAVE_HOOKS:
            return OrderedDict()
        if name in module_tree.HOOK_TABLES:
            hooks = value.values() if isinstance(value, Mapping) else ()
            weights = dict(inert.state["_parameters"])
            return OrderedDict((number, self._hook(hook, weights, where)) for number, hook in enumerate(hooks))
        method = getattr(cls, name, None)
        # A class of the user's own may well have an attribute like ``type``, where torch has a method.
        if (callable(method) or isinstance(method, property)) and (
            _is_torchs(inert.name) or type(value) not in (str, bool, int, float, type(None))
        ):
            raise module_tree.shadowed(self.source, where)
        return self.plain(value, where)

    def _hook(self, inert: Inert, weights: Mapping[str, Any], where: str) -> Any:
        """Return a hook of torch's own; the weight that it computes must be one that the module keeps in parts."""
        built: Any = object.__new__(_HOOK_CLASSES[inert.name])
        for key, value in module_tree.items(inert.state):
            if key == "_pruning_methods" and isinstance(value, (tuple, list)):
                methods = [item for item in value if isinstance(item, Inert) and item.name in _HOOK_CLASSES]
                vars(built)[key] = tuple(self._hook(method, weights, where) for method in methods)
            elif type(value) not in _PLAIN:
                raise self._refusal(f"{where}.{key}", f"is a {type(value).__name__}, which no hook of torch keeps")
            elif key in ("name", "_tensor_name") and not {f"{value}_g", f"{value}_orig"} & set(weights):
                raise self._refusal(f"{where}.{key}", f"names {value!r}, which is no weight of that module")
            else:
                vars(built)[key] = value
        return built

    def _children(self, value: Mapping[str, Any], path: str, depth: int) -> dict[str, nn.Module | None]:
        children: dict[str, nn.Module | None] = OrderedDict()
        for name, child in value.items():
            where = f"{path}.{name}" if path else name
            children[name] = None if child is None else self.module(child, where, depth + 1)
        return children

    def _tensors(self, table: str, value: Mapping[str, Any], where: str) -> dict[str, Any]:
        wanted = nn.Parameter if table == "_parameters" else Tensor
        for name, tensor in value.items():
            if tensor is not None and not isinstance(tensor, wanted):
                raise self._refusal(f"{where}.{name}", f"is a {type(tensor).__name__} where a tensor must stand")
        return OrderedDict(value)

    def plain(self, value: Any, where: str, depth: int = 0) -> Any:
        """Return an attribute that is plain data, a tensor, a known function, or of an allowed class."""
        if depth > _MAX_NESTED:
            raise self._refusal(where, "is nested too deeply")
        if isinstance(value, (*_PLAIN, Tensor)):
            return value
        if isinstance(value, Global):
            if value.name in _FUNCTIONS:
                return _FUNCTIONS[value.name]
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
            return self._member(inert, cls, where)
        return self._plain_object(inert, cls, where, depth)

    def _plain_object(self, inert: Inert, cls: Any, where: str, depth: int) -> Any:
        state = {}
        for key, item in module_tree.items(inert.state):
            if key.startswith("__"):
                raise module_tree.shadowed(self.source, f"{where}.{key}")
            state[key] = self.plain(item, f"{where}.{key}", depth + 1)
        try:
            built = cls.__new__(cls)
            for key, item in state.items():
                object.__setattr__(built, key, item)
        except (TypeError, AttributeError, ValueError) as error:
            raise ModelFileError(
                f"{self.source}: {where} cannot be rebuilt as {inert.name} ({error}); give the code that builds the "
                "model with --arch"
            ) from error
        return built

    def _member(self, inert: Inert, cls: type[enum.Enum], where: str) -> enum.Enum:
        try:
            return cls(*inert.args)
        except (ValueError, TypeError) as error:
            raise ModelFileError(
                f"{self.source}: {where} is no member of {inert.name} as it is here ({error}); use the code that the "
                "model was saved with"
            ) from error

    def _refusal(self, where: str, what: str) -> TrustRequired:
        return module_tree.refusal(self.source, where, what)


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


def state_of(inert: Inert, source: str) -> dict[str, Tensor]:
    """Return the state dict of an inert module tree, without building any module."""
    out: dict[str, Tensor] = {}
    for path, node in module_tree.walk(inert, source):
        state = node.state if isinstance(node.state, dict) else {}
        transient = state.get("_non_persistent_buffers_set") or ()
        for table in ("_parameters", "_buffers"):
            for name, tensor in module_tree.items(state.get(table)):
                if isinstance(tensor, Tensor) and not (isinstance(transient, (set, list)) and name in transient):
                    out[f"{path}.{name}" if path else name] = tensor
    return out

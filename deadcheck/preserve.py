"""Puts a model and torch's global state back as they were, after an exception too."""

from __future__ import annotations

import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_CONTAINERS = (list, dict, set, deque)


class Held:
    """The state of a model and of the random generators, as it was."""

    def __init__(self, model: nn.Module) -> None:
        self._held = [(module, _Snapshot(module)) for module in model.modules()]
        self._randomness = Randomness()

    def differs(self) -> bool:
        """Tell whether anything in the model is no longer as it was, training flags aside."""
        return any(snapshot.differs(module) for module, snapshot in self._held)

    def restore(self) -> None:
        """Put everything back."""
        self._randomness.restore()
        for module, snapshot in self._held:
            snapshot.restore(module)


@contextmanager
def preserved(model: nn.Module) -> Iterator[Held]:
    """Restore every module's attributes, buffers and training flag, and the random state, on leaving.

    Buffers and tensor attributes are cloned; parameters are not, since a forward pass has no business with them.
    """
    held = Held(model)
    try:
        yield held
    finally:
        held.restore()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run in eval mode, setting each flag itself: ``train()`` may be overridden and do more than that."""
    # A frozen program has no flag.
    flags = [(module, module.training) for module in model.modules() if hasattr(module, "training")]
    try:
        for module, training in flags:
            if training:
                module.training = False
        yield
    finally:
        for module, training in flags:
            # ``model.train(flag)`` would unfreeze a layer that the user had put in eval on its own.
            if module.training != training:
                module.training = training


class _Switch:
    """A flag of the whole process, off while anybody wants it off; scans in several threads share one turn of it."""

    def __init__(self, read: Callable[[], bool], write: Callable[[bool], None]) -> None:
        self._read, self._write = read, write
        self._lock = threading.Lock()
        self._users = 0
        self._was = True

    @contextmanager
    def off(self) -> Iterator[None]:
        with self._lock:
            if self._users == 0:
                self._was = self._read()
                self._write(False)
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._write(self._was)


_FAST_PATH = _Switch(torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled)
_OPTIMISED = _Switch(torch._C._get_graph_executor_optimize, torch._C._set_graph_executor_optimize)


@contextmanager
def nothing_fused(model: nn.Module) -> Iterator[None]:
    """Keep TorchScript programs from running fused, which hides the activation inside.

    The fused operator of an encoder layer is seen in parts, but torch fails to call it where the weights are quantised.
    """
    layers = (module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer))
    can_fuse = all(isinstance(linear.weight, Tensor) for layer in layers for linear in (layer.linear1, layer.linear2))
    with _OPTIMISED.off(), nullcontext() if can_fuse else _FAST_PATH.off():
        yield


class _Snapshot:
    """What a module's own attributes held; containers and tensors by value, the rest by identity."""

    def __init__(self, module: nn.Module) -> None:
        self.attributes = dict(vars(module))
        # Of a module the most are hooks that nobody registered: what is empty needs no copy.
        self.contents = {
            name: value.copy() if value else ()
            for name, value in self.attributes.items()
            if isinstance(value, _CONTAINERS)
        }
        tensors = [*module._buffers.values(), *(v for v in self.attributes.values() if isinstance(v, Tensor))]
        for value in self.contents.values():
            items = value.values() if isinstance(value, dict) else value
            tensors += [item for item in items if isinstance(item, Tensor) and not isinstance(item, nn.Parameter)]
        self.tensors = [(tensor, tensor._version, tensor.detach().clone()) for tensor in _distinct(tensors)]

    def differs(self, module: nn.Module) -> bool:
        """Tell whether a module's attributes, what they contain, or the values of its tensors are others now."""
        own = vars(module)
        if own.keys() != self.attributes.keys():
            return True
        return (
            any(own[name] is not value for name, value in self.attributes.items() if name != "training")
            or any(not _holds(own[name], content) for name, content in self.contents.items())
            or any(tensor._version != version for tensor, version, _ in self.tensors)
        )

    def restore(self, module: nn.Module) -> None:
        own = vars(module)
        for name in [name for name in own if name not in self.attributes]:
            del own[name]
        own.update((name, value) for name, value in self.attributes.items() if own.get(name) is not value)
        for name, content in self.contents.items():
            _refill(self.attributes[name], content)
        with torch.no_grad():
            for tensor, version, value in self.tensors:
                if tensor._version != version:
                    tensor.copy_(value)


def _distinct(tensors: list[Any]) -> list[Tensor]:
    filled = [tensor for tensor in tensors if isinstance(tensor, Tensor) and not is_lazy(tensor)]
    strided = [tensor for tensor in filled if not tensor.is_inference() and tensor.device.type != "meta"]
    return list({id(tensor): tensor for tensor in strided}.values())


def _holds(container: Any, content: Any) -> bool:
    """Tell whether a container holds the same objects as its copy did."""
    if not content:
        return not container
    if isinstance(container, dict):
        return container.keys() == content.keys() and all(container[key] is content[key] for key in content)
    if isinstance(container, set):
        return bool(container == content)
    return len(container) == len(content) and all(a is b for a, b in zip(container, content, strict=True))


def _refill(container: Any, content: Any) -> None:
    """Put a container's items back, in place, if they are no longer the same objects."""
    if _holds(container, content):
        return
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(content)
    else:
        container.extend(content)


class Randomness:
    """The states of every random generator that a forward pass could draw from."""

    def __init__(self) -> None:
        self.torch = torch.get_rng_state()
        self.python = random.getstate()
        numpy = sys.modules.get("numpy")
        self.numpy = numpy.random.get_state() if numpy is not None else None
        self.devices = [(module, module.get_rng_state_all()) for module in _devices()]
        self.mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None

    def moved(self) -> bool:
        """Tell whether anybody drew from a generator since."""
        numpy = sys.modules.get("numpy")
        return (
            not torch.equal(self.torch, torch.get_rng_state())
            or self.python != random.getstate()
            or (self.numpy is not None and numpy is not None and not _same(self.numpy, numpy.random.get_state()))
        )

    def restore(self) -> None:
        """Put the generators back."""
        torch.set_rng_state(self.torch)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
        for module, states in self.devices:
            module.set_rng_state_all(states)
        if self.mps is not None:
            torch.mps.set_rng_state(self.mps)


def seed_generators(seed: int) -> None:
    """Seed torch's generators that ``Randomness`` puts back.

    ``torch.manual_seed`` also leaves a seed for each kind of device that nobody has used so far, which would take the
    place of the user's own.
    """
    torch.default_generator.manual_seed(seed)
    for module in _devices():
        module.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


def _devices() -> list[Any]:
    """Return the modules of torch for kinds of devices that are in use."""
    return [module for module in (torch.cuda, torch.xpu) if module.is_initialized()]


def _same(a: Any, b: Any) -> bool:
    """Compare two states of numpy's generator, which hold an array."""
    return all(bool((x == y).all()) if hasattr(x, "all") else x == y for x, y in zip(a, b, strict=True))

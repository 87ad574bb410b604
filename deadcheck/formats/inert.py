"""Reads a pickle into an inert tree: whatever it names becomes a stand-in that stores its state and does nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from deadcheck.errors import ModelFileError, TrustRequired

_lock = threading.Lock()


class Inert:
    """Stands for an object of a class that was not imported."""

    inert_name = ""
    """Full name of the class or function that the file asks for."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        """Keep the arguments, whatever they are, unused."""
        self = super().__new__(cls)
        self.inert_args = args
        self.inert_state = None
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.inert_state = state

    inert_args: tuple[Any, ...]
    inert_state: Any


def stand_in(name: str) -> type[Inert]:
    """Make a class that stands for ``name``."""
    return type(name.rpartition(".")[2], (Inert,), {"inert_name": name, "__module__": __name__})


def load_inert(path: Path, names: Iterable[str]) -> Any:
    """Load a torch file with every name that torch does not itself allow replaced by a stand-in."""
    own = torch.serialization.get_safe_globals
    with _lock:  # the table of allowed names is process-wide
        before = own()
        pairs = [(stand_in(name), name) for name in sorted(names)]
        try:
            with torch.serialization.safe_globals(pairs), torch.sparse.check_sparse_tensor_invariants():  # type: ignore[arg-type]
                # Explicit, so that TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD cannot switch it off.
                return torch.load(path, map_location="cpu", weights_only=True)
        except RecursionError as error:
            raise ModelFileError(f"{path}: nested too deeply for a model; not read") from error
        except Exception as error:  # torch.load raises almost anything on damaged files
            raise _explained(path, error) from error
        finally:
            # safe_globals takes off entries that the caller had added itself.
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(before)


def _explained(path: Path, error: Exception) -> Exception:
    text = (str(error).splitlines() or [type(error).__name__])[0]
    whole = str(error)
    if any(mark in whole for mark in ("Unsupported", "unsupported GLOBAL", "Can only", "unrecognized function")):
        return TrustRequired(
            f"{path}: its pickle does what no model needs ({text[:200]}); nothing was run; do not load this file"
        )
    return ModelFileError(f"{path}: damaged, or not saved by torch ({text[:200]}); save or download the model again")

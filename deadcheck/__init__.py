"""Dead-neuron diagnosis for PyTorch: which units never fire, how sure that is, and why."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deadcheck.config import Thresholds
    from deadcheck.diagnosis import Diagnosis, Verdict
    from deadcheck.errors import DeadcheckError, ExitCode
    from deadcheck.formats import LoadOptions
    from deadcheck.patch_job import apply_patch
    from deadcheck.pipeline import scan

__version__ = "0.1.0"
__all__ = [
    "DeadcheckError", "Diagnosis", "ExitCode", "LoadOptions", "Thresholds", "Verdict", "__version__", "apply_patch",
    "scan",
]  # fmt: skip

_HOMES = {
    "DeadcheckError": "deadcheck.errors",
    "Diagnosis": "deadcheck.diagnosis",
    "ExitCode": "deadcheck.errors",
    "LoadOptions": "deadcheck.formats",
    "Thresholds": "deadcheck.config",
    "Verdict": "deadcheck.diagnosis",
    "apply_patch": "deadcheck.patch_job",
    "scan": "deadcheck.pipeline",
}


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that ``import deadcheck`` does not import torch."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'deadcheck' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return __all__

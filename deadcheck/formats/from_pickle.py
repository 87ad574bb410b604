"""Reads what ``torch.save`` wrote: a whole module, a state dict, or a checkpoint that holds one of them."""

from __future__ import annotations

from pathlib import Path

from deadcheck.errors import ModelFileError, UsageError
from deadcheck.formats import archive
from deadcheck.formats.base import LoadedModel, LoadOptions, identity_of
from deadcheck.formats.from_state_dict import load_weights, weights_in
from deadcheck.formats.inert import Inert, load_inert
from deadcheck.formats.rebuild import Rebuilder, state_of


def open_pickle(path: Path, options: LoadOptions, *, is_zip: bool) -> LoadedModel:
    """Read a model that torch saved, running nothing of it."""
    if is_zip:
        archive.refuse_other_zips(path, archive.check_zip(path))
    names = archive.names_in(path, is_zip=is_zip)
    foreign = names - _torch_allows(names)
    if not is_zip and any(name.startswith("torch.nn.modules.") for name in foreign):
        raise ModelFileError(
            f"{path}: a whole module in the format before torch 1.6, which cannot be read safely; load it where you "
            "trust it and save it again with torch.save"
        )
    data, notes = weights_in(path, load_inert(path, foreign), options.key)
    if isinstance(data, Inert):
        return _whole(path, data, options, notes)
    if not isinstance(data, dict):
        raise ModelFileError(f"{path}: holds a {type(data).__name__}, not a model or its weights; give a saved model")
    loaded = load_weights(path, data, options, "state-dict")
    return LoadedModel(loaded.module, loaded.identity, (*notes, *loaded.warnings))


def _torch_allows(names: set[str]) -> set[str]:
    """Return the names that torch itself lets a weights-only file use."""
    from torch._weights_only_unpickler import _get_allowed_globals

    return {name for name in names if name in _get_allowed_globals()}


def _whole(path: Path, tree: Inert, options: LoadOptions, notes: list[str]) -> LoadedModel:
    if options.arch is not None:
        loaded = load_weights(path, state_of(tree), options, "torch-module")
        return LoadedModel(loaded.module, loaded.identity, (*notes, *loaded.warnings))
    _check_unused(options)
    rebuilder = Rebuilder(str(path), options.allow_classes)
    module = rebuilder.module(tree)
    read = "allowed-class" if options.allow_classes else "rebuilt"
    return LoadedModel(module, identity_of(path, "torch-module", read), (*notes, *rebuilder.warnings))


def _check_unused(options: LoadOptions) -> None:
    if options.arch_args:
        raise UsageError("--arch-arg goes with --arch, which was not given; add it or leave the arguments out")

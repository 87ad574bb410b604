"""Reads what ``torch.save`` wrote: a whole module, a state dict, or a checkpoint that holds one of them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from deadcheck import torch_file
from deadcheck.errors import ModelFileError, UsageError, first_line
from deadcheck.formats.base import LoadedModel, LoadOptions, identity_of
from deadcheck.formats.from_state_dict import load_weights, weights_in
from deadcheck.formats.rebuild import Rebuilder, state_of
from deadcheck.pickles import Inert


def open_pickle(path: Path, options: LoadOptions) -> LoadedModel:
    """Read a model that torch saved, running nothing of it unless ``options.trust`` says so."""
    held = torch_file.load(path).root
    if options.trust:
        return _trusted(path, options)
    data, notes = weights_in(path, held, options.key)
    if isinstance(data, Inert):
        return _whole(path, data, options, notes)
    if not isinstance(data, dict):
        raise ModelFileError(f"{path}: holds a {type(data).__name__}, not a model or its weights; give a saved model")
    loaded = load_weights(path, data, options, "state-dict")
    return LoadedModel(loaded.module, loaded.identity, (*notes, *loaded.warnings))


def _trusted(path: Path, options: LoadOptions) -> LoadedModel:
    """Let torch unpickle the file, which runs whatever it names; what is denied was refused before."""
    try:
        held = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # the file's own code runs here, and may raise anything
        raise ModelFileError(
            f"{path}: cannot be unpickled ({type(error).__name__}: {first_line(error)}); "
            "its classes must be importable from here"
        ) from error
    data, notes = weights_in(path, held, options.key)
    if isinstance(data, nn.Module) and options.arch is None:
        return LoadedModel(data, identity_of(path, "torch-module", "trusted"), tuple(notes))
    state = data.state_dict() if isinstance(data, nn.Module) else data
    loaded = load_weights(path, state, options, "state-dict")
    return LoadedModel(loaded.module, loaded.identity, (*notes, *loaded.warnings))


def _whole(path: Path, tree: Inert, options: LoadOptions, notes: list[str]) -> LoadedModel:
    if options.arch is not None:
        loaded = load_weights(path, state_of(tree, str(path)), options, "torch-module")
        return LoadedModel(loaded.module, loaded.identity, (*notes, *loaded.warnings))
    if options.arch_args:
        raise UsageError("--arch-arg goes with --arch, which was not given; add it or leave the arguments out")
    rebuilder = Rebuilder(str(path), options.allow_classes)
    module = rebuilder.root(tree)
    read = "allowed-class" if options.allow_classes else "rebuilt"
    return LoadedModel(module, identity_of(path, "torch-module", read), (*notes, *rebuilder.warnings))

"""Loads a Hugging Face folder: config.json and safetensors, from the disk alone, and no code of the folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deadcheck import folder
from deadcheck.errors import ModelFileError, TrustRequired, UsageError
from deadcheck.formats.base import LoadedModel, LoadOptions, identity_of
from deadcheck.formats.from_safetensors import read_safetensors
from deadcheck.formats.from_state_dict import load_weights

_MAX_JSON = 64 << 20


def open_folder(path: Path, options: LoadOptions) -> LoadedModel:
    """Read the weights into the model that ``--arch`` builds, or that the transformers library has for the config."""
    shards = folder.shards(path)
    if options.arch is not None:
        weights: dict[str, Tensor] = {}
        for shard in shards:
            weights.update(read_safetensors(shard))
        return load_weights(path, weights, options, "hf-dir")
    config = folder.read_json(path / "config.json")
    _refuse_what_runs(path, config)
    return LoadedModel(_from_library(path, config), identity_of(path, "hf-dir", "audited"))


def _refuse_what_runs(path: Path, config: dict[str, Any]) -> None:
    if problem := folder.what_runs(path, config):
        raise TrustRequired(
            f"{path}: {problem}, which is never run; build it from code of your own with --arch package.module:factory"
        )
    if config.get("quantization_config"):
        raise ModelFileError(
            f"{path}: its weights are quantised, which is not read; scan the model before quantisation"
        )


def _from_library(path: Path, config: dict[str, Any]) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            f"{path}: a Hugging Face folder, and the transformers library that builds its model is not installed; "
            "install torch-deadcheck[hf], or give code with --arch"
        ) from error
    try:
        with _quiet(transformers):
            model, found = _class(transformers, config).from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False, use_safetensors=True,
                attn_implementation="eager", output_loading_info=True,
            )  # fmt: skip
    except Exception as error:  # the library raises almost anything on a config it does not understand
        text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelFileError(
            f"{path}: transformers {transformers.__version__} cannot build its model ({text[:200]}); "
            "give code with --arch"
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise ModelFileError(
            f"{path}: {len(missing)} weights of its model are missing ({missing[0]}), and would be random numbers; "
            "download the folder again, or give code with --arch"
        )
    return model  # type: ignore[no-any-return]


def _class(transformers: Any, config: dict[str, Any]) -> Any:
    """Return the model class that the config names, if it is one of the library's own."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    found = getattr(transformers, name, None) if re.fullmatch(r"[A-Z]\w+", name) else None
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model else transformers.AutoModel


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep the library from writing to the terminal."""
    log = transformers.utils.logging
    before, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        if bars:
            log.enable_progress_bar()

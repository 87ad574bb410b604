"""Loads a Hugging Face folder: config.json and safetensors, from the disk alone, and no code of the folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deadcheck.errors import ModelFileError, TrustRequired, UsageError
from deadcheck.formats.base import INDEX, LoadedModel, LoadOptions, identity_of
from deadcheck.formats.from_safetensors import read_safetensors
from deadcheck.formats.from_state_dict import load_weights

_MAX_JSON = 64 << 20


def open_folder(path: Path, options: LoadOptions) -> LoadedModel:
    """Read the weights into the model that ``--arch`` builds, or that the transformers library has for the config."""
    shards = _shards(path)
    if options.arch is not None:
        weights: dict[str, Tensor] = {}
        for shard in shards:
            weights.update(read_safetensors(shard))
        return load_weights(path, weights, options, "hf-dir")
    config = _read_json(path / "config.json")
    _refuse_what_runs(path, config)
    return LoadedModel(_from_library(path, config), identity_of(path, "hf-dir", "audited"))


def _shards(path: Path) -> list[Path]:
    """Return the files of weights, which an index may name, inside the folder only."""
    names = sorted(item.name for item in path.glob("*.safetensors"))
    if (path / INDEX).is_file():
        index = _read_json(path / INDEX)
        table = index.get("weight_map")
        named = sorted({str(name) for name in table.values()}) if isinstance(table, dict) else []
        strange = [name for name in named if not re.fullmatch(r"[\w.\-]+", name)]
        if strange or not named:
            raise ModelFileError(f"{path / INDEX}: names no files of this folder; download the folder again")
        if missing := [name for name in named if name not in names]:
            raise ModelFileError(f"{path}: {len(missing)} of its files are missing ({missing[0]}); download them too")
        names = named
    if not names:
        raise ModelFileError(
            f"{path}: holds no .safetensors file; convert its weights (model.save_pretrained(..., "
            "safe_serialization=True)), or name one file with --arch"
        )
    return [path / name for name in names]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ModelFileError(f"{path}: takes more than {_MAX_JSON >> 20} MiB, which no such file needs; not read")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(
            f"{path.parent}: has no {path.name}, so nothing tells how its model is built; add --arch"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: damaged ({str(error)[:100]}); download the folder again") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: holds no table of settings; download the folder again")
    return value


def _refuse_what_runs(path: Path, config: dict[str, Any]) -> None:
    if "auto_map" in config:
        raise TrustRequired(
            f"{path}: its model is code that comes with the folder, which is never run; build it from code of your own "
            "with --arch package.module:factory"
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
            return _class(transformers, config).from_pretrained(  # type: ignore[no-any-return]
                str(path), local_files_only=True, trust_remote_code=False, use_safetensors=True,
                attn_implementation="eager",
            )  # fmt: skip
    except Exception as error:  # the library raises almost anything on a config it does not understand
        text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelFileError(
            f"{path}: transformers {transformers.__version__} cannot build its model ({text[:200]}); "
            "give code with --arch"
        ) from error


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

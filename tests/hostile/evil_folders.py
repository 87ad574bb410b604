"""Hugging Face folders that bring code, or lead out of themselves."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.hostile.cases import STOP, Case, called, text

INDEX = "model.safetensors.index.json"
BERT: dict[str, Any] = {
    "model_type": "bert", "architectures": ["BertModel"], "hidden_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 10, "max_position_embeddings": 8,
}  # fmt: skip
CODE = """import os
os.mkdir(MARKER)
from transformers import PretrainedConfig, PreTrainedModel
class Config(PretrainedConfig): model_type = "evil"
class Model(PreTrainedModel): config_class = Config
"""


def _safe(**tensors: tuple[int, ...]) -> bytes:
    header, place = {}, 0
    for name, shape in tensors.items():
        size = 4
        for number in shape:
            size *= number
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [place, place + size]}
        place += size
    data = json.dumps(header).encode()
    return struct.pack("<Q", len(data)) + data + bytes(place)


def _folder(
    config: Mapping[str, Any] | bytes | None, files: Mapping[str, bytes] | None = None, *, code: bool = False
) -> Callable[[Path, Path], Path]:
    def make(parent: Path, marker: Path) -> Path:
        folder = parent / "model"
        folder.mkdir()
        if config is not None:
            (folder / "config.json").write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
        for name, content in (files if files is not None else {"model.safetensors": _safe(a=(1,))}).items():
            (folder / name).write_bytes(content.replace(b"MARKER", str(marker).encode()))
        if code:
            (folder / "evil.py").write_text(CODE.replace("MARKER", repr(str(marker))))
        return folder

    return make


def _with(
    special: Callable[[Path, Path], None], config: Mapping[str, Any] | None = BERT
) -> Callable[[Path, Path], Path]:
    def make(parent: Path, marker: Path) -> Path:
        folder = _folder(config)(parent, marker)
        special(folder, marker)
        return folder

    return make


def _fifo(name: str) -> Callable[[Path, Path], None]:
    def special(folder: Path, _: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return special


def _link(name: str, target: str) -> Callable[[Path, Path], None]:
    def special(folder: Path, _: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return special


def _index(*names: object) -> Callable[[Path, Path], Path]:
    table = {"weight_map": {f"a{number}": name for number, name in enumerate(names)}}
    return _folder(BERT, {"model.safetensors": _safe(a=(1,)), INDEX: json.dumps(table).encode()})


MAP = {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
HUB = {"auto_map": {"AutoModel": "someone/evil--evil.Model"}}

CASES = (
    Case("folder-auto-map", _folder({**BERT, **MAP, "model_type": "evil"}, code=True), 4, "code that comes with the folder"),
    Case("folder-auto-map-of-a-hub", _folder({**BERT, **HUB}), 4, "code that comes with the folder"),
    Case("folder-auto-map-inside", _folder({**BERT, "text_config": {**BERT, **MAP}}, code=True), 4,
         "code that comes with the folder"),
    Case("folder-attention-of-a-hub", _folder({**BERT, "attn_implementation": "someone/evil-kernel"}), 4, "code from a hub"),
    Case("folder-attention-of-a-hub-inside", _folder({**BERT, "text_config": {"_attn_implementation": "a/b:c"}}), 4,
         "code from a hub"),
    Case("folder-attention-by-part", _folder({**BERT, "_attn_implementation_internal": {"": "a/b"}}), 4, "code from a hub"),
    Case("folder-adapter", _folder(BERT, {"model.safetensors": _safe(a=(1,)), "adapter_config.json":
         b'{"base_model_name_or_path": "/etc"}'}), 4, "an adapter"),
    Case("folder-weights-elsewhere", _folder({**BERT, "transformers_weights": "../evil.safetensors"}), 4,
         "no safetensors"),
    Case("folder-weights-in-a-pickle", _folder({**BERT, "transformers_weights": "adapter_model.bin"}, {
         "model.safetensors": _safe(a=(1,)),
         "adapter_model.bin": b"\x80\x02" + called("posix", "mkdir", text("MARKER")) + STOP}), 4, "no safetensors"),
    Case("folder-quantised", _folder({**BERT, "quantization_config": {"quant_method": "bitsandbytes"}}), 2, "quantised",
         found="Hugging Face"),
    Case("folder-weights-missing", _folder(BERT), 2, "", found="Hugging Face"),
    Case("folder-index-outside", _index("../model.safetensors"), 2, "names no files of this folder"),
    Case("folder-index-absolute", _index("/etc/passwd"), 2, "names no files of this folder"),
    Case("folder-index-of-numbers", _index(5, None), 2, "are missing"),
    Case("folder-index-missing", _index("model-00001.safetensors"), 2, "are missing"),
    Case("folder-index-is-a-list", _folder(BERT, {"model.safetensors": _safe(a=(1,)), INDEX: b"[]"}), 2, "no table"),
    Case("folder-config-is-a-list", _folder(b"[]"), 2, "holds no table of settings"),
    Case("folder-config-nested", _folder(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), 2, "damaged"),
    Case("folder-config-too-large", _folder(b'{"a": "' + b"x" * (20 << 20) + b'"}'), 2, "takes more than"),
    Case("folder-config-of-odd-types", _folder({"model_type": ["x"], "architectures": 5, "hidden_act": {"a": 1}}), 2, "",
         found="Hugging Face"),
    Case("folder-architecture-is-a-function", _folder({**BERT, "architectures": ["os.system"]}), 2, "", found="os.system"),
    Case("folder-architecture-is-no-model", _folder({**BERT, "architectures": ["Trainer"]}), 2, "", found="Trainer"),
    Case("folder-config-pipe", _with(_fifo("config.json")), 2, "not a regular file"),
    Case("folder-config-zero", _with(_link("config.json", "/dev/zero")), 2, "not a regular file"),
    Case("folder-shard-pipe", _with(_fifo("model.safetensors")), 2, "not a regular file"),
    Case("folder-shard-pipe-beside", _with(_fifo("other.safetensors")), 2, "not a regular file"),
    Case("folder-shard-zero", _with(_link("model.safetensors", "/dev/zero")), 2, "not a regular file"),
    Case("folder-shard-dangling", _with(_link("model.safetensors", "nowhere")), 2, "not a regular file"),
    Case("folder-index-pipe", _with(_fifo(INDEX)), 2, "not a regular file"),
    Case("folder-of-bin-shards", _folder(None, {"pytorch_model.bin.index.json": b"{}"}), 2, "shards in pickles", inspect=2),
    Case("folder-of-one-bin", _folder(BERT, {"pytorch_model.bin": b"\x80\x02}."}), 2, "holds no .safetensors file"),
    Case("folder-dcp", _folder(None, {".metadata": b"\x80\x02}.", "__0_0.distcp": b""}), 2, "distributed checkpoint", inspect=2),
    Case("folder-tensorflow", _folder(None, {"saved_model.pb": b""}), 2, "TensorFlow", inspect=2),
    Case("folder-deepspeed", _folder(None, {"latest": b"x", "global_step5": b""}), 2, "DeepSpeed", inspect=2),
    Case("folder-empty", _folder(None, {}), 2, "is a folder, not a model file", inspect=2),
)  # fmt: skip

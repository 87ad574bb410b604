"""Changes a valid file at random, knowing what it is: bytes, opcodes of pickles, JSON, members and fields of a zip."""

from __future__ import annotations

import copy
import io
import json
import pickletools
import random
import struct
import warnings
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

Change = Callable[[random.Random, bytes, Sequence[bytes]], bytes]

NUMBERS = (0, 1, -1, 2, 7, 255, 256, 65535, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 60) - 1, 1 << 62,
           (1 << 63) - 1, -(1 << 63), 1 << 64, 1 << 200)  # fmt: skip
TEXTS = ("", "x", "0", "..", "/", "a.b", "forward", "__class__", "__init__", "weight", "_parameters", "_modules", "relu",
         "torch", "\x00", "\n", "é", "\U0001f600", "'", '"', "x" * 5000, "nan", "1e999", "model", "data", "storage",
         "../x", "a b", "::error::x", "\x1b[31m")  # fmt: skip
GLOBALS = ("torch FloatStorage", "torch LongStorage", "torch QInt8Storage", "torch._utils _rebuild_tensor_v2", "torch Size",
           "torch._utils _rebuild_qtensor", "torch._utils _rebuild_sparse_tensor", "torch._utils _rebuild_parameter",
           "torch._tensor _rebuild_from_type_v2", "torch.nn.modules.linear Linear", "torch.nn.modules.activation ReLU",
           "torch.nn.modules.rnn LSTM", "torch.nn.modules.container Sequential", "collections OrderedDict", "torch device",
           "builtins set", "builtins complex", "_codecs encode", "copyreg _reconstructor", "torch relu", "torch float32",
           "torch.nn.utils.weight_norm WeightNorm", "torch.nn.parallel.data_parallel DataParallel", "torch qint8",
           "torch.nn.parameter UninitializedParameter", "torch.serialization _get_layout", "builtins getattr",
           "torch.ao.nn.quantized.dynamic.modules.linear Linear", "torch._dynamo.eval_frame OptimizedModule",
           "os system", "argparse Namespace", "posix mkdir", "torch ScriptObject")  # fmt: skip
VALUES: tuple[Any, ...] = (None, True, False, [], {}, [[]], {"a": 1}, [None], 1.5, float("1e308"), *NUMBERS, *TEXTS)


def flipped(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """Turn a few bits, or set a few bytes."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if out:
            place = rng.randrange(len(out))
            out[place] = rng.choice((out[place] ^ 1 << rng.randrange(8), 0, 255, 127, 128, rng.randrange(256)))
    return bytes(out)


def cut(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """Take a piece out, or the end off."""
    begin, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    return data[:begin] + (data[end:] if rng.random() < 0.7 else b"")


def doubled(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """Put a piece in once more, or very often."""
    begin, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    piece = data[begin : min(end, begin + 4096)]
    return data[:end] + piece * rng.choice((1, 1, 2, 100)) + data[end:]


def spliced(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Put a piece of another file in."""
    other = rng.choice(others)
    begin = rng.randrange(len(other) + 1)
    piece = other[begin : begin + rng.choice((1, 8, 64, 4096))]
    place = rng.randrange(len(data) + 1)
    return data[:place] + piece + data[place + (len(piece) if rng.random() < 0.5 else 0) :]


def numbered(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """Overwrite a place with an extreme number."""
    form = rng.choice(("<B", "<H", "<I", "<Q", ">I", ">Q"))
    size = struct.calcsize(form)
    if len(data) < size:
        return data
    place = rng.randrange(len(data) - size + 1)
    return data[:place] + struct.pack(form, rng.choice(NUMBERS) % (1 << 8 * size)) + data[place + size :]


BYTES: tuple[Change, ...] = (flipped, flipped, cut, doubled, spliced, numbered)


def of_pickle(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Change opcodes and their arguments."""
    try:
        places = [place for _, _, place in pickletools.genops(data) if place is not None]
    except Exception:
        return rng.choice(BYTES)(rng, data, others)
    ends = [*places[1:], len(data)]
    ops = [data[begin:end] for begin, end in zip(places, ends, strict=True)]
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        place = rng.randrange(len(ops))
        kind = rng.randrange(8)
        if kind == 0:
            del ops[place]
        elif kind == 1:
            ops.insert(place, rng.choice(ops))
        elif kind == 2:
            other = rng.randrange(len(ops))
            ops[place], ops[other] = ops[other], ops[place]
        elif kind == 3:
            ops[place : place + 1] = [rng.choice(ops)]
        elif kind == 4:
            ops.insert(place, rng.choice((b"0", b"1", b"2", b"(", b"N", b")", b"]", b"}", b"\x8f", b"R", b"\x81", b"b", b"t", b"Q",
                                          b"\x85", b"\x86", b"\x91", b"\x90", b"s", b"u", b"e", b"a", b"o")))  # fmt: skip
        elif kind == 5:
            ops[place] = _integer(rng.choice(NUMBERS))
        elif kind == 6:
            text = rng.choice(TEXTS).encode()
            ops[place] = b"X" + struct.pack("<I", len(text)) + text
        else:
            ops[place] = b"c" + rng.choice(GLOBALS).replace(" ", "\n").encode() + b"\n"
        if not ops:
            return b""
    return b"".join(ops)


def _integer(number: int) -> bytes:
    data = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def of_json(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Change values, keys and structure."""
    try:
        document = json.loads(data)
    except ValueError:
        return rng.choice(BYTES)(rng, data, others)
    holder = {"": document}
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        _change_one(rng, holder)
    return json.dumps(holder[""]).encode()


def _change_one(rng: random.Random, holder: dict[str, Any]) -> None:
    """Go down at random, and change what is met there."""
    inside: Any = holder
    key: Any = ""
    while isinstance(inside[key], (dict, list)) and inside[key] and rng.random() < 0.9:
        inside = inside[key]
        key = rng.choice(list(inside)) if isinstance(inside, dict) else rng.randrange(len(inside))
    kind = rng.randrange(6)
    if kind < 3 or inside is holder:
        inside[key] = copy.deepcopy(rng.choice(VALUES))
    elif kind == 3:
        del inside[key]
    elif isinstance(inside, dict):
        inside[rng.choice(TEXTS)] = copy.deepcopy(inside[key]) if kind == 4 else inside.pop(key)
    elif kind == 4:
        inside.insert(key, copy.deepcopy(inside[key]))
    else:
        rng.shuffle(inside)


def of_zip(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Change the content of a member and write the zip anew, or change a field of its directory."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info.filename, archive.read(info), info.compress_type) for info in archive.infolist()]
    except Exception:
        return rng.choice(BYTES)(rng, data, others)
    if not members or rng.random() < 0.15:
        return _directory(rng, data)
    names = [name for name, _, _ in members]
    place = rng.randrange(len(members))
    if rng.random() < 0.6:  # what describes the rest is worth most
        place = next((i for i, name in enumerate(names) if name.endswith((".pkl", ".json", ".pt"))), place)
        if rng.random() < 0.4:
            place = rng.choice(
                [i for i, name in enumerate(names) if name.endswith((".pkl", ".json", ".pt"))] or [place]
            )
    name, content, method = members[place]
    kind = rng.random()
    if kind < 0.8:
        members[place] = (name, changed(rng, content, others, name), method)
    elif kind < 0.87:
        del members[place]
    elif kind < 0.94:
        members[place] = (
            name.replace(rng.choice(name), rng.choice(("", "/", ".", "x", "\\", "é")), 1),
            content,
            method,
        )
    else:
        members.append((rng.choice(names) + rng.choice(("", "x", "/x")), content, zipfile.ZIP_DEFLATED))
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w") as archive:
        warnings.simplefilter("ignore")  # two members of one name are wanted
        for name, content, method in members:
            archive.writestr(zipfile.ZipInfo(name or "x"), content, method)
    return out.getvalue()


def _directory(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    heads = [(b"PK\x01\x02", 46), (b"PK\x03\x04", 30), (b"PK\x05\x06", 22), (b"PK\x06\x06", 56)]
    found = [(place, size) for mark, size in heads for place in _all(data, mark)]
    if not found:
        return data
    place, size = rng.choice(found)
    form = rng.choice(("<H", "<I"))
    at = place + rng.randrange(4, size - 3)
    if at + 4 <= len(out):
        struct.pack_into(form, out, at, rng.choice(NUMBERS) % (1 << 8 * struct.calcsize(form)))
    return bytes(out)


def _all(data: bytes, mark: bytes) -> list[int]:
    found, place = [], data.find(mark)
    while place >= 0:
        found.append(place)
        place = data.find(mark, place + 1)
    return found


def of_safetensors(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Change the head, and give its new length."""
    length = struct.unpack("<Q", data[:8])[0]
    head = of_json(rng, data[8 : 8 + length], others)
    return struct.pack("<Q", len(head)) + head + data[8 + length :]


def of_npy(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """Write other values into the head."""
    shape = rng.choice(("()", "(8,)", "(8, 4)", "(-1, 4)", "(0, 4)", f"({rng.choice(NUMBERS)}, 4)", "(8, 4, )", "'x'", "[8, 4]",
                        "(8.0, 4)", "None", "(True, 4)", "(8, 4) * 10"))  # fmt: skip
    kind = rng.choice(("'<f4'", "'>f4'", "'<f8'", "'<f2'", "'<f16'", "'<c8'", "'<i8'", "'|b1'", "'|O'", "'<U4'", "'|V4'", "'<M8[s]'",
                       "[('a', '<f4')]", "'<f999999999'", "5", "None", "''", "'>u8'", "'|S4'"))  # fmt: skip
    order = rng.choice(("True", "False", "None", "5"))
    head = f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    return data[:8] + struct.pack("<H", len(head)) + head + data[-128:]


def of_yaml(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Change lines and words."""
    lines = data.decode("utf-8", "replace").splitlines()
    for _ in range(rng.choice((1, 2, 4))):
        place = rng.randrange(len(lines)) if lines else 0
        word = rng.choice(("!!python/object:os.system", "&a", "*a", "<<: *a", "- 1", "{}", "[", "]", "|", ">", "? x", ": :", "1e-3",
                           "5", "0x1F", "1:2:3", ".nan", ".inf", "~", "yes", "%", "@", "\t", "---", "...", "null", "2026-01-01",
                           "extends: default", "trust: true", "models: [{path: x}]", "'", '"', str(rng.choice(NUMBERS)),
                           rng.choice(TEXTS)))  # fmt: skip
        kind = rng.randrange(5)
        if kind == 0 and lines:
            lines[place] = lines[place].partition(":")[0] + ": " + word
        elif kind == 1 and lines:
            lines.insert(place, lines[rng.randrange(len(lines))])
        elif kind == 2:
            lines.insert(place, " " * rng.randrange(6) + word)
        elif kind == 3 and lines:
            del lines[place]
        elif lines:
            at = rng.randrange(len(lines[place]) + 1)
            lines[place] = lines[place][:at] + word + lines[place][at:]
    return "\n".join(lines).encode("utf-8", "replace")


def changed(rng: random.Random, data: bytes, others: Sequence[bytes], name: str = "") -> bytes:
    """Change a file in a way that suits what it is, or in any way."""
    aware: Change | None = None
    if data.startswith(b"PK"):
        aware = of_zip
    elif name.endswith(".pkl") or data[:1] == b"\x80":
        aware = of_pickle
    elif name.endswith(".json"):
        aware = of_json
    elif name.endswith((".yaml", ".toml")):
        aware = of_yaml
    elif data.startswith(b"\x93NUMPY"):
        aware = of_npy
    elif data[8:9] == b"{" and name.endswith((".safetensors", ".part")):
        aware = of_safetensors
    if aware is None or rng.random() < 0.25:
        aware = rng.choice(BYTES)
    return aware(rng, data, others)

"""Exported programs that would run code while they are loaded, or once they are called."""

from __future__ import annotations

import copy
import functools
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.cases import STOP, Case, called, legacy, text, torch_zip, zipped
from tests.hostile.evil_scripts import good_script

MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
SAMPLE = "data/sample_inputs/model.pt"

Members = dict[str, bytes]
Change = Callable[[Members, Path], None]


@functools.cache
def good_program() -> Members:
    """The members of a small program of one's own, as torch saves it."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(net, (torch.ones(2, 4),), dynamic_shapes=({0: batch},))
    held = io.BytesIO()
    torch.export.save(program, held)
    with zipfile.ZipFile(held) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def changed(change: Change) -> Callable[[Path, Path], Path]:
    """Return what writes that program with its members changed."""

    def make(folder: Path, marker: Path) -> Path:
        members = dict(good_program())
        change(members, marker)
        path = folder / "model.pt2"
        path.write_bytes(zipped(members, folder="model/"))
        return path

    return make


def _document(edit: Callable[[Any, str], None], name: str = MODEL) -> Change:
    """Return a change of one JSON member; the edit is given code that leaves the mark, without a quote of its own."""

    def change(members: Members, marker: Path) -> None:
        document = json.loads(members[name])
        edit(document, f"__import__('os').mkdir({str(marker)!r})")
        members[name] = json.dumps(document).encode()

    return change


def _evil(marker: Path) -> bytes:
    return b"\x80\x02" + called("posix", "mkdir", text(str(marker))) + STOP


def _graph(document: Any) -> Any:
    return document["graph_module"]["graph"]


def _relu(document: Any) -> Any:
    return next(node for node in _graph(document)["nodes"] if "relu" in node["target"])


def _rename(document: Any, old: str, new: str) -> None:
    """Give a value of the graph, or a weight, another name wherever it stands."""
    queue = [document]
    while queue:
        value = queue.pop()
        if isinstance(value, dict):
            queue += value.values()
            for key in ("name", "parameter_name"):
                # An operator's own names for its arguments stay.
                if value.get(key) == old and "kind" not in value:
                    value[key] = new
            if old in value:
                value[new] = value.pop(old)
        elif isinstance(value, list):
            queue += value


def _put(name: str, content: Callable[[Path], bytes] | bytes) -> Change:
    def change(members: Members, marker: Path) -> None:
        members[name] = content(marker) if callable(content) else content

    return change


def _both(*changes: Change) -> Change:
    def change(members: Members, marker: Path) -> None:
        for one in changes:
            one(members, marker)

    return change


def _target(name: str) -> Change:
    return _document(lambda document, _: _relu(document).update(target=name))


def _call(name: str, *arguments: tuple[str, Any]) -> Change:
    """Call an operator beside the others, with arguments of which ``MARKER`` stands for the path."""

    def change(members: Members, marker: Path) -> None:
        document = json.loads(members[MODEL])
        node = copy.deepcopy(_relu(document))
        spelled = json.loads(json.dumps(list(arguments)).replace("MARKER", str(marker)))
        node.update(target=name, name="extra", outputs=[{"as_none": True}],
                    inputs=[{"name": key, "arg": value, "kind": 1} for key, value in spelled])  # fmt: skip
        _graph(document)["nodes"].insert(0, node)
        members[MODEL] = json.dumps(document).encode()

    return change


def _payload(path: str, *, key: str = "0.weight", table: str = WEIGHTS, use_pickle: bool = True) -> Change:
    def edit(document: Any, _: str) -> None:
        document["config"].setdefault(key, copy.deepcopy(next(iter(_weights()["config"].values()))))
        document["config"][key].update(path_name=path, use_pickle=use_pickle)

    return _document(edit, table)


def _weights() -> Any:
    return json.loads(good_program()[WEIGHTS])


def _spec(edit: Callable[[Any, str], None], which: str = "in_spec") -> Change:
    def change(document: Any, code: str) -> None:
        signature = document["graph_module"]["module_call_graph"][0]["signature"]
        version, tree = json.loads(signature[which])
        edit(tree, code)
        signature[which] = json.dumps([version, tree])
        signature["forward_arg_names"] = None

    return _document(change)


def _keyword(tree: Any, code: str) -> None:
    """A keyword argument whose name is a default value too: it goes into the head of ``forward``."""
    tree["children_spec"][0]["children_spec"] = []
    tree["children_spec"][1]["context"] = json.dumps([f"input={code}"])
    tree["children_spec"][1]["children_spec"] = [{"type": None, "context": None, "children_spec": []}]


def _default_factory(tree: Any, code: str) -> None:
    tree.update(type="collections.defaultdict", context=json.dumps(
        {"default_factory_module": "antigravity", "default_factory_name": "x", "dict_context": []}))  # fmt: skip


def _enum(tree: Any, code: str) -> None:
    tree["children_spec"][1]["context"] = json.dumps([{"__enum__": True, "fqn": "antigravity:x", "name": "y"}])


def _expression(text_of: Callable[[str], str]) -> Change:
    def edit(document: Any, code: str) -> None:
        for meta in _graph(document)["tensor_values"].values():
            for size in meta["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = text_of(code)

    return _document(edit)


def _constant_input(document: Any, code: str) -> None:
    """A string among the inputs: torch writes it between quotes, into a check that it then runs."""
    value = f"' or {code} or '"
    _graph(document)["inputs"].append({"as_string": value})
    signature = document["graph_module"]["signature"]
    signature["input_specs"].append({"constant_input": {"name": "mode", "value": {"as_string": value}}})
    entry = document["graph_module"]["module_call_graph"][0]["signature"]
    version, tree = json.loads(entry["in_spec"])
    tree["children_spec"][0]["children_spec"].append({"type": None, "context": None, "children_spec": []})
    entry["in_spec"] = json.dumps([version, tree])
    entry["forward_arg_names"].append("mode")


def _guards(document: Any, code: str) -> None:
    document["guards_code"] = [f"{code} or True"]


def _deep(levels: int) -> Any:
    value: Any = {"as_none": True}
    for _ in range(levels):
        value = {"as_string_to_argument": {"k": value}}
    return value


def _nested(document: Any, _: str) -> None:
    _relu(document)["inputs"].append({"name": "x", "arg": _deep(400), "kind": 1})


def _json_nested(members: Members, _: Path) -> None:
    members[MODEL] = b"[" * 200_000 + b"]" * 200_000


def _json_of_brackets(members: Members, _: Path) -> None:
    members[MODEL] = b"[" + b"[]," * 12_000_000 + b"[]]"


def _json_number(members: Members, _: Path) -> None:
    members[MODEL] = members[MODEL].replace(b'"as_int": 4', b'"as_int": ' + b"9" * 1_000_000)


def _huge_weight(document: Any, _: str) -> None:
    meta = document["config"]["0.weight"]["tensor_meta"]
    meta.update(sizes=[{"as_int": 1 << 20}, {"as_int": 1 << 20}], strides=[{"as_int": 0}, {"as_int": 0}])


def _empty_record(members: Members, marker: Path) -> None:
    """A record of no bytes stands for a tensor of zeros, of any size."""
    members["data/weights/weight_0"] = b""
    _document(_huge_weight, WEIGHTS)(members, marker)


def _second_model(members: Members, marker: Path) -> None:
    """A description under another ending: torch takes every file of that folder for one."""
    _call("torch.os.system", ("", {"as_string": "mkdir MARKER"}))(members, marker)
    members["models/model.data"] = members[MODEL]
    members[MODEL] = good_program()[MODEL]


def _legacy_archive(folder: Path, marker: Path) -> Path:
    path = folder / "model.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (("version", b"8.8"), ("serialized_exported_program.json", b"{}"),
                              ("serialized_state_dict.pt", _evil(marker)), ("serialized_constants.pt", b""),
                              ("serialized_example_inputs.pt", b"")):  # fmt: skip
            archive.writestr(name, content)
    return path


def _both_archives(folder: Path, marker: Path) -> Path:
    """A program that fails to load, so that torch falls back to what it finds at the root."""
    members = dict(good_program())
    _document(lambda document, _: document.clear())(members, marker)
    path = folder / "model.pt2"
    path.write_bytes(zipped(members, folder="model/"))
    with zipfile.ZipFile(path, "a") as archive:
        for name, content in (("version", b"8.8"), ("serialized_exported_program.json", good_program()[MODEL]),
                              ("serialized_state_dict.pt", _evil(marker)), ("serialized_constants.pt", b""),
                              ("serialized_example_inputs.pt", b"")):  # fmt: skip
            archive.writestr(name, content)
    return path


def _script_as_sample(marker: Path) -> bytes:
    """A TorchScript program in the place of the sample: ``torch.load`` hands it to ``torch.jit.load``."""
    return zipped(good_script())


def _tar_as_sample(marker: Path) -> bytes:
    from tests.hostile.evil_pickles import _tar

    return _tar(marker)


RUNS = "is a pickled object"
OPERATOR = "which is no operator of torch that only computes"
NO_NAME = "is no name"

CHANGES: dict[str, tuple[Change, int, str, str]] = {
    # name: (change, exit code, sentence, loader that runs it)
    "sample-pickle": (_put(SAMPLE, _evil), 4, "which no model needs", "export"),
    "sample-pickle-in-zip": (_put(SAMPLE, lambda marker: torch_zip(_evil(marker))), 4, "which no model needs", "export"),
    "sample-pickle-legacy": (_put(SAMPLE, lambda marker: legacy(_evil(marker))), 4, "which no model needs", "export"),
    "sample-pickle-magic": (_put(SAMPLE, lambda marker: legacy(b"N.", magic=_evil(marker))), 4, "which no model needs", "export"),
    "sample-of-a-class": (_put(SAMPLE, b"\x80\x02" + called("argparse", "Namespace") + STOP), 4, "argparse.Namespace", ""),
    "sample-tar": (_put(SAMPLE, _tar_as_sample), 2, "cannot load", ""),
    "sample-script": (_put(SAMPLE, _script_as_sample), 4, "is a pickle that names", ""),
    "sample-under-capitals": (_both(_put("data/sample_inputs/MODEL.PT", _evil), lambda members, _: members.pop(SAMPLE)), 0,
                              "of 3 units are dead", "export"),
    "weight-pickle": (_both(_payload("weight_0"), _put("data/weights/weight_0", _evil)), 4, RUNS, "export"),
    "weight-pickle-in-a-folder": (_both(_payload("sub/weight_0"), _put("data/weights/sub/weight_0", _evil)), 2,
                                  "is missing", "export"),
    "weight-pickle-under-capitals": (_both(_payload("WEIGHT_9"), _put("data/weights/weight_9", _evil)), 2, "is missing",
                                     "export"),
    "weight-called-metadata": (_both(_payload("weight_9", key="metadata"), _put("data/weights/weight_9", _evil)), 4, RUNS,
                               "export"),
    "weights-legacy": (_put("data/weights/model.pt", _evil), 4, "which no model needs", "export"),
    "constant-opaque": (_both(_payload("opaque_obj_0", key="x", table=CONSTANTS),
                              _put("data/constants/opaque_obj_0", _evil)), 4, RUNS, "export"),
    "constant-opaque-in-a-folder": (_both(_payload("opaque_obj_0/x", key="x", table=CONSTANTS),
                                          _put("data/constants/opaque_obj_0/x", _evil)), 2, "is missing", "export"),
    "constant-opaque-under-capitals": (_both(_payload("opaque_obj_0", key="x", table=CONSTANTS),
                                             _put("data/CONSTANTS/opaque_obj_0", _evil)), 2, "is missing", "export"),
    "constant-script-object": (_both(_payload("custom_obj_0", key="x", table=CONSTANTS),
                                     _put("data/constants/custom_obj_0", _evil)), 4, RUNS, ""),
    "constant-pickled": (_both(_payload("tensor_0", key="x", table=CONSTANTS), _put("data/constants/tensor_0", _evil)), 4,
                         RUNS, "export"),
    "constants-legacy": (_put("data/constants/model.pt", _evil), 4, "which no model needs", "export"),
    "native-library": (_put("data/aotinductor/model/x.so", b"\x7fELF"), 4, "is compiled code", ""),
    "native-library-elsewhere": (_put("extra/x.SO", b"\x7fELF"), 4, "is compiled code", ""),
    "second-model": (_second_model, 0, "of 3 units are dead", ""),
    "calls-os-system": (_call("torch.os.system", ("", {"as_string": "mkdir MARKER"})), 4, OPERATOR, ""),
    "calls-hub": (_call("torch.hub.load", ("", {"as_string": "MARKER"})), 4, OPERATOR, ""),
    "calls-load": (_target("torch.load"), 4, OPERATOR, ""),
    "calls-save": (_target("torch.ops.aten.save.default"), 4, OPERATOR, ""),
    "calls-from-file": (_target("torch.ops.aten.from_file.default"), 4, OPERATOR, ""),
    "calls-set-grad-enabled": (_target("torch.ops.aten.set_grad_enabled.default"), 4, OPERATOR, ""),
    "calls-unchecked-sparse": (_target("torch.ops.aten._sparse_coo_tensor_unsafe.default"), 4, OPERATOR, ""),
    "calls-python": (_target("torch.ops.prim.PythonOp"), 4, OPERATOR, ""),
    "calls-rpc": (_target("torch.ops.prim.rpc_sync"), 4, OPERATOR, ""),
    "calls-load-library": (_target("torch.ops.load_library"), 4, OPERATOR, ""),
    "calls-own-library": (_target("torch.ops.mylib.evil.default"), 4, OPERATOR, ""),
    "calls-methodcaller": (_target("_operator.methodcaller"), 4, OPERATOR, ""),
    "calls-dunder": (_target("torch.ops.aten.__class__.__init__"), 4, OPERATOR, ""),
    "calls-extension": (_target("#evil:op"), 4, OPERATOR, ""),
    "argument-is-an-operator": (_call("torch.ops.aten.relu.default", ("self", {"as_operator": "torch.os.system"})), 4,
                                OPERATOR, ""),
    "argument-is-an-object": (_document(lambda d, _: _graph(d).update(custom_obj_values={
        "x": {"name": "x", "class_fqn": "__torch__.Evil"}})), 4, "holds an object", ""),
    "placeholder-default": (_document(lambda d, code: _rename(d, "input", f"input={code}")), 4, NO_NAME, "export"),
    "placeholder-annotation": (_document(lambda d, code: _rename(d, "input", "input: x")), 4, NO_NAME, ""),
    "node-name": (_document(lambda d, code: _rename(d, "relu", f"relu; {code}")), 4, NO_NAME, ""),
    "node-name-with-a-line": (_document(lambda d, code: _rename(d, "relu", f"relu = 0\n    {code}\n    relu")), 4, NO_NAME, ""),
    "argument-name": (_document(lambda d, code: d["graph_module"]["module_call_graph"][0]["signature"].update(
        forward_arg_names=[f"input={code}"])), 4, NO_NAME, ""),
    "weight-name": (_document(lambda d, code: _rename(d, "0.weight", f'0.w") or {code} or ("')), 4, NO_NAME, ""),
    "weight-called-class": (_document(lambda d, code: _rename(d, "0.weight", "__class__.weight")), 4,
                            "no name of a weight", ""),
    "keyword-name": (_spec(_keyword), 4, "hold a quote", ""),
    "tree-imports": (_spec(_default_factory), 4, "import a module", ""),
    "tree-imports-enum": (_spec(_enum), 4, "import a module", ""),
    "tree-of-a-class": (_spec(lambda tree, _: tree.update(type="antigravity.Thing"), "out_spec"), 4,
                        "--allow-class antigravity.Thing", ""),
    "tree-of-a-command": (_spec(lambda tree, _: tree.update(type="x; touch evil"), "out_spec"), 4, NO_NAME, ""),
    "tree-key-with-a-quote": (_spec(lambda tree, code: tree.update(
        type="builtins.dict", context=json.dumps([f'" or {code} or "'])), "out_spec"), 4, "hold a quote", ""),
    "tree-is-no-tree": (_spec(lambda tree, _: tree.update(children_spec=5)), 4, "cannot be read", ""),
    "expression-evaluates": (_expression(lambda code: code), 4, "more than arithmetic", "export"),
    "expression-in-a-comment": (_expression(lambda code: f"(1 #\n+ {code})"), 4, "more than arithmetic", ""),
    "expression-in-full-width": (_expression(lambda code: "ｅval('1')"), 4, "more than arithmetic", ""),
    "expression-attribute": (_expression(lambda code: "Symbol('s0').__class__"), 4, "more than arithmetic", ""),
    "expression-power-tower": (_expression(lambda code: "Pow(Integer(9), Pow(Integer(9), Integer(9)))"), 4,
                               "more than arithmetic", ""),
    "expression-powers-of-powers": (_expression(lambda code: "(((9**8)**8)**8)**8"), 4, "more than arithmetic", ""),
    "expression-digits": (_expression(lambda code: "Float('0.1', 999999999)"), 4, "more than arithmetic", ""),
    "expression-shift": (_expression(lambda code: "1 << 999999999"), 4, "more than arithmetic", ""),
    "range-of-symbol-9999999999": (_document(lambda d, _: d["range_constraints"].update(
        u9999999999={"min_val": 0, "max_val": 9})), 4, "that of no symbol", ""),
    "guards": (_document(_guards), 0, "of 3 units are dead", "export"),
    "constant-input": (_document(_constant_input), 4, "holds a quote", ""),
    "stack-trace": (_document(lambda d, code: _relu(d)["metadata"].update(
        stack_trace=f'File "x", line 1, in f\n  {code}', source_fn_stack="a,torch.os.system", custom="[" * 9999)), 0,
        "of 3 units are dead", ""),
    "nested-arguments": (_document(_nested), 2, "cannot", ""),
    "json-nested": (_json_nested, 2, "cannot be read", ""),
    "json-of-brackets": (_json_of_brackets, 2, "more than any program needs", ""),
    "json-number": (_json_number, 2, "cannot be read", ""),
    "json-is-a-list": (_put(MODEL, b"[]"), 2, "describes no program", ""),
    "json-is-empty": (_put(MODEL, b"{}"), 2, "describes no program", ""),
    "module-is-empty": (_put(MODEL, b'{"graph_module": {}}'), 2, "cannot load", ""),
    "no-verifier": (_document(lambda d, _: d.update(verifiers=[])), 0, "of 3 units are dead", ""),
    "no-table": (lambda members, _: members.pop(WEIGHTS), 2, "is missing", ""),
    "table-is-a-list": (_put(WEIGHTS, b"[]"), 2, "no table of tensors", ""),
    "weight-without-a-shape": (_document(lambda d, _: d["config"]["0.weight"].update(tensor_meta=[5]), WEIGHTS), 2,
                               "has no shape", ""),
    "weight-of-4-tib": (_document(_huge_weight, WEIGHTS), 2, "of memory", ""),
    "weight-of-no-record": (_empty_record, 2, "of memory", ""),
    "weight-beyond-its-record": (_put("data/weights/weight_0", bytes(4)), 2, "cannot load", ""),
    "weight-missing": (lambda members, _: members.pop("data/weights/weight_0"), 2, "is missing", ""),
}  # fmt: skip

_UNTOLD = frozenset(("nested-arguments", "module-is-empty", "sample-tar", "weight-beyond-its-record"))
"""What only torch can tell, so that an inspection finds nothing wrong."""


def _found(name: str, code: int, says: str) -> str:
    return "an exported program" if name in _UNTOLD or code == 0 else says


CASES = (
    *(
        Case(f"pt2-{name}", changed(change), code, says, found=_found(name, code, says), armed=armed)
        for name, (change, code, says, armed) in CHANGES.items()
    ),
    Case("pt2-legacy-archive", _legacy_archive, 2, "more than one folder"),
    Case("pt2-two-archives", _both_archives, 2, "more than one folder"),
)  # fmt: skip

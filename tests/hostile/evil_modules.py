"""Whole modules that would change what a model does, take the memory, or never end."""

from __future__ import annotations

from tests.hostile.cases import (
    STOP,
    Case,
    built,
    called,
    into,
    linear,
    mapping,
    module,
    named,
    parameter,
    relu,
    saved,
    sequential,
    tensor,
    text,
    torch_zip,
    whole,
)

RELU = named("torch.nn.functional", "relu")
TANH = named("torch.nn.functional", "tanh")
SHADOW = "takes the place of a method"
HOOK = "is a hook, which would run code of the file"


def _net(*, extra: dict[str, bytes]) -> bytes:
    return saved(sequential(linear(extra=extra), relu()))


def _lstm(**state: bytes) -> bytes:
    """An LSTM whose ``__setstate__`` runs over its layers."""
    usual = {"mode": text("LSTM"), "input_size": whole(4), "hidden_size": whole(3), "bias": b"\x88",
             "bidirectional": b"\x89", "batch_first": b"\x88", "dropout": whole(0), "proj_size": whole(0),
             "_all_weights": b"](]K\x00ae"}  # fmt: skip
    return saved(sequential(module("rnn.LSTM", **{**usual, **state}), relu()))


def _self_containing() -> bytes:
    """A module that is its own child."""
    body = named("torch.nn.modules.container", "Sequential") + b")\x81q\x05}("
    inside = text("_modules") + b"}" + text("0") + b"h\x05s"
    return saved(body + text("_parameters") + b"}" + text("training") + b"\x89" + inside + b"ub")


def _shared_tree() -> bytes:
    """40 levels of containers, each with the one below it twice: 2**40 modules for who walks the paths."""
    body = relu() + b"q\x0a0"
    for _ in range(40):
        children = mapping({"0": b"h\x0a", "1": b"h\x0a"})
        body += module("container.Sequential", tables={"_modules": children}) + b"q\x0a0"
    return saved(body + b"h\x0a")


def _broad_tree(children: int = 20_000, levels: int = 40) -> bytes:
    """Each container holds the one below it many times, under long names."""
    keys = b"".join(text(f"{'n' * 40}{number}") + b"h\x0a" for number in range(children))
    body = relu() + b"q\x0a0"
    for _ in range(2):
        body += module("container.Sequential", tables={"_modules": b"}(" + keys + b"u"}) + b"q\x0a0"
    for _ in range(levels):
        body += module("container.Sequential", tables={"_modules": mapping({"a": b"h\x0a", "b": b"h\x0a"})}) + b"q\x0a0"
    return saved(body + b"h\x0a")


def _long_names() -> bytes:
    """60 levels of containers under names of a million letters, which is gigabytes for who joins the paths."""
    long = text("n" * 1_000_000) + b"q\x0b0"
    body = long + relu() + b"q\x0a0"
    for _ in range(60):
        children = b"}h\x0bh\x0as"
        body += module("container.Sequential", tables={"_modules": children}) + b"q\x0a0"
    return saved(body + b"h\x0a")


def _deep_chain(levels: int) -> bytes:
    body = relu() + b"q\x0a0"
    for _ in range(levels):
        body += module("container.Sequential", tables={"_modules": mapping({"0": b"h\x0a"})}) + b"q\x0a0"
    return saved(body + b"h\x0a")


def _hook(name: str, state: dict[str, bytes]) -> bytes:
    place, _, cls = name.rpartition(".")
    hooks = b"}K\x00" + built(place, cls, state) + b"s"
    return saved(sequential(module("linear.Linear", tables={"_forward_pre_hooks": hooks})))


def _transformer(activation: bytes) -> bytes:
    return saved(module("transformer.TransformerEncoderLayer", activation=activation))


def _expanded(kind: str) -> bytes:
    """A buffer of 64 GiB made of one number."""
    wide = tensor("0", (1 << 34,), stride=(0,), elements=1)
    tables = {kind: mapping({"w": wide}), "_modules": mapping({"0": relu()})}
    return torch_zip(b"\x80\x02" + module("container.Sequential", tables=tables) + STOP, _0=bytes(4))


CASES = (
    Case("module-planted-forward", into("model.pt", _net(extra={"forward": RELU})), 4, SHADOW, found="0.forward"),
    Case("module-planted-call", into("model.pt", _net(extra={"__call__": RELU})), 4, SHADOW, found="0.__call__"),
    Case("module-planted-wrapper", into("model.pt", _net(extra={"_call_impl": RELU})), 4, SHADOW, found="0._call_impl"),
    Case("module-planted-compiled", into("model.pt", _net(extra={"_compiled_call_impl": TANH})), 4, SHADOW,
         found="0._compiled_call_impl"),
    Case("module-planted-getattr", into("model.pt", _net(extra={"__getattr__": RELU})), 4, SHADOW, found="__getattr__"),
    Case("module-planted-class", into("model.pt", _net(extra={"__class__": named("torch.nn.modules.activation", "Tanh")})),
         4, SHADOW, found="0.__class__"),
    Case("module-planted-dict", into("model.pt", _net(extra={"__dict__": b"}"})), 4, SHADOW, found="0.__dict__"),
    Case("module-planted-setstate", into("model.pt", _net(extra={"__setstate__": RELU})), 4, SHADOW,
         found="0.__setstate__"),
    Case("module-planted-eval", into("model.pt", _net(extra={"eval": RELU})), 4, SHADOW, found="0.eval"),
    Case("module-planted-number", into("model.pt", _net(extra={"forward": b"K\x01"})), 4, SHADOW, found="0.forward"),
    Case("module-known-function-astray", into("model.pt", _net(extra={"act": TANH})), 4, "act holds", found="0.act"),
    Case("module-unknown-function", into("model.pt", _net(extra={"act": named("numpy", "sort")})), 4,
         "holds numpy.sort", found="0.act"),
    Case("module-unknown-activation", into("model.pt", _transformer(named("torch", "svd"))), 4,
         "activation holds torch.svd"),
    Case("module-pre-hook", into("model.pt", _hook("torch.nn.modules.activation.Tanh", {})), 4, HOOK, found="hook"),
    Case("module-pre-hook-function", into("model.pt", saved(module("linear.Linear", tables={
        "_forward_pre_hooks": b"}K\x00" + TANH + b"s"}))), 4, HOOK, found="hook"),
    Case("module-prune-hook-with-a-method", into("model.pt", _hook(
        "torch.nn.utils.prune.L1Unstructured", {"compute_mask": TANH, "_tensor_name": text("weight")})), 4,
        "compute_mask", found="L1Unstructured"),
    Case("module-weight-norm-writes-a-table", into("model.pt", _hook(
        "torch.nn.utils.weight_norm.WeightNorm", {"name": text("_parameters"), "dim": whole(0)})), 4,
        "names '_parameters'", found="WeightNorm"),
    Case("module-reduce-with-arguments", into("model.pt", saved(
        called("torch.nn.modules.linear", "Linear", whole(100_000), whole(100_000)))), 4,
        "with arguments, which torch.save never writes", found="which is neither a model nor its weights"),
    Case("module-arguments-and-state", into("model.pt", saved(
        called("torch.nn.modules.linear", "Linear", whole(100_000), whole(100_000)) + b"}(" + text("_parameters")
        + b"}" + text("training") + b"\x89ub")), 4, "with arguments, which torch.save never writes", found="arguments"),
    Case("module-holds-itself", into("model.pt", _self_containing()), 4, "holds itself"),
    Case("module-shared-tree", into("model.pt", _shared_tree()), 4, "without end"),
    Case("module-broad-tree", into("model.pt", _broad_tree()), 4, "without end"),
    Case("module-long-names", into("model.pt", _long_names()), 4, "without end"),
    Case("module-nested-2000", into("model.pt", _deep_chain(2000)), 4, "nested"),
    Case("module-lstm-endless-layers", into("model.pt", _lstm(num_layers=whole(10**15))), 4, "num_layers is no number of layers", found="rnn.LSTM"),
    Case("module-lstm-layers-of-text", into("model.pt", _lstm(num_layers=text("x"))), 4, "num_layers is no number of layers", found="rnn.LSTM"),
    Case("module-lstm-no-weights", into("model.pt", _lstm(num_layers=whole(1), _all_weights=b"]")), 2, "cannot be rebuilt", found="rnn.LSTM"),
    Case("module-lstm-no-names", into("model.pt", _lstm(num_layers=whole(1), _all_weights=b"]]" + text("w") + b"aa", _flat_weights=b"]")), 2, "cannot be put on", found="rnn.LSTM"),
    Case("module-weights-by-number", into("model.pt", saved(module("linear.Linear", tables={
        "_parameters": b"}K\x05" + parameter(tensor("0", (3, 4))) + b"s"}))), 4, "no text", found="no text"),
    Case("module-children-by-number", into("model.pt", saved(module("container.Sequential", tables={
        "_modules": b"}K\x05" + relu() + b"s"}))), 4, "no text", found="no text"),
    Case("module-state-is-a-list", into("model.pt", saved(named("torch.nn.modules.linear", "Linear") + b")\x81]b")), 4,
         "a state that is no dict of names", found="neither a model"),
    Case("module-tensor-where-a-module-stands", into("model.pt", saved(module("container.Sequential", tables={
        "_modules": mapping({"0": tensor("0", (3, 4))})}))), 4, "where a module must stand", found="module must stand"),
    Case("module-plain-tensor-as-parameter", into("model.pt", saved(module("linear.Linear", tables={
        "_parameters": mapping({"weight": text("evil")})}))), 4, "where a tensor must stand", found="linear.Linear"),
    Case("module-buffer-of-64-gib", into("model.pt", _expanded("_buffers")), 2, "of memory", found="64.0 GiB"),
    Case("module-parametrised", into("model.pt", saved(module("linear.Linear", tables={
        "_modules": mapping({"parametrizations": built("torch.nn.utils.parametrize", "ParametrizationList", {
            "_parameters": b"}", "_modules": b"}", "_buffers": b"}", "unsafe": b"\x88"})})}))), 4,
        "torch.nn.utils.parametrize.ParametrizationList", found="ParametrizationList"),
    Case("module-own-class", into("model.pt", saved(built("arch", "Net", {
        "_parameters": b"}", "_modules": b"}", "_buffers": b"}", "act": RELU}))), 4, "--allow-class arch.Net"),
    Case("module-allowed-class-only", into("model.pt", saved(built("arch", "Net", {
        "_parameters": b"}", "_buffers": b"}", "act": RELU,
        "_modules": mapping({"evil": built("antigravity", "Net", {"_parameters": b"}"})})}))), 4,
        "--allow-class antigravity.Net", flags=("--allow-class", "arch.Net")),
    Case("module-allowed-class-shadowed", into("model.pt", saved(built("arch", "Net", {
        "_parameters": b"}", "_buffers": b"}", "_modules": b"}", "forward": RELU}))), 4, SHADOW,
        flags=("--allow-class", "arch.Net"), found="arch.Net"),
    Case("module-allowed-plain-class-turned", into("model.pt", saved(built("arch", "Net", {
        "_parameters": b"}", "_buffers": b"}", "_modules": b"}",
        "helper": built("arch", "Plain", {"__class__": TANH})}))), 4, "__class__",
        flags=("--allow-class", "arch.Net", "--allow-class", "arch.Plain"), found="arch.Net"),
    Case("module-allowed-function", into("model.pt", saved(built("arch", "net", {
        "_parameters": b"}", "_buffers": b"}", "_modules": b"}"}))), 2, "is no class",
        flags=("--allow-class", "arch.net"), found="arch.net"),
    Case("module-allowed-but-denied", into("model.pt", saved(built("os", "system", {"_parameters": b"}"}))), 4,
        "which no model needs and an attack would use", flags=("--allow-class", "os.system")),
    Case("module-of-a-script", into("model.pt", saved(built("__main__", "Net", {"_parameters": b"}"}))), 4,
        "__main__.Net"),
)  # fmt: skip

"""In every format the patched file computes what a leaky model written by hand computes: difference 0.0."""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import deadcheck
from deadcheck.config import Config, ScanSettings
from deadcheck.errors import NothingMeasured, PatchError, TrustRequired, UsageError
from deadcheck.formats import LoadOptions
from deadcheck.patch_file import read_plan
from deadcheck.patch_job import PatchOptions, run
from deadcheck.patch_plan import Kind, PatchPlan, Replacement
from deadcheck.patch_result import PatchResult
from deadcheck.remedies.base import Choice

SAMPLES = Path(__file__).parent.parent / "sample_models"
ALPHA = 0.1
LEAKY = Replacement(Kind.LEAKY, ALPHA)
X = torch.from_numpy(np.load(SAMPLES / "digits_mlp.sample.npz")["x"])


def architecture(name: str) -> nn.Module:
    sys.path.insert(0, str(SAMPLES))
    try:
        import architectures
    finally:
        sys.path.remove(str(SAMPLES))
    return getattr(architectures, name)()  # type: ignore[no-any-return]


def mlp() -> nn.Module:
    return torch.load(SAMPLES / "digits_mlp.pt", weights_only=False).eval()  # type: ignore[no-any-return]


def residual() -> nn.Module:
    model = architecture("residual_cnn")
    model.load_state_dict(load_file(SAMPLES / "digits_residual.safetensors"))
    return model.eval()


def transformer() -> nn.Module:
    model = architecture("transformer")
    model.load_state_dict(torch.load(SAMPLES / "digits_transformer.pt"))
    return model.eval()


def leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, ALPHA)


def by_hand(model: nn.Module, x: Tensor) -> Tensor:
    """Compute the leaky model by hand."""
    if isinstance(model, nn.Sequential):
        for layer in model:
            x = leaky(x) if isinstance(layer, nn.ReLU) else layer(x)
        return x
    if hasattr(model, "stem"):
        x = leaky(model.bn1(model.stem(x.view(-1, 1, 8, 8))))
        y = model.bn2(model.conv(x))
        y += x
        return model.fc(leaky(y).mean((2, 3)))  # type: ignore[no-any-return]
    x = model.embed(x.view(-1, 8, 8)) + model.position
    for layer in model.encoder.layers:
        x = layer.norm1(x + layer.self_attn(x, x, x, need_weights=False)[0])
        x = layer.norm2(x + layer.linear2(leaky(layer.linear1(x))))
    return model.head(x.mean(1))  # type: ignore[no-any-return]


def scripted(model: nn.Module, path: Path) -> None:
    torch.jit.save(torch.jit.script(model), path)


def traced(model: nn.Module, path: Path) -> None:
    torch.backends.mha.set_fastpath_enabled(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        torch.jit.save(torch.jit.trace(model, (X[:3],)), path)
    torch.backends.mha.set_fastpath_enabled(True)


def frozen(model: nn.Module, path: Path) -> None:
    torch.jit.save(torch.jit.freeze(torch.jit.script(model)), path)


def exported(model: nn.Module, path: Path) -> None:
    shapes = ({0: torch.export.Dim.AUTO},)
    torch.export.save(torch.export.export(model, (X[:4],), dynamic_shapes=shapes), path)


def static(model: nn.Module, path: Path) -> None:
    torch.export.save(torch.export.export(model, (X[:64],)), path)


Save = Callable[[nn.Module, Path], None]
SCRIPTS: tuple[Save, ...] = (scripted, traced, frozen)
EXPORTS: tuple[Save, ...] = (exported, static)
MODELS = (mlp, residual, transformer)


def patched(
    path: Path, output: Path | None, choice: Choice | None = None, *, samples: int = 128, **options: object
) -> PatchResult:
    settings = replace(ScanSettings(), data=str(SAMPLES / "digits_mlp.sample.npz"), max_samples=samples)
    load = LoadOptions(trust=True, arch=options.pop("arch", None))  # type: ignore[arg-type]
    asked = PatchOptions(choice=choice or Choice(LEAKY), output=output, **options)  # type: ignore[arg-type]
    return run(path, load, replace(Config(), scan=settings), asked)


def equal(got: Tensor, wanted: Tensor, make: Callable[[], nn.Module], save: Save | None = None) -> bool:
    """Compare to the bit, or to rounding where torch runs attention by other kernels, or folds a batch norm away."""
    rounds = make is transformer or (make is residual and save is frozen)
    return torch.allclose(got, wanted, atol=1e-5, rtol=1e-5) if rounds else torch.equal(got, wanted)


def batches(model: object, x: Tensor, size: int = 64) -> Tensor:
    """Run whole batches."""
    return torch.cat([model(part) for part in x.split(size) if len(part) == size])  # type: ignore[operator]


@pytest.mark.parametrize("save", SCRIPTS, ids=lambda save: save.__name__)
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
@torch.no_grad()
def test_torchscript(make: Callable[[], nn.Module], save: Save, tmp_path: Path) -> None:
    if (make, save) == (transformer, frozen):
        pytest.skip("torch has fused the layer when it froze it; see below")
    model = make()
    save(model, tmp_path / "net.pt")
    before = hashlib.sha256((tmp_path / "net.pt").read_bytes()).hexdigest()
    result = patched(tmp_path / "net.pt", tmp_path / "fixed.pt")
    fixed = torch.jit.load(tmp_path / "fixed.pt")

    assert result.is_complete
    assert equal(batches(fixed, X), batches(lambda x: by_hand(model, x), X), make, save)
    assert list(fixed.state_dict()) == list(torch.jit.load(tmp_path / "net.pt").state_dict())
    assert not fixed.graph.findAllNodes("aten::relu", True)
    assert not fixed.graph.findAllNodes("aten::relu_", True)
    assert hashlib.sha256((tmp_path / "net.pt").read_bytes()).hexdigest() == before

    live = deadcheck.apply_patch(torch.jit.load(tmp_path / "net.pt"), tmp_path / "fixed.patch.yaml")
    assert torch.equal(batches(live, X), batches(fixed, X))


@pytest.mark.parametrize("save", EXPORTS, ids=lambda save: save.__name__)
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
@torch.no_grad()
def test_exported_programs(make: Callable[[], nn.Module], save: Save, tmp_path: Path) -> None:
    model = make()
    save(model, tmp_path / "net.pt2")
    result = patched(tmp_path / "net.pt2", tmp_path / "fixed.pt2")
    program = torch.export.load(tmp_path / "fixed.pt2")
    names = [str(node.target) for node in program.graph.nodes]

    assert result.is_complete
    assert equal(batches(program.module(), X), batches(lambda x: by_hand(model, x), X), make)
    assert list(program.state_dict) == list(torch.export.load(tmp_path / "net.pt2").state_dict)
    assert not any(name in ("aten.relu.default", "aten.relu_.default") for name in names)

    original = torch.export.load(tmp_path / "net.pt2")
    live = deadcheck.apply_patch(original, tmp_path / "fixed.patch.yaml")
    assert torch.equal(batches(live.module(), X), batches(program.module(), X))
    assert equal(batches(original.module(), X), batches(make(), X), make)


@pytest.mark.parametrize("save", [scripted, exported], ids=lambda save: save.__name__)
@torch.no_grad()
def test_single_units_of_a_program(save: Save, tmp_path: Path) -> None:
    model = mlp()
    path = tmp_path / ("net.pt2" if save is exported else "net.pt")
    save(model, path)
    output = tmp_path / f"fixed{path.suffix}"
    result = patched(path, output, Choice(LEAKY, only_dead=True), samples=450)
    fixed = torch.export.load(output).module() if save is exported else torch.jit.load(output)
    x = X
    for number, layer in enumerate(model):
        if isinstance(layer, nn.ReLU):
            dead = (model[:number](X) <= 0).all(0)
            x = torch.where(dead, leaky(x), F.relu(x))
        else:
            x = layer(x)

    assert [site.units_changed for site in result.sites] == [206, 77]
    assert torch.equal(fixed(X), x)


@pytest.mark.parametrize(
    ("name", "make", "arch"),
    [("digits_residual.safetensors", residual, "residual_cnn"), ("digits_transformer.pt", transformer, "transformer")],
)
@torch.no_grad()
def test_weights_become_a_program(name: str, make: Callable[[], nn.Module], arch: str, tmp_path: Path) -> None:
    entry = f"{SAMPLES / 'architectures.py'}:{arch}"
    patched(SAMPLES / name, tmp_path / "fixed.pt2", arch=entry)
    model = make()
    program = torch.export.load(tmp_path / "fixed.pt2").module()
    by_plan = deadcheck.apply_patch(make(), tmp_path / "fixed.patch.yaml")
    wanted = by_hand(model, X)

    assert equal(program(X), wanted, make)
    assert torch.allclose(by_plan(X), wanted, atol=1e-5)
    assert not torch.allclose(model(X), wanted, atol=1e-2)


@torch.no_grad()
def test_weights_of_torch_classes_become_a_whole_module(tmp_path: Path) -> None:
    entry = f"{SAMPLES / 'architectures.py'}:mlp"
    result = patched(SAMPLES / "digits_mlp_weights.pt", tmp_path / "fixed.pt", arch=entry)

    assert torch.equal(torch.load(tmp_path / "fixed.pt", weights_only=False)(X), by_hand(mlp(), X))
    assert result.written[-1].needs is None


def test_a_fused_operator_is_listed_as_out_of_reach(tmp_path: Path) -> None:
    frozen(transformer(), tmp_path / "net.pt")

    with pytest.raises(NothingMeasured, match="inside an operator that does more than that; nothing was written"):
        patched(tmp_path / "net.pt", tmp_path / "fixed.pt")


def test_a_learnt_slope_needs_a_module(tmp_path: Path) -> None:
    scripted(mlp(), tmp_path / "net.pt")
    result = patched(tmp_path / "net.pt", None, Choice(Replacement(Kind.PRELU, 0.25)), dry_run=True)

    assert not result.is_complete
    assert "a learnt slope needs a module of its own" in result.skipped[0].reason


@pytest.mark.parametrize("kind", [Kind.ELU, Kind.GELU, Kind.SILU])
@pytest.mark.parametrize("save", [scripted, exported], ids=lambda save: save.__name__)
@torch.no_grad()
def test_other_functions_in_programs(kind: Kind, save: Save, tmp_path: Path) -> None:
    model = mlp()
    path = tmp_path / ("net.pt2" if save is exported else "net.pt")
    save(model, path)
    output = tmp_path / f"fixed{path.suffix}"
    result = patched(path, output, Choice(Replacement(kind, 1.0 if kind is Kind.ELU else None)))
    fixed = torch.export.load(output).module() if save is exported else torch.jit.load(output)
    function = {Kind.ELU: F.elu, Kind.GELU: F.gelu, Kind.SILU: F.silu}[kind]
    x = X
    for layer in model:
        x = function(x) if isinstance(layer, nn.ReLU) else layer(x)

    assert result.is_complete
    assert torch.equal(fixed(X), x)


def test_the_wrong_suffix_is_refused(tmp_path: Path) -> None:
    scripted(mlp(), tmp_path / "net.pt")
    exported(mlp(), tmp_path / "net.pt2")
    with pytest.raises(UsageError, match=r"the model is a TorchScript program, .* name the output .pt"):
        patched(tmp_path / "net.pt", tmp_path / "fixed.pt2")
    with pytest.raises(UsageError, match=r"the model is an exported program, .* name the output .pt2"):
        patched(tmp_path / "net.pt2", tmp_path / "fixed.pt")


def test_a_program_needs_trust(tmp_path: Path) -> None:
    scripted(mlp(), tmp_path / "net.pt")

    with pytest.raises(TrustRequired, match="add --trust"):
        run(tmp_path / "net.pt", LoadOptions(), Config(), PatchOptions())


def test_a_patch_of_modules_is_none_for_a_program(tmp_path: Path) -> None:
    scripted(mlp(), tmp_path / "net.pt")
    patched(tmp_path / "net.pt", None, patch_file=tmp_path / "it.yaml")
    script = torch.jit.load(tmp_path / "net.pt")

    with pytest.raises(PatchError, match="for a TorchScript or exported program, and this is a model made of modules"):
        deadcheck.apply_patch(mlp(), tmp_path / "it.yaml")
    with pytest.raises(PatchError, match="the patch is for a model made of modules, and this is a program"):
        deadcheck.apply_patch(script, replace(read_plan(tmp_path / "it.yaml"), sites=plan_of_modules().sites))
    with pytest.raises(PatchError, match="a program is patched in a copy"):
        deadcheck.apply_patch(script, tmp_path / "it.yaml", inplace=True)
    with pytest.raises(PatchError, match="a dict is no model"):
        deadcheck.apply_patch({}, tmp_path / "it.yaml")


def plan_of_modules() -> PatchPlan:
    from tests.test_patch_zoo import planned

    return planned(mlp(), X, Choice(LEAKY))


def test_what_cannot_be_exported_leaves_the_patch_file(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch.nn.functional as F\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.fc = nn.Linear(64, 10)\n"
        "    def forward(self, x):\n        return F.relu(self.fc(x)) if x.sum() > 0 else self.fc(x)\n"
    )
    torch.save(
        nn.Sequential().state_dict() | {"fc.weight": torch.randn(10, 64), "fc.bias": torch.zeros(10)}, tmp_path / "w.pt"
    )

    with pytest.raises(PatchError, match=r"torch cannot export this model .*fixed.patch.yaml was written"):
        patched(tmp_path / "w.pt", tmp_path / "fixed.pt2", arch=f"{tmp_path / 'net.py'}:Net")
    assert sorted(p.name for p in tmp_path.glob("fixed*")) == ["fixed.patch.yaml"]


ODD = ("Functional", "ResidualBlock", "SharedAct", "Siamese", "Crelu", "ConvFlatten", "Heads", "Sliced", "Tokens")


@pytest.mark.parametrize("save", ["script", "trace", "export"])
@pytest.mark.parametrize("name", ODD)
@torch.no_grad()
def test_programs_of_the_zoo(name: str, save: str, tmp_path: Path) -> None:
    from tests import zoo
    from tests.oracle import LeakyOracle
    from tests.test_patch_zoo import relus

    kind = getattr(zoo, name)
    model, x = zoo.build(kind), zoo.inputs(kind, 8)
    np.save(tmp_path / "x.npy", x.numpy())
    path = tmp_path / ("net.pt2" if save == "export" else "net.pt")
    if save == "script":
        torch.jit.save(torch.jit.script(model), path)
    elif save == "trace":
        torch.jit.save(torch.jit.trace(model, (x[:4],)), path)
    else:
        torch.export.save(torch.export.export(model, (x[:4],)), path)
    settings = replace(ScanSettings(), data=str(tmp_path / "x.npy"), batch_size=4)
    output = tmp_path / f"fixed{path.suffix}"
    options = PatchOptions(Choice(LEAKY), output=output)
    result = run(path, LoadOptions(trust=True), replace(Config(), scan=settings), options)
    fixed = torch.export.load(output).module() if save == "export" else torch.jit.load(output)
    oracle = LeakyOracle({key: None for key, _ in relus(model, x)}, ALPHA)

    assert result.is_complete
    assert len(result.sites) == len(oracle.chosen)
    assert torch.equal(batches(fixed, x, 4), batches(lambda b: model.reference(oracle, b), x, 4))

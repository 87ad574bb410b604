"""ReLUs that are hard to tell apart are changed where they were meant to be, and nowhere else."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deadcheck
from deadcheck.errors import PatchError
from deadcheck.patch_file import dump_plan
from deadcheck.patch_plan import Kind, PatchPlan, Replacement
from deadcheck.remedies.base import Choice
from tests.patch_models import HARD, At, Everything, Hard, Helper, OneLine, SharedBlock, Twins, build, inputs
from tests.test_patch_zoo import planned, relus

ALPHA = 0.1
LEAKY = Replacement(Kind.LEAKY, ALPHA)


def only(keys: set[str], units: list[int] | None = None) -> At:
    """Return what stands at each site when those with ``keys`` leak."""

    def at(z: Tensor, key: str) -> Tensor:
        if key not in keys:
            return F.relu(z)
        leaky = F.leaky_relu(z, ALPHA)
        if units is None:
            return leaky
        mask = torch.zeros(z.shape[-1], dtype=torch.bool)
        mask[units] = True
        return torch.where(mask, leaky, F.relu(z))

    return at


def run(model: object, x: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in x.split(4)])  # type: ignore[operator]


def patch(model: nn.Module, **choice: object) -> nn.Module:
    return deadcheck.apply_patch(model, planned(model, inputs(), Choice(LEAKY, **choice)))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", HARD, ids=lambda kind: kind.__name__)
def test_all_leak(kind: type[Hard]) -> None:
    model, x = build(kind), inputs()
    keys = {key for key, _ in relus(model, x)}
    with torch.no_grad():
        got = run(patch(model), x)

        assert torch.equal(got, run(lambda b: model.reference(only(keys), b), x))
        assert not torch.equal(got, run(model, x))


@pytest.mark.parametrize("kind", HARD, ids=lambda kind: kind.__name__)
def test_each_alone_leaks(kind: type[Hard]) -> None:
    model, x = build(kind), inputs()
    for key, _ in relus(model, x):
        if key.startswith("script:"):  # the ReLUs of a TorchScript module inside change together
            continue
        with torch.no_grad():
            got = run(patch(model, layers=(key,)), x)
            assert torch.equal(got, run(lambda b, key=key: model.reference(only({key}), b), x)), key


@pytest.mark.parametrize("kind", [k for k in HARD if k is not Everything], ids=lambda kind: kind.__name__)
def test_units_of_each_alone_leak(kind: type[Hard]) -> None:
    model, x = build(kind), inputs()
    for key, _ in relus(model, x):
        with torch.no_grad():
            got = run(patch(model, only_dead=True, dead={key: ((1, 2), (5, 5))}), x)
            wanted = run(lambda b, key=key: model.reference(only({key}, [1, 2, 5]), b), x)
            assert torch.equal(got, wanted), key


@pytest.mark.parametrize("layers", [(), ("*",)], ids=["everything", "by site"])
@pytest.mark.parametrize("kind", HARD, ids=lambda kind: kind.__name__)
def test_gradients_equal_those_of_the_leaky_model_bit_for_bit(kind: type[Hard], layers: tuple[str, ...]) -> None:
    model, x = build(kind), inputs(4)
    keys = {key for key, _ in relus(model, inputs())}
    patched = patch(model, layers=layers)
    for _ in range(2):
        patched(x).sum().backward()
        model.reference(only(keys), x).sum().backward()

    for (name, new), (_, old) in zip(patched.named_parameters(), model.named_parameters(), strict=True):
        assert (new.grad is None) == (old.grad is None), name
        assert old.grad is None or torch.equal(new.grad, old.grad), name  # type: ignore[arg-type]


def test_a_branch_that_did_not_run_is_changed_too() -> None:
    model, x = build(Everything), inputs()
    plan = planned(model, x[:1], Choice(LEAKY))
    patched = deadcheck.apply_patch(model, plan)
    keys = {"relu", ":relu#1", ":relu#2", ":relu#3", "shared#1", "shared#2", ":clamp#1", ":threshold#1"}
    keys |= {"script:relu#1", "script:relu#2"}
    met: set[str] = set()

    def at(z: Tensor, key: str) -> Tensor:
        met.add(key)
        return only(keys)(z, key)

    with torch.no_grad():
        for batch in (x[:1], -x[:1]):
            assert torch.equal(patched(batch), model.reference(at, batch))
    assert met == keys
    assert len(plan.sites) == len(keys) - 1


class RoutedLoop(nn.Module):
    """Rows sent to the first and the third of three experts, whose ReLUs share a line; the second gets none."""

    def __init__(self, relu: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.relu, self.experts = relu, nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x, leaky=None):
        out, chosen = torch.zeros_like(x), 2 * (x[:, 0] > 0).long()
        for number, expert in enumerate(self.experts):
            row = torch.where(chosen == number)[0]
            z = expert(x[row])
            out = out.index_add(0, row, F.leaky_relu(z, ALPHA) if number == leaky else self.relu(z))
        return out


@pytest.mark.parametrize("relu", [F.relu, nn.ReLU()], ids=["function", "module"])
@pytest.mark.parametrize(("number", "expert"), [(1, 0), (2, 2)])
def test_a_call_without_rows_takes_its_turn(relu: Callable[[Tensor], Tensor], number: int, expert: int) -> None:
    torch.manual_seed(5)
    model, x = RoutedLoop(relu).eval(), inputs()
    key = f"relu#{number}" if isinstance(relu, nn.Module) else f":relu#{number}"
    patched = patch(model, layers=(key,))

    with torch.no_grad():
        assert all(torch.equal(patched(batch), model(batch, leaky=expert)) for batch in x.split(4))
        assert not torch.equal(patched(x), model(x))


def test_a_relu_on_weights_that_shares_a_line_is_left() -> None:
    class Positive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.weight = nn.Linear(6, 6), nn.Parameter(torch.randn(6, 6))

        def forward(self, x):
            weight, hidden = (F.relu(z) for z in (self.weight, self.fc(x)))
            return hidden @ weight

    torch.manual_seed(5)
    model, x = Positive().eval(), inputs()

    with torch.no_grad():
        got = patch(model, layers=(":relu#1",))(x)
        assert torch.equal(got, F.leaky_relu(model.fc(x), ALPHA) @ F.relu(model.weight))


def test_it_trains_as_the_leaky_model_does() -> None:
    model = build(Helper)
    patched = patch(model, layers=("*",))
    twin = copy.deepcopy(patched)
    x = inputs()
    optimisers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (patched, model)]
    for step in range(5):
        for m, optimiser in zip((patched, model), optimisers, strict=True):
            out = m(x) if m is patched else model.reference(only({":relu#1", ":relu#2", ":relu#3"}), x)
            optimiser.zero_grad()
            out.pow(2).mean().backward()
            optimiser.step()
        assert all(torch.equal(a, b) for a, b in zip(patched.parameters(), model.parameters(), strict=True)), step
    twin.load_state_dict(patched.state_dict())

    assert torch.equal(twin(x), patched(x))
    assert not torch.equal(patched(x), build(Helper)(x))


@pytest.mark.parametrize("layers", [(), ("*",)], ids=["everything", "by site"])
def test_it_compiles(layers: tuple[str, ...]) -> None:
    model, x = build(Helper), inputs()
    patched = patch(model, layers=layers)
    torch._dynamo.reset()
    compiled = torch.compile(patched, backend="eager", fullgraph=not layers)

    assert torch.equal(compiled(x), patched(x))


def test_where_calls_are_told_apart_a_compiled_model_tells_them_apart_too() -> None:
    model, x = build(Helper), inputs()
    patched = patch(model, layers=(":relu#2",))
    torch._dynamo.reset()
    compiled = torch.compile(nn.Sequential(patched, nn.Identity()), backend="eager")

    assert torch.equal(compiled(x), model.reference(only({":relu#2"}), x))


def test_it_runs_under_autocast() -> None:
    model, x = build(OneLine), inputs()
    patched = patch(model, layers=(":relu#2",))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(patched(x), model.reference(only({":relu#2"}), x))


def test_it_runs_in_data_parallel_threads() -> None:
    model, x = build(OneLine), inputs()
    patched = patch(model, layers=(":relu#2",))
    wanted = model.reference(only({":relu#2"}), x)
    replicas = [patched._replicate_for_data_parallel() for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        assert all(torch.equal(out, wanted) for out in pool.map(lambda replica: replica(x), replicas * 5))
    assert torch.equal(nn.DataParallel(patched)(x), wanted)


def test_two_patched_models_one_inside_the_other_do_not_disturb_one_another() -> None:
    inner, x = build(OneLine), inputs()
    student = patch(inner, layers=(":relu#1",))

    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = student

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.student(x) - 0.1)

    teacher = deadcheck.apply_patch(Teacher(), planned(Teacher(), x, Choice(LEAKY, layers=(":relu*",))))
    wanted = F.leaky_relu(inner.reference(only({":relu#1"}), x) - 0.1, ALPHA)

    assert torch.equal(teacher(x), wanted)


def test_a_module_called_by_itself_is_changed_too() -> None:
    model, x = build(Twins), inputs()
    for layers in ((), ("net.1:relu#1",)):
        patched = patch(model, layers=layers)

        assert torch.equal(patched.net[1](x), F.leaky_relu(model.net[1].fc(x), ALPHA))


def test_another_method_than_forward_is_changed_where_that_was_run() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def encode(self, x: Tensor) -> Tensor:
            return F.relu(self.fc(x))

    model, x = Encoder(), inputs()
    plan = PatchPlan(LEAKY, others=True, call="encode")

    assert torch.equal(deadcheck.apply_patch(model, plan).encode(x), F.leaky_relu(model.fc(x), ALPHA))


def test_the_signature_stays() -> None:
    import inspect

    model = build(Helper)
    for layers in ((), ("*",)):
        assert str(inspect.signature(patch(model, layers=layers).forward)) == "(x)"


def test_in_place_it_changes_the_model_given() -> None:
    model, x = build(Helper), inputs()
    plan = planned(model, x, Choice(LEAKY))
    wanted = model.reference(only({":relu#1", ":relu#2", ":relu#3"}), x)

    assert deadcheck.apply_patch(model, plan, inplace=True) is model
    assert torch.equal(model(x), wanted)


def test_patched_twice_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    plan = planned(model, inputs(), Choice(LEAKY))
    patched = deadcheck.apply_patch(model, plan)

    with pytest.raises(PatchError, match="'1' is a LeakyReLU, not the relu that the patch replaces; was it applied"):
        deadcheck.apply_patch(patched, plan)


def test_another_architecture_is_refused() -> None:
    plan = planned(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), inputs(), Choice(LEAKY))

    with pytest.raises(PatchError, match="the model has no module '1'; the patch was made for another architecture"):
        deadcheck.apply_patch(nn.Sequential(nn.Linear(6, 6)), plan)


def test_a_wrapped_model_is_refused_with_what_to_do() -> None:
    plan = planned(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), inputs(), Choice(LEAKY))

    with pytest.raises(PatchError, match="wrapped in DataParallel; patch the model inside it"):
        deadcheck.apply_patch(nn.DataParallel(nn.Sequential(nn.Linear(6, 6), nn.ReLU())), plan)


CODE = """
import torch.nn.functional as F
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
{body}
"""
BODY = "        x = F.relu(self.a(x))\n        return F.relu(self.b(x))"


def net(tmp_path: Path, body: str, name: str) -> nn.Module:
    from deadcheck.entrypoint import build as built

    path = tmp_path / f"{name}.py"
    path.write_text(CODE.format(body=body))
    torch.manual_seed(0)
    return built(f"{path}:Net", {})  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "body",
    [
        f"        y = x\n{BODY}",
        f"        # the first layer\n\n{BODY}",
        BODY.replace("        return", "\n        return"),
    ],
    ids=["a statement", "a comment and a blank line", "a blank line"],
)
def test_calls_are_found_again_where_lines_moved(body: str, tmp_path: Path) -> None:
    x = inputs()
    plan = planned(net(tmp_path, BODY, "old"), x, Choice(LEAKY, layers=(":relu#2",)))
    moved = net(tmp_path, body, "new")

    assert torch.equal(deadcheck.apply_patch(moved, plan)(x), F.leaky_relu(moved.b(F.relu(moved.a(x))), ALPHA))


@pytest.mark.parametrize(
    "body",
    [BODY.replace("self.b(x)", "self.b(2 * x)"), "        return F.relu(self.b(F.relu(self.a(x))))"],
    ids=["a line", "fewer lines"],
)
def test_code_that_was_changed_is_refused(body: str, tmp_path: Path) -> None:
    plan = planned(net(tmp_path, BODY, "old"), inputs(), Choice(LEAKY, layers=(":relu#2",)))
    changed = net(tmp_path, body, "new")

    with pytest.raises(PatchError, match=r":relu#2: the code of Net was changed since .* is no longer there"):
        deadcheck.apply_patch(changed, plan)


@pytest.mark.parametrize("layers", [(), (":relu#*",)], ids=["everything", "each by its name"])
def test_code_without_a_relu_any_more_is_said(layers: tuple[str, ...], tmp_path: Path) -> None:
    plan = planned(net(tmp_path, BODY, "old"), inputs(), Choice(LEAKY, layers=layers))
    changed = net(tmp_path, BODY.replace("relu", "silu"), "new")

    with pytest.warns(UserWarning, match="the code of Net seems to call no ReLU, so the patch may do nothing there"):
        deadcheck.apply_patch(changed, plan)


def test_saved_in_one_process_it_runs_in_another(tmp_path: Path) -> None:
    model, x = build(SharedBlock), inputs()
    patched = patch(model, layers=("act:relu#2",))
    held = io.BytesIO()
    torch.save({"model": patched, "x": x, "wanted": model.reference(only({"act:relu#2"}), x)}, held)
    (tmp_path / "it.pt").write_bytes(held.getvalue())
    code = (
        "import sys, torch\n"
        f"held = torch.load({str(tmp_path / 'it.pt')!r}, weights_only=False)\n"
        "sys.exit(not torch.equal(held['model'](held['x']), held['wanted']))"
    )
    root = Path(__file__).parent.parent

    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_what_a_lambda_under_checkpoint_calls_is_listed() -> None:
    from torch.utils.checkpoint import checkpoint

    class Lambda(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda y: F.relu(self.fc(y)), x, use_reentrant=False)  # type: ignore[no-any-return]

    from deadcheck.remedies.slope import plan_slopes
    from tests.test_patch_zoo import scanned

    model = Lambda()
    plan = plan_slopes(model, *scanned(model, inputs()), Choice(LEAKY, layers=("*",)))

    assert plan.plan.sites == ()
    assert "torch.utils.checkpoint runs it again in backward" in plan.skipped[0].reason


class Clamped(torch.autograd.Function):
    """A ReLU with a gradient of its own."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad * (ctx.saved_tensors[0] > 0)


class OwnGradient(nn.Module):
    """One ReLU in an autograd function, one under a checkpoint outside of any module, and one that can be changed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, F.relu)

    def run(self, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        x = act(self.a(x))
        return checkpoint(lambda y: F.relu(self.c(y)), Clamped.apply(self.b(x)), use_reentrant=False)  # type: ignore


@pytest.mark.parametrize("chosen", [{}, {"layers": ("*",)}])
def test_what_keeps_its_own_gradient_is_left_and_listed(chosen: dict[str, Any]) -> None:
    from deadcheck.remedies.slope import plan_slopes
    from tests.test_patch_zoo import scanned

    model, x = OwnGradient(), inputs()
    planned = plan_slopes(model, *scanned(model, x), Choice(LEAKY, **chosen))
    patched = deadcheck.apply_patch(model, planned.plan)
    got, wanted = patched(x), model.run(x, lambda z: F.leaky_relu(z, ALPHA))
    gradients = [
        torch.autograd.grad(out.square().sum(), list(m.parameters())) for out, m in ((got, patched), (wanted, model))
    ]

    assert [change.site for change in planned.plan.sites] == [":relu#1"]
    assert {item.where: item.reason.partition(";")[0] for item in planned.skipped} == {
        ":clamp#1": "it stands in an autograd function, whose backward is written by hand",
        ":relu#2": "torch.utils.checkpoint runs it again in backward outside of any module",
    }
    assert torch.equal(got, wanted)
    assert all(map(torch.equal, *gradients))


def test_hooks_flags_and_own_attributes_are_carried_over() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU()).train()
    model[1].eval()
    model[1].tag = "mine"
    seen: list[str] = []
    model[1].register_forward_hook(lambda *given: seen.append("hook"))
    model[1].register_forward_pre_hook(lambda *given: seen.append("pre"))
    model[1].register_full_backward_hook(lambda *given: seen.append("backward"))
    patched = deadcheck.apply_patch(model, PatchPlan(LEAKY, others=True))
    patched(inputs().requires_grad_()).sum().backward()

    assert isinstance(patched[1], nn.LeakyReLU)
    assert (patched[1].training, patched.training, patched[1].tag) == (False, True, "mine")
    assert seen == ["pre", "hook", "backward"]


def test_encoder_layers_leave_the_fused_operator_of_torch() -> None:
    torch.manual_seed(0)
    for activation in ("relu", nn.ReLU()):
        layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, activation, batch_first=True)
        model = nn.TransformerEncoder(layer, 2).eval()
        patched = deadcheck.apply_patch(model, PatchPlan(LEAKY, others=True)).eval()
        x, mask = torch.randn(3, 5, 8), torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
        for given in ({}, {"src_key_padding_mask": mask}):
            wanted = x
            for block in model.layers:
                y = block.norm1(
                    wanted + block.self_attn(wanted, wanted, wanted, given.get("src_key_padding_mask"), False)[0]
                )
                wanted = block.norm2(y + block.linear2(F.leaky_relu(block.linear1(y), ALPHA)))
            with torch.no_grad():
                got = patched(x, **given)
            kept = ~mask if given else torch.ones(3, 5, dtype=torch.bool)

            assert torch.allclose(got[kept], wanted[kept], atol=1e-6)
            assert not torch.allclose(model(x, **given)[kept], wanted[kept], atol=1e-3)


def test_the_plan_is_readable() -> None:
    text = dump_plan(planned(build(Helper), inputs(), Choice(LEAKY, layers=(":relu#2", ":relu#3"))))

    assert "- at: ['helper+1: return F.relu(x)', 'forward+2.1: return helper(self.b(x)) + F.relu(self.c(x))']" in text
    assert "- at: ['forward+2.3: return helper(self.b(x)) + F.relu(self.c(x))']" in text

"""One patch of a saved model: reads it, changes a copy, measures what that did, and writes it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from deadcheck import passes, pipeline
from deadcheck.config import Config
from deadcheck.errors import PatchError, UsageError
from deadcheck.formats import LoadedModel, LoadOptions, open_model
from deadcheck.formats.from_torchscript import load_program
from deadcheck.patch_file import FILE_NAME, dump_plan, read_plan
from deadcheck.patch_output import check_kind, write_model
from deadcheck.patch_plan import PatchPlan, SiteChange
from deadcheck.patch_result import PatchResult, SideBySide, Written
from deadcheck.patching import Patched, compare, examine, make
from deadcheck.relu_calls import mentions_relu
from deadcheck.remedies.base import Choice
from deadcheck.rewriting.base import Subject
from deadcheck.rewriting.in_modules import ModuleTree, copied, rewrite
from deadcheck.rewriting.in_script import Scripted, patched_script
from deadcheck.sample import sample_beside
from deadcheck.study import Study
from deadcheck.writing import check_target, write_text


@dataclass(frozen=True)
class PatchOptions:
    """What the user asked for."""

    choice: Choice = field(default_factory=Choice)
    tolerance: float | None = None
    """Choose the largest slope that moves the outputs by this much at most."""

    report_sha256: str | None = None
    """Digest of the model that the dead units were reported of."""

    from_file: Path | None = None
    """Take the plan from a patch file."""

    output: Path | None = None
    patch_file: Path | None = None
    """None for the default beside the output; none is written where the plan came from one."""

    force: bool = False
    dry_run: bool = False


Model = TypeVar("Model")
"""A module, a TorchScript program or an ``ExportedProgram``."""


def apply_patch(model: Model, patch: str | Path | PatchPlan, *, inplace: bool = False) -> Model:
    """Return a model in which a patch was applied: ReLUs let ``alpha * x`` through for negative x, with its gradient.

    ``patch`` is a patch file or a plan. The model given is left as it is, and a copy is changed, unless ``inplace``;
    names of parameters and buffers stay the same (``prelu`` alone adds its learnt slopes). Apply it before the
    optimiser is made, and before ``DataParallel`` and the like. TorchScript and exported programs are taken with
    patches that were made for them. PatchError where the model is not one that the patch was made for, or a site in it
    cannot be reached.
    """
    plan = patch if isinstance(patch, PatchPlan) else read_plan(Path(patch))
    if isinstance(model, torch.jit.ScriptModule) or not isinstance(model, nn.Module):
        return cast(Model, _patched_program(model, plan, inplace=inplace))
    done = rewrite(model if inplace else copied(model), plan)
    named = {change.site for change in plan.sites}
    for item in done.skipped:
        if item.where in named:
            raise PatchError(f"{item.where}: the {item.what} cannot be changed: {item.reason}")
        warnings.warn(f"{item.where}: {item.reason}", stacklevel=2)
    for change in plan.sites:
        _look_for_calls(change, model.get_submodule(change.module))
    return cast(Model, done.model)


def _look_for_calls(change: SiteChange, module: nn.Module) -> None:
    """Warn where the code of a module calls no ReLU any more.

    Where all its calls are meant, none is looked for by its place, and nothing else would tell.
    """
    is_own = not type(module).__module__.startswith("torch.") and not isinstance(module, nn.ReLU)
    has_hooks = bool(module._forward_hooks or module._forward_pre_hooks)  # which may call one
    if change.calls and is_own and not has_hooks and not mentions_relu(module):
        warnings.warn(
            f"{change.site}: the code of {change.module or type(module).__name__} seems to call no ReLU, so the patch "
            "may do nothing there; was it changed since the patch was made?",
            stacklevel=3,
        )


def _patched_program(model: Any, plan: PatchPlan, *, inplace: bool) -> Any:
    if inplace:
        raise PatchError("a program is patched in a copy; leave out inplace=True and take what is returned")
    if isinstance(model, torch.jit.ScriptModule):
        return patched_script(model, plan)
    from torch.export import ExportedProgram

    from deadcheck.rewriting.in_export import patched_export

    if not isinstance(model, ExportedProgram):
        raise PatchError(f"a {type(model).__name__} is no model; give a module, or a TorchScript or exported program")
    return patched_export(model, plan)


def patch_file_for(options: PatchOptions) -> Path | None:
    """Return where the patch file goes: as asked, else beside the output, else into the working directory."""
    if options.patch_file is not None or options.from_file is not None:
        return options.patch_file
    return Path(FILE_NAME) if options.output is None else options.output.with_suffix(".patch.yaml")


def run(
    path: Path, load: LoadOptions, config: Config, options: PatchOptions, progress: passes.Progress | None = None
) -> PatchResult:
    """Patch a saved model as the command line does.

    UsageError before any work where an output cannot or must not be written; NothingMeasured where there is nothing
    to change; PatchError, and nothing written, where a site does not do what it should.
    """
    text_target = patch_file_for(options)
    for target in (options.output, text_target):
        if target is not None and not options.dry_run:
            check_target(target, force=options.force, source=path)
    plan = None if options.from_file is None else read_plan(options.from_file)
    loaded = open_model(path, load)
    loaded.module.to(torch.device(config.scan.device))
    if options.report_sha256 is not None and loaded.identity.sha256 not in (None, options.report_sha256):
        raise UsageError(f"{path}: the report of dead units is of another file; scan this one again")
    subject = subject_of(path, loaded, load, config.scan.call)
    study = Study(subject, config, progress=progress, has_data=_has_data(loaded, config))
    if options.output is not None:
        check_kind(options.output, subject)
    choice = replace(options.choice, call=config.scan.call)
    patched = make(study, choice, tolerance=options.tolerance, plan=plan)
    result = examine(study, patched)
    wrong = [site for site in result.sites if site.fault is not None]
    if wrong:
        raise PatchError(f"{wrong[0].change.site}: {wrong[0].fault}; nothing was written; please report this")
    if options.dry_run:
        return replace(result, is_dry=True)
    written = []
    if text_target is not None:
        plan = replace(patched.plan, model=_described(loaded))
        write_text(text_target, dump_plan(plan))
        written.append(Written(str(text_target), "the patch file, for deadcheck.apply_patch"))
    if options.output is not None:
        try:
            written.append(_write(study, patched, options.output, choice))
        except PatchError as error:
            raise PatchError(f"{error}{f' ({text_target} was written)' if text_target is not None else ''}") from error
    return replace(result, written=tuple(written))


def subject_of(path: Path, loaded: LoadedModel, options: LoadOptions, call: str) -> Subject:
    """Return what is patched in a loaded model."""
    if loaded.identity.format == "torchscript":
        return Scripted(loaded, lambda: load_program(path, options), call)
    if loaded.identity.format == "pt2":
        from deadcheck.rewriting.in_export import from_file  # on demand: torch.export takes a while to import

        return from_file(loaded, path, options)
    return ModuleTree(loaded, pipeline.runnable(loaded.module))


def compare_file(
    path: Path,
    load: LoadOptions,
    config: Config,
    choice: Choice,
    tolerance: float | None = None,
    progress: passes.Progress | None = None,
) -> SideBySide:
    """Set ReLU beside what would stand in for it, measured on a saved model; nothing is written."""
    loaded = open_model(path, load)
    loaded.module.to(torch.device(config.scan.device))
    subject = subject_of(path, loaded, load, config.scan.call)
    study = Study(subject, config, progress=progress, has_data=_has_data(loaded, config))
    return compare(study, make(study, replace(choice, call=config.scan.call), tolerance=tolerance))


def _has_data(loaded: LoadedModel, config: Config) -> bool:
    path = loaded.identity.path
    beside = path is not None and sample_beside(Path(path)) is not None
    return config.scan.data is not None or beside or loaded.example is not None


def _write(study: Study, patched: Patched, output: Path, choice: Choice) -> Written:
    """Write the model, in its own type; a tree of modules that is to become a program is exported first."""
    plain = replace(study.config.scan, dtype="model", autocast=None)
    study = Study(study.subject, replace(study.config, scan=plain), has_data=study.has_data)
    answer = study.answer if study.has_data else None
    if output.suffix != ".pt2" or not isinstance(study.subject, ModuleTree):
        return write_model(output, study.subject, patched.made, answer)
    if not study.has_data:
        raise UsageError(f"{output}: to export a model it must be run on data; add --data FILE")
    from deadcheck.rewriting.in_export import exported_from  # on demand: torch.export takes a while to import

    batch = passes.placed(study.model, study.config.scan, next(study.batches()))
    with study.running(study.model):
        subject = exported_from(study.loaded, study.model, batch)
    program = Study(subject, study.config)
    made = make(program, replace(choice, replacement=patched.plan.replacement))
    # Exporting may take operators apart, which rounds differently: that much is allowed, and no more.
    noise = _difference(study.answer(study.model), program.answer(program.model))
    if made.skipped or _difference(study.answer(patched.model), program.answer(made.model)) > 4 * noise:
        raise PatchError(f"{output}: the exported program cannot be patched to give what the patched model gives")
    return write_model(output, subject, made.made, program.answer)


def _difference(old: list[Tensor], new: list[Tensor]) -> float:
    pairs = [(a.double(), b.double()) for a, b in zip(old, new, strict=True) if a.is_floating_point() and a.numel()]
    return max((float((a - b).abs().nan_to_num(0.0).max()) for a, b in pairs), default=0.0)


def _described(loaded: LoadedModel) -> dict[str, str]:
    identity = loaded.identity
    told: dict[str, Any] = {
        "path": None if identity.path is None else Path(identity.path).name,
        "format": identity.format,
        "sha256": identity.sha256,
        "arch": identity.arch,
    }
    return {name: str(value) for name, value in told.items() if value is not None}

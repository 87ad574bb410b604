"""The command line: parses, calls the pipeline, prints and exits."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from deadcheck import __version__
from deadcheck.errors import DeadcheckError, ExitCode, UsageError

if TYPE_CHECKING:
    from deadcheck.config import Config
    from deadcheck.diagnosis import Diagnosis
    from deadcheck.reports import RenderOptions

app = typer.Typer(
    name="deadcheck",
    help="Find dead neurons in a saved PyTorch model, with how sure that is, and why.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_MODEL = "Reading the model"
_DATA = "Data"
_MEASURE = "Measuring"
_REPORT = "Report"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"deadcheck {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="print the version and exit", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def scan(
    model: Annotated[
        Path, typer.Argument(help="saved model: .pt, .pth, .ckpt, .bin or .safetensors", show_default=False)
    ],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            help="file (.npz .npy .pt .safetensors), module:name, file.py:name, or random; default: the "
            "sample beside the model",
            rich_help_panel=_DATA,
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="samples per forward pass [default: 64]", min=1, rich_help_panel=_DATA, show_default=False),
    ] = None,
    max_samples: Annotated[
        int | None, typer.Option(help="stop after this many samples", min=1, rich_help_panel=_DATA, show_default=False)
    ] = None,
    unpack: Annotated[
        str | None,
        typer.Option(
            help="what of a batch goes to the model: auto, first, args or kwargs [default: auto]",
            rich_help_panel=_DATA,
            show_default=False,
        ),
    ] = None,
    input_shape: Annotated[
        str | None,
        typer.Option(
            help="shape of one sample for --data random, as 3,32,32", rich_help_panel=_DATA, show_default=False
        ),
    ] = None,
    allow_nonfinite: Annotated[
        bool, typer.Option(help="measure on data that holds NaN or infinite values", rich_help_panel=_DATA)
    ] = False,
    arch: Annotated[
        str | None,
        typer.Option(
            help="code that builds the model: package.module:factory or file.py:factory",
            rich_help_panel=_MODEL,
            show_default=False,
        ),
    ] = None,
    arch_arg: Annotated[
        list[str] | None,
        typer.Option(
            help="keyword argument for the factory, as name=value; repeats", rich_help_panel=_MODEL, show_default=False
        ),
    ] = None,
    allow_class: Annotated[
        list[str] | None,
        typer.Option(
            help="class of your environment that a pickled model may use, as package.Net; repeats",
            rich_help_panel=_MODEL,
            show_default=False,
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            help="entry of a checkpoint that holds the model or its weights", rich_help_panel=_MODEL, show_default=False
        ),
    ] = None,
    trust: Annotated[
        bool,
        typer.Option("--trust", help="let this file run as a program, as TorchScript is", rich_help_panel=_MODEL),
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="where to run [default: cpu]", rich_help_panel=_MEASURE, show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="random seed [default: 0]", rich_help_panel=_MEASURE, show_default=False)
    ] = None,
    units: Annotated[
        list[str] | None,
        typer.Option(
            help="axis that holds the units, as 'encoder.*=-1'; repeats", rich_help_panel=_MEASURE, show_default=False
        ),
    ] = None,
    gates: Annotated[
        bool, typer.Option("--gates", help="measure the gates inside LSTM and GRU too", rich_help_panel=_MEASURE)
    ] = False,
    call: Annotated[
        str | None, typer.Option(help="method to run instead of forward", rich_help_panel=_MEASURE, show_default=False)
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="configuration file [default: deadcheck.yaml here or above]",
            rich_help_panel=_MEASURE,
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        str, typer.Option("--format", "-f", help="what stdout shows: table or json", rich_help_panel=_REPORT)
    ] = "table",
    output: Annotated[
        list[str] | None,
        typer.Option(
            "--output",
            "-o",
            help="write a report as FORMAT=PATH, - is stdout; repeats",
            rich_help_panel=_REPORT,
            show_default=False,
        ),
    ] = None,
    per_unit: Annotated[
        bool, typer.Option("--per-unit", help="every unit's numbers in the JSON report", rich_help_panel=_REPORT)
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(
            help="layers shown in the table, worst first [default: all]",
            min=1,
            rich_help_panel=_REPORT,
            show_default=False,
        ),
    ] = None,
    color: Annotated[str, typer.Option(help="auto, always or never", rich_help_panel=_REPORT)] = "auto",
    ascii: Annotated[bool, typer.Option("--ascii", help="plain ASCII in the table", rich_help_panel=_REPORT)] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress", rich_help_panel=_REPORT)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="let tracebacks through", rich_help_panel=_REPORT)] = False,
) -> None:
    """Measure how often every unit is zero, and say which are dead.

    A model of torch.nn classes is read safely with no flag; weights need --arch; a file runs only with --trust.
    """
    outputs = _outputs(format, output or [])
    look = _render_options(color, ascii=ascii, per_unit=per_unit, limit=limit)
    flags = {
        "scan.data": data,
        "scan.batch_size": batch_size,
        "scan.max_samples": max_samples,
        "scan.unpack": unpack,
        "scan.input_shape": _shape(input_shape),
        "scan.allow_nonfinite": allow_nonfinite or None,
        "scan.device": device,
        "scan.seed": seed,
        "scan.units": _unit_axes(units or []) or None,
        "scan.gates": gates or None,
        "scan.call": call,
    }
    diagnosis = _scan(
        model, _load_options(arch, arch_arg, allow_class, key, trust=trust), _config(config, flags), quiet=quiet
    )
    for name, path in outputs:
        _write(path, _rendered(name, diagnosis, look), name)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="model file, or folder of one", show_default=False)],
    format: Annotated[str, typer.Option("--format", "-f", help="what stdout shows: text or json")] = "text",
    debug: Annotated[bool, typer.Option("--debug", help="let tracebacks through")] = False,
) -> None:
    """Say what a model file is and holds, what is wrong with it, and what to type next; runs nothing of it."""
    from deadcheck.inspection import inspect as look
    from deadcheck.reports import as_inspection

    if format not in ("text", "json"):
        raise UsageError(f"unknown report format {format!r}; there are text, json")
    found = look(file)
    text = as_inspection.render_json(found) if format == "json" else _plain(as_inspection.render_text(found))
    sys.stdout.write(text)


def main() -> NoReturn:
    """Run the command line and exit with a code of ``ExitCode``."""
    debug = "--debug" in sys.argv
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else ExitCode.PASSED)
    except DeadcheckError as error:
        if debug:
            raise
        _fail(error.exit_code, str(error))
    except KeyboardInterrupt:
        _fail(ExitCode.INTERRUPTED, "interrupted; nothing was written")
    except BrokenPipeError:
        # The reader of our output went away, as in `deadcheck … | head`; Python would print a traceback at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ExitCode.PASSED)
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # a usage error from the parser
            _fail(ExitCode.ERROR, f"{error.format_message()}; see 'deadcheck --help'")
        if isinstance(error, typer.Abort):
            _fail(ExitCode.INTERRUPTED, "interrupted; nothing was written")
        if debug:
            raise
        # Whatever else was raised is a fault of ours, and must not end as exit code 1, which means a failed rule.
        reason = str(error).splitlines()[0] if str(error) else ""
        _fail(
            ExitCode.ERROR, f"internal error ({type(error).__name__}: {reason}); run again with --debug and report it"
        )


def _fail(code: ExitCode, message: str) -> NoReturn:
    """Say what went wrong on stderr, and on stdout too where a program reads it, and exit."""
    print(f"deadcheck: error: {_plain(message)}", file=sys.stderr)
    if _wants_json(sys.argv[1:]):
        from deadcheck.reports import as_json

        print(as_json.render_failure(code, message, _named_model(sys.argv[1:])), end="")
    sys.exit(code)


def _plain(text: str) -> str:
    """Return text that cannot steer a terminal: control and format characters are shown, not sent."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def _wants_json(argv: list[str]) -> bool:
    joined = " ".join(argv)
    return any(form in joined for form in ("-f json", "-fjson", "--format json", "--format=json", "json=-"))


def _named_model(argv: list[str]) -> str | None:
    return next((word for word in argv[1:] if not word.startswith("-")), None)


def _scan(path: Path, load: Any, config: Config, *, quiet: bool) -> Diagnosis:
    from deadcheck import pipeline

    with _progress(path.name, quiet=quiet) as advance:
        return pipeline.scan_file(path, load, config, advance)


@contextmanager
def _progress(name: str, *, quiet: bool) -> Iterator[Callable[[int, int | None], None] | None]:
    """Show samples done and time left on stderr, on a terminal only."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(_plain(name), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _load_options(
    arch: str | None, arch_args: list[str] | None, allow: list[str] | None, key: str | None, *, trust: bool
) -> Any:
    from deadcheck.formats import LoadOptions

    return LoadOptions(
        arch=arch, arch_args=_keywords(arch_args or []), allow_classes=tuple(allow or ()), key=key, trust=trust
    )


def _config(path: Path | None, flags: Mapping[str, object]) -> Config:
    from deadcheck.config import load_config

    return load_config(path, {name: value for name, value in flags.items() if value is not None})


def _keywords(pairs: list[str]) -> dict[str, object]:
    import yaml

    out: dict[str, object] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"--arch-arg {pair!r} is not name=value; write --arch-arg width=128")
        try:
            out[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"--arch-arg {pair!r}: the value cannot be read; quote it as YAML would") from error
    return out


def _unit_axes(pairs: list[str]) -> tuple[tuple[str, int], ...]:
    out = []
    for pair in pairs:
        pattern, equals, axis = pair.rpartition("=")
        if not equals or not axis.lstrip("-").isdigit():
            raise UsageError(f"--units {pair!r} is not PATTERN=AXIS; write --units 'encoder.*=-1'")
        out.append((pattern, int(axis)))
    return tuple(out)


def _shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.replace("x", ",").split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--input-shape {text!r} is not a shape; write --input-shape 3,32,32 (without the batch axis)")
    return tuple(int(part) for part in parts)


def _outputs(stdout_format: str, pairs: list[str]) -> list[tuple[str, str]]:
    """Return (format, path) of every report, checked before any work is done."""
    from deadcheck.reports import REPORTS

    outputs = []
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or not path:
            raise UsageError(f"-o {pair!r} is not FORMAT=PATH; write -o json=report.json")
        if path != "-" and not Path(path).resolve().parent.is_dir():
            raise UsageError(f"-o {pair!r}: the folder {str(Path(path).parent)!r} does not exist; create it first")
        if Path(path).is_dir():
            raise UsageError(f"-o {pair!r}: {path!r} is a folder; name a file in it")
        outputs.append((name, path))
    if not any(path == "-" for _, path in outputs):
        outputs.insert(0, (stdout_format, "-"))
    unknown = sorted({name for name, _ in outputs} - set(REPORTS))
    if unknown:
        raise UsageError(f"unknown report format {unknown[0]!r}; there are {', '.join(REPORTS)}")
    return outputs


def _render_options(color: str, *, ascii: bool, per_unit: bool, limit: int | None) -> RenderOptions:
    from deadcheck.reports import RenderOptions

    if color not in ("auto", "always", "never"):
        raise UsageError(f"--color {color!r} is not auto, always or never")
    terminal = sys.stdout.isatty()
    automatic = terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    width = shutil.get_terminal_size((120, 24)).columns if terminal else int(os.environ.get("COLUMNS") or 120)
    unicode = "utf" in (sys.stdout.encoding or "").lower() and os.environ.get("TERM") != "dumb"
    return RenderOptions(
        width=max(width, 60),
        color=color == "always" or (color == "auto" and automatic),
        unicode=unicode and not ascii,
        per_unit=per_unit,
        limit=limit,
    )


def _rendered(name: str, diagnosis: Diagnosis, look: RenderOptions) -> str:
    from dataclasses import replace

    from deadcheck.reports import REPORTS

    return REPORTS[name](diagnosis, look if name == "table" else replace(look, color=False))


def _write(path: str, text: str, name: str) -> None:
    """Print a report, or write it to a temporary file that then takes the place of the old one."""
    if path == "-":
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        return
    target = Path(path)
    try:
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
        handle, temporary = tempfile.mkstemp(dir=target.resolve().parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text if text.endswith("\n") else text + "\n")
            os.chmod(temporary, mode)
            os.replace(temporary, target.resolve())
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise UsageError(
            f"cannot write the {name} report to {path!r}: {error.strerror}; choose another place"
        ) from error


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current

"""The command line: registers the commands, and turns whatever happens into an exit code."""

import errno
import os
import re
import sys
import warnings
from typing import Annotated, NoReturn

import typer

from deadcheck import __version__
from deadcheck.commands import (
    do_baseline,
    do_compare,
    do_config,
    do_diff,
    do_gate,
    do_init,
    do_inspect,
    do_merge,
    do_patch,
    do_plot,
    do_report,
    do_rule,
    do_scan,
)
from deadcheck.commands.printing import leave, open_streams, print_error, print_text, stdout_failed
from deadcheck.errors import DeadcheckError, ExitCode, UsageError, internal_error
from deadcheck.heap import collect_rarely

app = typer.Typer(
    name="deadcheck",
    help="Find dead neurons in a saved PyTorch model, with how sure that is, and why.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(do_scan.scan)
app.command()(do_gate.gate)
app.command()(do_patch.patch)
app.command()(do_compare.compare)
app.add_typer(do_plot.app, name="plot")
app.command()(do_inspect.inspect)
app.command()(do_diff.diff)
app.command()(do_report.report)
app.command()(do_merge.merge)
app.add_typer(do_baseline.app, name="baseline")
app.command()(do_init.init)
app.add_typer(do_config.app, name="config")
app.command()(do_config.schema)
app.command()(do_rule.rule)


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


def main() -> NoReturn:
    """Run the command line and exit with a code of ``ExitCode``."""
    debug = "--debug" in sys.argv
    collect_rarely()
    if not (debug or sys.warnoptions):
        # What torch and numpy think of their own functions is nothing to the user of a file.
        warnings.filterwarnings("ignore", module=r"(torch|numpy|deadcheck)(\.|$)")
    try:
        open_streams()
        _check_surroundings(sys.argv[1:])
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except SystemExit as error:
        if isinstance(error.__context__, OSError) and error.__context__.errno == errno.EPIPE:
            _leave_reader()
        # Code of the user's that a scan runs may end the process; whatever code it chose is no answer of ours.
        _fail(ExitCode.ERROR, "the code of the model or the data called sys.exit(); nothing was judged")
    except DeadcheckError as error:
        if debug:
            raise
        _fail(error.exit_code, str(error))
    except BrokenPipeError:
        _leave_reader()
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # a usage error from the parser
            if not (message := error.format_message().rstrip(".")):  # no command was given, and the help is printed
                sys.exit(ExitCode.ERROR)
            _fail(ExitCode.ERROR, f"{message}; see 'deadcheck --help'")
        # Our own files are named in their errors; this is what the parser prints, as a help text.
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
            leave(sys.stdout)
            _fail(ExitCode.ERROR, stdout_failed(error))
        if debug:
            raise
        # Whatever else was raised is a fault of ours, and must not end as exit code 1, which means a failed rule.
        _fail(ExitCode.ERROR, internal_error(error))
    if code == ExitCode.INTERRUPTED:  # the parser catches Ctrl-C itself
        _fail(ExitCode.INTERRUPTED, f"interrupted; {_left_behind(sys.argv[1:])}")
    sys.exit(code if isinstance(code, int) else ExitCode.PASSED)


def _check_surroundings(argv: list[str]) -> None:
    """Refuse what no command could work with."""
    if "" in argv:
        raise UsageError(f"argument {argv.index('') + 1} is empty; is it a variable that is not set?")
    try:
        os.getcwd()
    except OSError as error:
        raise UsageError(f"the working directory cannot be found ({error.strerror}); change to another") from error


def _left_behind(argv: list[str]) -> str:
    """Say what an interrupted command leaves: nothing but the checkpoint that it was told to keep."""
    named = re.search(r"(?:^|\0)--checkpoint[=\0]([^\0]+)", "\0".join(argv))
    if named is not None and os.path.isfile(named[1]):
        return f"the same command goes on from {named[1]}"
    return "nothing was written"


def _leave_reader() -> NoReturn:
    """Exit when the reader of what we printed went away, as in ``deadcheck --help | head``.

    A report is printed by the commands, which keep their exit code all the same.
    """
    leave(sys.stdout)
    sys.exit(ExitCode.PASSED)


def _fail(code: ExitCode, message: str) -> NoReturn:
    """Say what went wrong on stderr, and on stdout too where a program reads it, and exit."""
    print_error(message)
    if _wants_json(sys.argv[1:]):
        from deadcheck.reports import as_json

        print_text(as_json.render_failure(code, message, _named_model(sys.argv[1:])))
    sys.exit(code)


def _wants_json(argv: list[str]) -> bool:
    return re.search(r"(^|\s)((-\w*f ?|--format[ =])json|\S*json=-)(\s|$)", " ".join(argv)) is not None


def _named_model(argv: list[str]) -> str | None:
    return argv[1] if len(argv) > 1 and not argv[1].startswith("-") else None

"""Options that several commands take."""

from pathlib import Path
from typing import Annotated, Any

import typer

MODEL, DATA, MEASURE, REPORT = "Reading the model", "Data", "Measuring", "Report"

Data = Annotated[
    str | None,
    typer.Option(
        "--data", "-d", rich_help_panel=DATA, show_default=False,
        help="file (.npz .npy .pt .safetensors), module:name, file.py:name, or random; default: the sample beside the "
        "model",
    ),
]  # fmt: skip
BatchSize = Annotated[
    int | None,
    typer.Option(help="samples per forward pass \\[default: 64]", min=1, rich_help_panel=DATA, show_default=False),
]
MaxSamples = Annotated[
    int | None, typer.Option(help="stop after this many samples", min=1, rich_help_panel=DATA, show_default=False)
]
Workers = Annotated[
    int | None,
    typer.Option(
        help="processes that read a data set or arrays ahead \\[default: 0]", min=0, rich_help_panel=DATA,
        show_default=False,
    ),
]  # fmt: skip
Unpack = Annotated[
    str | None,
    typer.Option(
        help="what of a batch goes to the model: auto, first, args or kwargs \\[default: auto]", rich_help_panel=DATA,
        show_default=False,
    ),
]  # fmt: skip
InputShape = Annotated[
    str | None,
    typer.Option(help="shape of one sample for --data random, as 3,32,32", rich_help_panel=DATA, show_default=False),
]
AllowNonfinite = Annotated[
    bool, typer.Option(help="measure on data that holds NaN or infinite values", rich_help_panel=DATA)
]
Arch = Annotated[
    str | None,
    typer.Option(
        help="code that builds the model: package.module:factory or file.py:factory", rich_help_panel=MODEL,
        show_default=False,
    ),
]  # fmt: skip
ArchArg = Annotated[
    list[str] | None,
    typer.Option(
        help="keyword argument for the factory, as name=value; repeats", rich_help_panel=MODEL, show_default=False
    ),
]
AllowClass = Annotated[
    list[str] | None,
    typer.Option(
        help="class of your environment that a pickled model may use, as package.Net; repeats", rich_help_panel=MODEL,
        show_default=False,
    ),
]  # fmt: skip
Key = Annotated[
    str | None,
    typer.Option(
        help="entry of a checkpoint that holds the model or its weights", rich_help_panel=MODEL, show_default=False
    ),
]
Trust = Annotated[
    bool, typer.Option("--trust", help="let this file run as a program, as TorchScript is", rich_help_panel=MODEL)
]
Device = Annotated[
    str | None,
    typer.Option(
        help="where to run: cpu, cuda, mps or auto \\[default: cpu]", rich_help_panel=MEASURE, show_default=False
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="spread a large model over GPUs, memory and disk with accelerate: auto (evenly) or sequential",
        rich_help_panel=MEASURE, show_default=False,
    ),
]  # fmt: skip
MaxMemory = Annotated[
    list[str] | None,
    typer.Option(
        help="the most that weights may take on a device, as 0=20GiB or cpu=60GiB; repeats", rich_help_panel=MEASURE,
        show_default=False,
    ),
]  # fmt: skip
Dtype = Annotated[
    str | None,
    typer.Option(
        help="cast the weights to float32, float64, bfloat16 or float16 for the scan \\[default: model, as they are]",
        rich_help_panel=MEASURE, show_default=False,
    ),
]  # fmt: skip
Autocast = Annotated[
    str | None,
    typer.Option(
        help="run under torch.autocast: bfloat16 or float16", rich_help_panel=MEASURE, show_default=False
    ),
]  # fmt: skip
Threads = Annotated[
    int | None,
    typer.Option(help="threads to use \\[default: as it would]", min=1, rich_help_panel=MEASURE,
                 show_default=False),
]  # fmt: skip
ShardOption = Annotated[
    str | None,
    typer.Option(
        "--shard", help="count batches I, I+N, … alone, as I/N; needs --checkpoint", rich_help_panel=MEASURE,
        show_default=False,
    ),
]  # fmt: skip
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        help="keep what was counted in this file: an interrupted scan goes on from it, 'merge' joins those of shards",
        rich_help_panel=MEASURE, show_default=False,
    ),
]  # fmt: skip
Seed = Annotated[
    int | None, typer.Option(help="random seed \\[default: 0]", rich_help_panel=MEASURE, show_default=False)
]
Units = Annotated[
    list[str] | None,
    typer.Option(
        help="axis that holds the units, as 'encoder.*=-1'; repeats", rich_help_panel=MEASURE, show_default=False
    ),
]
Gates = Annotated[
    bool, typer.Option("--gates", help="measure the gates inside LSTM and GRU too", rich_help_panel=MEASURE)
]
Stats = Annotated[
    str | None,
    typer.Option(
        help="how much to measure: full, counts (no means) or verdict (a unit that fired is not asked again) "
        "\\[default: full]",
        rich_help_panel=MEASURE, show_default=False,
    ),
]  # fmt: skip
Call = Annotated[
    str | None, typer.Option(help="method to run instead of forward", rich_help_panel=MEASURE, show_default=False)
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        help="configuration file \\[default: deadcheck.yaml here or above]", rich_help_panel=MEASURE, show_default=False
    ),
]


def _shown_as(usual: str) -> Any:
    told = f"what stdout shows: table, text, concise, json, markdown, sarif, junit, github, gitlab \\[default: {usual}]"
    return typer.Option("--format", "-f", help=told, rich_help_panel=REPORT, show_default=False)


ShownAsTable = Annotated[str | None, _shown_as("table")]
ShownAsText = Annotated[str | None, _shown_as("text")]
Output = Annotated[
    list[str] | None,
    typer.Option(
        "--output", "-o", help="write a report as FORMAT=PATH, - is stdout; repeats", rich_help_panel=REPORT,
        show_default=False,
    ),
]  # fmt: skip
PerUnit = Annotated[bool, typer.Option("--per-unit", help="every unit's numbers in the JSON report",
                                       rich_help_panel=REPORT)]  # fmt: skip
Limit = Annotated[
    int | None,
    typer.Option(
        help="layers or findings shown, worst first \\[default: all, or 30 findings]", min=1, rich_help_panel=REPORT,
        show_default=False,
    ),
]  # fmt: skip
Color = Annotated[str, typer.Option(help="auto, always or never", rich_help_panel=REPORT)]
Ascii = Annotated[bool, typer.Option("--ascii", help="plain ASCII in the table and text", rich_help_panel=REPORT)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress", rich_help_panel=REPORT)]
Debug = Annotated[bool, typer.Option("--debug", help="let tracebacks through", rich_help_panel=REPORT)]
TextOrJson = Annotated[str, typer.Option("--format", "-f", help="text or json")]

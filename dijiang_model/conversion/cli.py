"""`dijiang convert`: the command line of the converter."""

import re
from collections.abc import Collection
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer
from rich.console import Console

from dijiang_model.conversion.bars import bars, counted, sizes
from dijiang_model.errors import ModelError
from dijiang_model.formats.dtype_names import dtype_name
from dijiang_model.formats.sizes import size_text
from dijiang_model.program import program
from dijiang_model.quantization.config import WeightKind

if TYPE_CHECKING:
    from dijiang_model.conversion.convert import Conversion

SourceArgument = Annotated[
    Path,
    typer.Argument(
        help="Folder of an HF model (safetensors or pytorch_model.bin, whole or sharded), its name on the hub "
        "where the cache has it, a GGUF file (llama, qwen2, qwen3, phi3, gemma3, olmo2), or a DiJiang checkpoint as "
        "the paper's authors release them."
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        help="How attention is replaced. hybrid: a window of exact softmax beside a linear branch of weight zero, "
        "answers sensibly without training. pure: the paper's normalised kernel alone. released: as the authors' "
        "code starts. pure and released generate no sense before they are trained. "
        "Default: hybrid; a DiJiang checkpoint keeps its attention."
    ),
]
StateBytesOption = Annotated[
    str | None,
    typer.Option(
        help="hybrid: bytes of one conversation, e.g. 8MiB. Calibration then chooses which tokens each head holds; "
        "minutes of a CPU for 135 million weights."
    ),
]
CalibrateOption = Annotated[
    list[Path] | None,
    typer.Option(help="With --state-bytes: text to calibrate on, as for `train --data`. Default: one that ships."),
]
WindowOption = Annotated[
    int | None,
    typer.Option(min=1, help="hybrid: recent tokens seen by exact softmax, nothing else held. Default: 60."),
]
SinksOption = Annotated[
    int,
    typer.Option(
        min=0,
        help="hybrid: first tokens seen by exact softmax, from any later place as if they were 2,048 positions away at "
        "most, or fewer where the teacher knows fewer.",
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        help="Stored weights: float32, bfloat16 or float16 (fp32, bf16, fp16). Default: the source's; float32 if "
        "quantized."
    ),
]
WeightsOption = Annotated[
    str | None,
    typer.Option(help="Round projections, embedding and head: int8 or int4 (see `dijiang quantize`). Default: no."),
]


def convert_command(
    source: SourceArgument,
    out: Annotated[Path, typer.Argument(help="Folder to write. It appears complete or not at all.")],
    recipe: RecipeOption = None,
    state_bytes: StateBytesOption = None,
    calibrate: CalibrateOption = None,
    window: WindowOption = None,
    sinks: SinksOption = 4,
    dtype: DtypeOption = None,
    weights: WeightsOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Of fresh random tensors (recipe released).")] = 0,
    max_shard_size: Annotated[str, typer.Option(help="Most bytes in a file of weights, e.g. 500M or 2G.")] = "2G",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it is a model saved by this program.")
    ] = False,
) -> None:
    """Make a DiJiang model of a pretrained transformer."""
    # Imported late: `--help` and mistakes in options need nothing of torch.
    from dijiang_model.conversion.convert import DTYPES, convert
    from dijiang_model.conversion.recipes import Recipe

    console = Console(stderr=True)
    dtype = None if dtype is None else str(dtype_name(dtype))
    _refuse_unknown(recipe, tuple(Recipe), "--recipe")
    _refuse_unknown(dtype, DTYPES, "--dtype")
    _refuse_unknown(weights, get_args(WeightKind), "--weights")
    max_shard_bytes = parse_size(max_shard_size)
    num_bytes = None if state_bytes is None else parse_size(state_bytes, "--state-bytes")
    if num_bytes is not None and window is not None:
        raise typer.BadParameter("with --state-bytes calibration chooses the window", param_hint="--window")
    if num_bytes is None and calibrate:
        raise typer.BadParameter("calibration needs a budget: --state-bytes 8MiB", param_hint="--calibrate")
    try:
        with bars(console) as progress:
            made = convert(
                source,
                out,
                recipe=None if recipe is None else Recipe(recipe),
                window=60 if window is None else window,
                sinks=sinks,
                state_bytes=num_bytes,
                calibration_text=calibrate or (),
                dtype=dtype,
                weights=cast("WeightKind | None", weights),
                seed=seed,
                max_shard_bytes=max_shard_bytes,
                overwrite=overwrite,
                on_layer=counted(progress, "calibrating", lambda done, total: f"{done}/{total} layers"),
                on_progress=counted(progress, "converting", sizes),
            )
    except ModelError as error:
        console.print(f"[red]error:[/red] {_escaped(str(error))}", highlight=False)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        console.print(f"Stopped; nothing was written to {_escaped(str(out))}", highlight=False)
        raise typer.Exit(130) from error
    _summarise(made, console)


def _refuse_unknown(value: str | None, known: Collection[str], hint: str) -> None:
    if value is not None and value not in known:
        raise typer.BadParameter(f"{value!r} is none of {', '.join(known)}", param_hint=hint)


def parse_size(text: str, option: str = "--max-shard-size") -> int:
    """Bytes from a number with an optional unit: K, M, G and KiB, MiB, GiB of 1,024, KB, MB, GB of 1,000.

    Args:
        option: whose text it is, for the message.

    Raises:
        typer.BadParameter: anything else, or less than 1 byte.
    """
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)\s*([KMG]?)(i?B)?", text.strip(), re.IGNORECASE)
    size = 0
    if match:
        base = 1000 if match[2] and (match[3] or "").upper() == "B" else 1024
        size = int(Decimal(match[1]) * base ** " KMG".index(match[2].upper() or " "))
    if size < 1:
        raise typer.BadParameter(f"{text!r} is not a size such as 500M or 2G", param_hint=option)
    return size


def _summarise(made: "Conversion", console: Console) -> None:
    for warning in made.warnings:
        console.print(f"[yellow]warning:[/yellow] {_escaped(warning)}", highlight=False)
    size = f"{size_text(made.state_bytes)} of state per conversation"
    console.print(f"{made.title}: {size}, {made.memory}", highlight=False)
    if made.ends:
        console.print(f"An answer ends at {_escaped(', '.join(made.ends))}", highlight=False)
    console.print(f"Serve it with `{program()} serve {_escaped(str(made.out))}`", highlight=False)


def _escaped(text: str) -> str:
    """Square brackets are text here, not rich's markup."""
    return text.replace("[", "\\[")

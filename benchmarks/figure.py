"""One figure from kept results of `dijiang bench decode`: time by context, throughput by batch, memory by context.

python -m benchmarks.figure RESULT.json ... --out docs/decoding.png
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

FASTEST_HF, FASTEST_HF_BF16 = "HF transformers fp32", "HF transformers bf16"
NAMES = {
    "ours fp32": "DiJiang fp32",
    "ours int8": "DiJiang int8",
    "HF": FASTEST_HF,
    "HF bf16": FASTEST_HF_BF16,
    "llama.cpp F32": "llama.cpp F32",
    "llama.cpp Q8_0": "llama.cpp Q8_0",
}
COLOURS = {
    "DiJiang fp32": "#0f766e",
    "DiJiang int8": "#14b8a6",
    FASTEST_HF: "#c2410c",
    FASTEST_HF_BF16: "#fb923c",
    "llama.cpp F32": "#475569",
    "llama.cpp Q8_0": "#94a3b8",
}
INK = "#334155"
BATCH_CONTEXT = 2048
Curves = dict[str, dict[int, float]]
"""By name: value by context, or by conversations."""


def curves_of(lines: Sequence[Mapping[str, Any]], *, by: str, value: str, fixed: Mapping[str, int]) -> Curves:
    """Of the lines that have `fixed`; at each place the fastest of HF's ways, or of several runs."""
    found: dict[str, dict[int, tuple[float, float]]] = defaultdict(dict)
    for line in lines:
        name = line["name"]
        key = "HF bf16" if name.startswith("HF bf16") else "HF" if name.startswith("HF") else name
        if key not in NAMES or any(line[name] != wanted for name, wanted in fixed.items()):
            continue
        at = found[NAMES[key]]
        point = (line["median_ms"], line[value])
        at[line[by]] = min(at.get(line[by], point), point)
    return {
        name: {place: found[name][place][1] for place in sorted(found[name])}
        for name in NAMES.values()
        if name in found
    }


def draw(lines: Sequence[Mapping[str, Any]], caption: str, path: Path) -> None:
    """Three panels, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.4, 3.9), layout="constrained")
    time, rate, memory = figure.subplots(1, 3)
    alone = {"num_rows": 1}
    _panel(time, curves_of(lines, by="context", value="median_ms", fixed=alone), "one conversation", "ms per token")
    _panel(
        rate,
        curves_of(lines, by="num_rows", value="tokens_per_s", fixed={"context": BATCH_CONTEXT}),
        f"many conversations of {BATCH_CONTEXT:,} tokens",
        "tokens/s, all together",
        x_label="conversations at once",
    )
    sizes = curves_of(lines, by="context", value="conversation_mib", fixed=alone)
    kept = {
        "DiJiang, its state": sizes.get("DiJiang fp32", {}),
        "a cache in fp32 (HF)": sizes.get(FASTEST_HF, {}),
        "a cache in fp16 (llama.cpp)": sizes.get("llama.cpp F32", {}),
    }
    colours = dict(zip(kept, (COLOURS["DiJiang fp32"], COLOURS[FASTEST_HF], COLOURS["llama.cpp F32"]), strict=True))
    _panel(memory, kept, "memory of a conversation", "MiB", colours=colours)
    figure.suptitle(caption, fontsize=8.5, color=INK, x=0.01, ha="left")
    figure.savefig(path, dpi=110, format="png")


def _panel(
    axes: Any,
    curves: Mapping[str, Mapping[int, float]],
    title: str,
    unit: str,
    *,
    x_label: str = "tokens so far",
    colours: Mapping[str, str] = COLOURS,
) -> None:
    places = sorted({place for curve in curves.values() for place in curve})
    for name, curve in curves.items():
        if not curve:
            continue
        is_ours = name.startswith("DiJiang")
        style = {"color": colours[name], "linewidth": 2.4 if is_ours else 1.5, "zorder": 3 if is_ours else 2}
        axes.plot(list(curve), list(curve.values()), marker="o", markersize=4, label=name, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(places, [_short(place) for place in places], fontsize=8)
    axes.minorticks_off()
    _ticks(axes, [value for curve in curves.values() for value in curve.values()])
    axes.set_title(title, fontsize=10, color=INK, loc="left", fontweight="bold")
    axes.set_xlabel(x_label, fontsize=9, color=INK)
    axes.set_ylabel(unit, fontsize=9, color=INK)
    axes.grid(axis="y", color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(fontsize=7.5, frameon=False, loc="upper left")


def _ticks(axes: Any, values: Sequence[float]) -> None:
    """At 1, 2 and 5 of each power of ten in sight, with room for the legend above."""
    if not values:
        return
    low, high = min(values) * 0.7, max(values) * 5
    steps = [step * 10.0**power for power in range(-2, 7) for step in (1, 2, 5)]
    if high / low > 1_000:
        steps = [10.0**power for power in range(-2, 7)]
    axes.set_ylim(low, high)
    shown = [step for step in steps if low <= step <= high]
    axes.set_yticks(shown, [f"{step:,g}" for step in shown], fontsize=8)


def _short(place: int) -> str:
    return str(place) if place < 1024 else f"{place // 1024}k"


def main(
    results: Annotated[list[Path], typer.Argument(help="Kept results of `dijiang bench decode`, of one machine.")],
    out: Annotated[Path, typer.Option(help="The PNG.")] = Path("docs/decoding.png"),
) -> None:
    """Draws the figure, and prints what it shows as one line of JSON."""
    documents = [json.loads(result.read_text()) for result in results]
    machines = {(item["machine"]["processor"], item["machine"]["num_threads"], item["model"]) for item in documents}
    if len(machines) != 1:
        raise typer.BadParameter(f"the results are of {len(machines)} machines or models", param_hint="RESULTS")
    [(processor, threads, model)] = machines
    lines = [line for item in documents for line in item["lines"]]
    caption = (
        f"{model} beside the softmax model of the same weights · {processor}, {threads} threads · medians, "
        f"{max(item['date'] for item in documents)} · logarithmic scales"
    )
    draw(lines, caption, out)
    print(json.dumps({"figure": out.name, "results": [result.name for result in results]}))


if __name__ == "__main__":
    typer.run(main)

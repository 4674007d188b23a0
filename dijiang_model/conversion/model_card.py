"""The model card of a converted model: what it is, what was trained and what was not."""

import json
from dataclasses import replace

from dijiang_model.checkpoints.config_json import Origin
from dijiang_model.config import AttentionConfig, ModelConfig
from dijiang_model.conversion.calibration.calibrate import Calibration
from dijiang_model.conversion.calibration.card import memory_section
from dijiang_model.features import SIGNED_SPHERE
from dijiang_model.state import StateSpec

UNTRAINED_WARNING = (
    "An untrained swap of softmax attention for a kernel destroys a model. Measured on SmolLM2-135M-Instruct, mean "
    "negative log-likelihood per token: teacher 3.30; any 64-feature map swapped into all layers, no training, "
    "6.7 to 7.7; the hybrid's window of 60 + 4 sinks, no training, 3.60. This model does not generate sense "
    "before it is trained."
)
_LAYER_KINDS = {
    "dct2": "the orthonormal DCT-II",
    "dct4": "the orthonormal DCT-IV",
    "matrix": "the projection matrices of the checkpoint",
}


def needs_training(config: ModelConfig, origin: Origin) -> bool:
    """Whether the model is a swap without a window that nothing was trained for."""
    return origin.recipe in ("pure", "released") and origin.tokens_trained == 0


def title(config: ModelConfig) -> str:
    """What the model may be called, e.g. `DiJiang hybrid, window 60+4`."""
    places = [num for layer in config.layers if layer.anchors is not None for num in layer.anchors.places]
    if places:
        return f"DiJiang hybrid, {round(sum(places) / len(places)):,} places a head"
    windows = sorted({(layer.window, layer.sinks) for layer in config.layers})
    if windows == [(0, 0)]:
        return "DiJiang"
    return "DiJiang hybrid, window " + " or ".join(f"{window}+{sinks}" for window, sinks in windows)


def model_card(
    config: ModelConfig,
    origin: Origin,
    state: StateSpec,
    *,
    name: str,
    dtype: str,
    evaluation: str | None = None,
    calibration: Calibration | None = None,
) -> str:
    """The text of the model's README.md.

    Args:
        evaluation: what `dijiang evaluate` measured (`report.tables`); None: nothing was.
        calibration: of a model with anchors.
        state: one conversation's.
        name: the model's folder name.
        dtype: of the stored weights, e.g. `float32`.
    """
    sections = [
        _front_matter(origin),
        f"# {name}\n\n{title(config)}. Made with recipe `{origin.recipe}` from {origin.teacher}.",
        f"**{UNTRAINED_WARNING}**" if needs_training(config, origin) else "",
        _facts(config, origin, state, dtype),
        "" if calibration is None else f"## What a state holds\n\n{memory_section(config, calibration)}",
        "## What was trained\n\n" + _training(origin, config, calibration),
        "## Why it may be called DiJiang\n\n"
        + _conditions(config, origin, calibration, is_evaluated=evaluation is not None),
        "" if evaluation is None else f"## Evaluation\n\n{evaluation.strip()}",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(origin: Origin) -> str:
    lines = ["tags: [dijiang, linear-attention]"]
    if origin.licence is not None:
        lines.insert(0, f"license: {json.dumps(origin.licence)}")
    return "---\n" + "\n".join(lines) + "\n---"


def _facts(config: ModelConfig, origin: Origin, state: StateSpec, dtype: str) -> str:
    rows = [
        ("teacher", origin.teacher),
        ("teacher's licence", origin.licence if origin.licence is not None else "not stated by the source"),
        ("architecture", f"{config.family}, {config.num_layers} layers, hidden size {config.hidden_size}"),
        ("heads", f"{config.num_heads}, {config.num_kv_heads} key-value, of {config.head_size} channels"),
        ("weights", f"{dtype}{_dequantised(origin)}"),
        ("state", f"{state.bytes_per_slot:,} bytes per conversation with {dtype} weights, whatever its length"),
        ("attention", "; ".join(_attention_lines(config))),
        ("seed of fresh tensors", str(origin.seed)),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {label} | {_cell(text)} |" for label, text in rows)])


def _cell(text: str) -> str:
    """Text from a source file must not break the table or forge a line."""
    return " ".join(text.split()).replace("|", "\\|")


def _dequantised(origin: Origin) -> str:
    if origin.dequantised_from is None:
        return ""
    return f", dequantized from {origin.dequantised_from}: they carry the quantization's error"


def _attention_lines(config: ModelConfig) -> list[str]:
    lines = []
    # Places differ from layer to layer and have a table of their own.
    layers = [replace(layer, anchors=None) for layer in config.layers]
    for layer in dict.fromkeys(layers):
        count = sum(other == layer for other in layers)
        lines.append(f"{count} layers: {_attention(layer)}")
    return lines


def _attention(layer: AttentionConfig) -> str:
    bases = " and ".join(_LAYER_KINDS[basis] for basis in layer.features.bases)
    if layer.features.width == 0:
        return f"no linear part, window {layer.window}+{layer.sinks} of exact softmax"
    if layer.features.width is not None:
        bases = f"the first {layer.features.width} directions of {bases}"
    window = f", window {layer.window}+{layer.sinks} of exact softmax" if layer.window else ""
    features = layer.features
    place = "" if features.rotated else " before the rotary embedding"
    queries = f" with a query update of rank {features.far_rank}" if features.far_rank > 0 else ""
    return (
        f"{bases}, nodes {features.nodes}, {features.normalisation} features{place}{queries}, "
        f"{layer.decay} decay, {layer.read_out} read-out{window}"
    )


def _has_fitted_linear_parts(calibration: Calibration | None) -> bool:
    return calibration is not None and any(share > 0 for layer in calibration.linear for share in layer)


def _training(origin: Origin, config: ModelConfig, calibration: Calibration | None) -> str:
    if origin.tokens_trained > 0:
        return f"{origin.tokens_trained:,} tokens after the swap."
    if origin.recipe == "checkpoint":
        return (
            "The weights are those of a DiJiang checkpoint, saved in another form; its training is not recorded here."
        )
    lines = ["Nothing was trained after the swap: all projections, norms and embeddings are the teacher's."]
    if _has_fitted_linear_parts(calibration):
        lines.append(
            "How much the linear branch counts was fitted to the teacher's answers by calibration, without gradients; "
            "its features and nodes are fresh."
        )
    elif any(layer.window for layer in config.layers):
        lines.append(
            "The linear branch is disabled (its mixing weight is zero), so the model computes what attention to "
            "the tokens that it holds computes. What it does not hold is not used."
        )
    else:
        lines.append("Nodes, weights, decays (and gate and GroupNorm, where there are any) are fresh.")
    return " ".join(lines)


def _nodes(config: ModelConfig) -> str:
    sets = sorted({layer.features.nodes for layer in config.layers})
    kinds = [
        "the median radius of a normal vector, with both signs (`signed_sphere`)"
        if name == SIGNED_SPHERE
        else f"the normal inverse CDF of the recorded low-discrepancy set `{name}`"
        for name in sets
    ]
    return (
        f"The nodes start from {' and '.join(kinds)}, the weights are positive; both are stored as `linear.nodes` "
        "and `linear.log_weights`."
    )


def _conditions(config: ModelConfig, origin: Origin, calibration: Calibration | None, *, is_evaluated: bool) -> str:
    is_matrix = any("matrix" in layer.features.bases for layer in config.layers)
    is_untrained = origin.tokens_trained == 0 and any(layer.window for layer in config.layers)
    is_silent = is_untrained and not _has_fitted_linear_parts(calibration)
    computes = "Each layer computes `phi(q)^T sum phi(k) v^T` with " + (
        "the projection that the checkpoint stores as DCT times nodes; that it is one was not verified."
        if is_matrix
        else "the fixed orthonormal DCT and no learned dense matrix between the projections, or the rotary embedding "
        "where the features come after it, and the exponential."
    )
    if is_silent:
        computes += " At present its weight is zero: as it stands, this is a window model with room for DiJiang."
    nodes = "The nodes are part of the checkpoint's projection." if is_matrix else _nodes(config)
    return "\n".join(
        [
            f"1. {computes}",
            f"2. {nodes}",
            f"3. Decoding is strictly recurrent, its state constant. {title(config)}.",
            f"4. Tokens trained: {origin.tokens_trained:,}. Losses, likelihood against the teacher and against the "
            "window of equal bytes, ablations and a recall probe: "
            + ("see the evaluation below." if is_evaluated else "not measured for this conversion."),
        ]
    )

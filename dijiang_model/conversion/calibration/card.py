"""The model card's section about what a state holds."""

from statistics import mean

from dijiang_model.config import ModelConfig
from dijiang_model.conversion.calibration.calibrate import Calibration

BEST_HEADS = 10


def memory_section(config: ModelConfig, calibration: Calibration) -> str:
    """Places by layer, the heads that recall most, and how well it is foreseen what will be needed."""
    correlation = [value for layer in calibration.correlation for value in layer]
    return "\n\n".join(
        [
            f"{config.memory.capitalize()}. Which tokens are held is foreseen from the input of each layer, by a "
            "linear regression on the teacher's attention in "
            f"{calibration.num_contexts} contexts, {calibration.num_tokens:,} tokens in all. On contexts that it was "
            "not fitted to, it correlates with the logarithm of that attention by "
            f"{mean(correlation):.2f} on average, {min(correlation):.2f} to {max(correlation):.2f} by head. Places "
            "are where they save most of the teacher's answers.",
            _linear(config, calibration),
            _places(config),
            _recall(config, calibration),
        ]
    )


def _linear(config: ModelConfig, calibration: Calibration) -> str:
    saved = [share for layer in calibration.linear for share in layer if share > 0]
    with_linear = [number for number in range(config.num_layers) if config.num_features(number) > 0]
    if not saved or not with_linear:
        return "What is evicted is not used: no linear part saved more than the places that its bytes hold."
    return (
        f"{len(with_linear)} of {config.num_layers} layers have a linear part over what is evicted, of "
        f"{config.num_features(with_linear[0])} features. On contexts that it was not fitted to, it takes "
        f"{100 * mean(saved):.0f} % of the error of the heads that use it. The other layers spend its bytes on places: "
        f"there these save more."
    )


def _places(config: ModelConfig) -> str:
    rows = [
        f"| {number} | {', '.join(map(str, layer.anchors.places))} |"
        for number, layer in enumerate(config.layers)
        if layer.anchors is not None
    ]
    return "\n".join(["| layer | places of its key-value heads |", "|---|---|", *rows])


def _recall(config: ModelConfig, calibration: Calibration) -> str:
    heads = [
        (share, f"{layer}.{head}")
        for layer, own in zip(config.global_layers, calibration.recall, strict=True)
        for head, share in enumerate(own)
    ]
    everything = sum(share for share, _ in heads)
    if everything == 0:
        return "No facts were asked for in the contexts."
    best = sorted(heads, reverse=True)[:BEST_HEADS]
    share = sum(value for value, _ in best) / everything
    names = ", ".join(name for _, name in best)
    return (
        f"{len(best)} of {len(heads)} heads carry {100 * share:.0f} % of the attention from answers to facts: {names}."
    )

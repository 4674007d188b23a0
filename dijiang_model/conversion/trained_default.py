"""The trained linear part of the default model: an adapter and its report that travel with this package."""

from dataclasses import replace
from pathlib import Path

from dijiang_model.config_json import read_stored_config
from dijiang_model.conversion.adapters import apply_adapter, load_adapter
from dijiang_model.conversion.model_card import model_card
from dijiang_model.families import build_model
from dijiang_model.tensor_files import open_tensors

ADAPTERS = Path(__file__).parents[1] / "adapters"
ADAPTER = ADAPTERS / "smollm2-135m-dijiang.safetensors"
REPORT = ADAPTERS / "smollm2-135m-dijiang.md"


def apply_trained(folder: Path, out: Path, *, overwrite: bool = False) -> None:
    """Merges the adapter into the default model's hybrid conversion; the model card carries the report.

    Args:
        folder: the conversion of SmolLM2-135M-Instruct, recipe hybrid, not trained; any window.
        out: folder to write; it appears complete or not at all.
        overwrite: replace a non-empty `out`.

    Raises:
        CheckpointError: `folder` holds another model, or `out` cannot be written.
    """
    adapter = load_adapter(ADAPTER)
    stored = read_stored_config(folder)
    config = adapter.config(stored.config)
    dtype = next(iter(open_tensors(folder).infos().values())).dtype
    origin = replace(stored.origin, tokens_trained=adapter.info.tokens_trained)
    state = build_model(config, dtype=dtype).state_spec
    card = model_card(config, origin, state, name=out.absolute().name, dtype=str(dtype).removeprefix("torch."))
    report = REPORT.read_text().partition("\n")[2].strip()
    apply_adapter(folder, adapter, out, card=f"{card}\n## Evaluation\n\n{report}\n", overwrite=overwrite)

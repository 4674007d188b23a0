"""An adapter and its base as one model, with what was measured in the model card."""

from dataclasses import replace
from pathlib import Path

from dijiang_model.checkpoints.config_json import read_stored_config
from dijiang_model.checkpoints.outputs import check_replaceable, output_folder
from dijiang_model.conversion.calibration.calibrate import Calibration
from dijiang_model.conversion.model_card import model_card, title
from dijiang_model.conversion.training.adapters import apply_adapter, calibration_text, load_adapter
from dijiang_model.families import build_model
from dijiang_model.formats.tensor_files import open_tensors


def merge(
    folder: Path, adapter_file: Path, out: Path, *, evaluation: str | None = None, overwrite: bool = False
) -> str:
    """Merges an adapter into a converted model, tensor by tensor.

    Args:
        folder: the base.
        out: folder to write; it appears complete or not at all.
        evaluation: the model card's tables, as `dijiang evaluate` writes them.
        overwrite: replace a model that this program saved in `out` (`outputs.check_replaceable`).

    Returns:
        What the model may be called.

    Raises:
        ModelError: the adapter is damaged or fits another base, or `out` cannot be written.
    """
    check_replaceable(output_folder(out, inputs=[folder, adapter_file]), overwrite=overwrite)
    adapter, stored = load_adapter(adapter_file), read_stored_config(folder)
    if adapter.calibration is None:
        adapter = replace(adapter, calibration=calibration_text(folder))
    config = adapter.config(stored.config)
    dtype = next(info.dtype for name, info in open_tensors(folder).infos().items() if ".linear." not in name)
    origin = replace(stored.origin, tokens_trained=stored.origin.tokens_trained + adapter.info.tokens_trained)
    card = model_card(
        config,
        origin,
        build_model(config, dtype=dtype).state_spec,
        name=out.absolute().name,
        dtype=str(dtype).removeprefix("torch."),
        evaluation=evaluation,
        calibration=None if adapter.calibration is None else Calibration.parse(adapter.calibration),
    )
    apply_adapter(folder, adapter, out, card=card, overwrite=overwrite)
    return title(config)

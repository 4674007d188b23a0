"""Which model this is: a name that follows from what it computes, not from where it lies.

Two servers with the same model folder agree on it, so a state saved on one is accepted by the other. It covers the
configuration, what weights and states are rounded to and, of each weight file, size, header and samples of its content:
cheap at start, and different for any two checkpoints that training could have made.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from dijiang_model.checkpoints.config_json import attention_document
from dijiang_model.config import ModelConfig

_SAMPLES, _SAMPLE_BYTES = 64, 4096
_PATTERNS = ("*.safetensors", "*.bin")


def model_fingerprint(config: ModelConfig, folder: Path, *, numbers: str) -> str:
    """`dj-` and 32 hexadecimal digits.

    Args:
        config: of the loaded model.
        folder: with its weight files; one without any leaves the configuration alone.
        numbers: what weights and states are rounded to: a state goes on exactly only in the same.
    """
    document = asdict(config) | {"layers": [attention_document(layer) for layer in config.layers]}
    digest = hashlib.sha256(json.dumps(document, sort_keys=True, default=str).encode())
    digest.update(numbers.encode())
    files = sorted((path for pattern in _PATTERNS for path in folder.glob(pattern)), key=lambda path: path.name)
    for path in files:
        digest.update(f"{path.name}:{path.stat().st_size}".encode())
        _add_samples(path, digest)
    return f"dj-{digest.hexdigest()[:32]}"


def _add_samples(path: Path, digest: "hashlib._Hash") -> None:
    """Evenly spread pieces, the first of them at the beginning, where the header is."""
    size = path.stat().st_size
    with path.open("rb") as file:
        for number in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))

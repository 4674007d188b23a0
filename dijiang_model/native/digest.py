"""Which sources a library was built from. Imports nothing of ours: `setup.py` runs this file by itself."""

import hashlib
from pathlib import Path


def source_digest(folder: Path) -> str:
    """A digest of the C++ files of a folder, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.cpp"), *folder.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()

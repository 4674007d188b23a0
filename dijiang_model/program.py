"""How hints call the program: so that they work as they are printed."""

import shutil
import sys
from pathlib import Path

NAME = "dijiang"


def program() -> str:
    """`dijiang` where the PATH has it, or another program asks; else as it was called, such as `.venv/bin/dijiang`."""
    called = sys.argv[0]
    return NAME if Path(called).name != NAME or shutil.which(NAME) is not None else called

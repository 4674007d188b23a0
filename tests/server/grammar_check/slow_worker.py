"""Stands for the process that compiles: `python -m tests.server.grammar_check.slow_worker FOLDER VOCAB_SIZE EOS`.

A grammar is the path of a file, and is compiled when that is there.
"""

import json
import sys
import time
from pathlib import Path


def main() -> None:
    _say({"ready": True})
    for line in sys.stdin:
        text = json.loads(line)["text"]
        while not Path(text).exists():
            time.sleep(0.005)
        _say({"grammar": text})


def _say(answer: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

"""A process that renders Markdown for the page: `python -m server.playground.worker`.

Lexers of code are regular expressions, and some text may keep one busy for ever; here that costs a process that holds
nothing. Each line of standard input is a text as JSON; each is answered by one line, the fields of a `Rendered`.
"""

import json
import sys

from server.playground.markdown import render

MAX_BYTES = 1 << 30


def main() -> None:
    """Answers until there is nothing more to read."""
    _limit_memory()
    for line in sys.stdin.buffer:
        answer = json.dumps(render(json.loads(line))._asdict())
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not made for Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))


if __name__ == "__main__":
    main()

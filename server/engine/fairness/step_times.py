"""What steps take, so that one that reads prompts is no longer than answers may wait. Standard library only.

A step is taken to cost what its decoding rows cost, as last seen without prompts, and so much for each prompt token.
Where rows alone take half of the time that answers may wait, or more, prompts have as much as they.
Both are means of what was measured last; a step that a busy machine held up counts no more than twice the mean.
"""

_MEMORY = 0.8
_LARGEST_SURPRISE = 2.0
LEAST_TOKENS = 16
"""Of prompts, in every step, however slow it is: they must be read some time."""


class StepTimes:
    """Learns from the steps of one engine on a device that computes one step after the other."""

    def __init__(self, target_gap_s: float) -> None:
        """`target_gap_s`: how long a step may take, seconds."""
        self._target_gap_s = target_gap_s
        self._decode_s = 0.0
        self._token_s = 0.0

    def prompt_tokens(self, num_rows: int) -> int | None:
        """Most prompt tokens of a step in which so many rows decode; None: any number.

        Also where none does: whoever comes meanwhile waits for the end of the step.
        """
        if self._token_s == 0.0:
            return None
        decode_s = self._decode_s if num_rows > 0 else 0.0
        seconds = max(self._target_gap_s - decode_s, decode_s)
        return max(LEAST_TOKENS, int(seconds / self._token_s))

    def observe(self, num_rows: int, num_prompt_tokens: int, seconds: float) -> None:
        """Takes in what a step of decoding rows and prompt tokens took."""
        if num_prompt_tokens == 0:
            self._decode_s = _mean(self._decode_s, seconds)
            return
        token_s = (seconds - (self._decode_s if num_rows > 0 else 0.0)) / num_prompt_tokens
        if token_s > 0:
            self._token_s = _mean(self._token_s, token_s)


def _mean(before: float, seen: float) -> float:
    return seen if before == 0.0 else _MEMORY * before + (1 - _MEMORY) * min(seen, _LARGEST_SURPRISE * before)

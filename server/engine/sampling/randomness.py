"""Random numbers that depend on the seed and the place in the output, and on nothing else.

Counter-based: each (seed, output index) has its own number, so a token is the same whatever runs
beside its sequence, in whichever slot, and after a restart in the middle.
"""

_MASK = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def uniform(seed: int, output_index: int) -> float:
    """A number in [0, 1), a multiple of 2**-53, for one output token.

    Args:
        seed: any integer; its lowest 64 bits count.
        output_index: place of the token in the output, >= 0.
    """
    return (_mix(_mix(seed) + output_index * _GOLDEN_GAMMA) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    """SplitMix64: the golden-gamma step, then Stafford's variant 13 of the 64-bit finaliser."""
    value = (value + _GOLDEN_GAMMA) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)

"""Which of several libraries multiplies fastest on this processor: timed, for flags do not tell.

`vdpbf16ps` takes half of the time of plain fp32 on AMD's Zen 4 and twice as long on Intel's processors of its age.
"""

import ctypes
from collections.abc import Mapping
from ctypes import CDLL
from time import perf_counter

import torch

from dijiang_model.native.structures import Matrix

_NUM_ROWS, _NUM_OUTPUTS, _NUM_COLUMNS = 64, 256, 512
_ROUNDS = 5
_WORTH_IT = 1.25


def fastest(libraries: Mapping[str, CDLL]) -> str:
    """The key of the fastest library, from the plainest to the most special one.

    A more special one has to be faster by a quarter, so that noise does not choose: on processors as they are, each is
    so by far or not at all, and every process on a machine takes the same.

    Args:
        libraries: all of the same sources; one at least.
    """
    chosen, *others = libraries
    if not others:
        return chosen
    seconds = _seconds(libraries)
    for name in others:
        if seconds[name] * _WORTH_IT < seconds[chosen]:
            chosen = name
    return chosen


def _seconds(libraries: Mapping[str, CDLL]) -> dict[str, float]:
    """What a product with bf16 and one with int8 weights take together, at best of a few turns."""
    halves = torch.ones((_NUM_OUTPUTS, _NUM_COLUMNS), dtype=torch.bfloat16)
    codes, scales = torch.ones((_NUM_OUTPUTS, _NUM_COLUMNS), dtype=torch.int8), torch.ones(_NUM_OUTPUTS)
    sizes = {"rows": _NUM_OUTPUTS, "columns": _NUM_COLUMNS}
    matrices = (
        Matrix(halves=halves.data_ptr(), **sizes),
        Matrix(codes=codes.data_ptr(), scales=scales.data_ptr(), **sizes),
    )
    x, y = torch.ones(_NUM_ROWS, _NUM_COLUMNS), torch.empty(_NUM_ROWS, _NUM_OUTPUTS)
    best = {name: [float("inf")] * len(matrices) for name in libraries}
    for _ in range(_ROUNDS):
        for name, library in libraries.items():
            for i, matrix in enumerate(matrices):
                start = perf_counter()
                library.dijiang_linear(ctypes.byref(matrix), x.data_ptr(), _NUM_ROWS, y.data_ptr(), 1)
                best[name][i] = min(best[name][i], perf_counter() - start)
    return {name: sum(times) for name, times in best.items()}

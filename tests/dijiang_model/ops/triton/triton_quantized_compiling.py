"""Compiles the kernels of rounded weights for GPUs without having one; see `triton_compiling`.

    python -m tests.dijiang_model.ops.triton.triton_quantized_compiling [bf16|fp16|fp32 ...]

Prints a JSON line for each kernel, form of weights, shape and number of rows: registers, spills, shared memory, and
whether the matrix units take their whole tiles (wgmma, 9.0). The last line says how often a kernel is compiled for one
matrix beside all numbers of rows. Not in Triton's interpreter.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator

import torch

from dijiang_model.ops.quantized import QuantizedMatrix
from dijiang_model.ops.triton import quantized
from tests.dijiang_model.ops.triton.triton_compiling import CAPABILITIES, Launch, recorded, resources

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = ((576, 1536), (4096, 4096))
"""Outputs and columns: SmolLM2-135M's narrowest product, and LLaMA-2-7B's."""
FORMS = {
    "int8": (0, False),
    "int4": (32, False),
    "int4, minimums": (32, True),
    "int4, groups of 64, minimums": (64, True),
}
NUM_ROWS = (1, 64, 256, 1024)


def zeros(shape: tuple[int, int], group_size: int, has_minimums: bool) -> QuantizedMatrix:
    """A matrix of the form."""
    outputs, columns = shape
    if group_size == 0:
        return QuantizedMatrix(torch.zeros(shape, dtype=torch.int8), torch.zeros(outputs), None, outputs, 0)
    codes = torch.zeros((-(-outputs // 2), columns), dtype=torch.uint8)
    scales = torch.zeros((outputs, columns // group_size), dtype=torch.float16)
    return QuantizedMatrix(codes, scales, scales.clone() if has_minimums else None, outputs, group_size)


def launches_of(matrix: QuantizedMatrix, num_rows: int, dtype: torch.dtype) -> list[Launch]:
    """Of one product with a bias, and of a look-up where the codes allow it."""
    x = torch.zeros((num_rows, matrix.num_columns), dtype=dtype)
    with recorded() as launches:
        quantized.product(x, matrix, torch.zeros(matrix.num_outputs, dtype=dtype))
        if matrix.group_size == 0:
            quantized.looked_up(torch.zeros(num_rows, dtype=torch.int64), matrix, dtype)
    return launches


def found(dtypes: list[str]) -> Iterator[dict[str, object]]:
    """A line for each kernel that is compiled anew."""
    for name in dtypes:
        seen: set[tuple[object, ...]] = set()
        for shape in SHAPES:
            for form, kind in FORMS.items():
                for num_rows in NUM_ROWS:
                    for launch in launches_of(zeros(shape, *kind), num_rows, DTYPES[name]):
                        variant = (launch.kernel.__name__, *launch.variant)
                        if variant not in seen:
                            seen.add(variant)
                            about = {"kernel": launch.kernel.__name__, "form": form, "shape": shape, "rows": num_rows}
                            yield from ({"dtype": name, **about, **line} for line in _compiled(launch))


def _compiled(launch: Launch) -> Iterator[dict[str, object]]:
    for capability in CAPABILITIES:
        made = launch.compiled(capability)
        yield {"capability": capability, **resources(made), "wgmma": "wgmma.mma" in made.asm["ptx"]}


def num_variants() -> dict[str, int]:
    """By kernel, of one large matrix in bf16 below `quantized.WIDENED_FROM` rows."""
    matrix, variants = zeros((4096, 4096), 32, True), set()
    for num_rows in (1, 2, 5, 16, 17, 31, 32, 33, 64, 65, 80, 512, 1023):
        for launch in launches_of(matrix, num_rows, torch.bfloat16):
            variants.add((launch.kernel.__name__, *launch.variant))
    return dict(sorted(Counter(str(name) for name, *_ in variants).items()))


def main() -> None:
    """All of the dtypes named on the command line, or of bf16 alone."""
    for line in found(sys.argv[1:] or ["bf16"]):
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
    sys.stdout.write(json.dumps({"variants": num_variants()}) + "\n")


if __name__ == "__main__":
    main()

"""A matrix of codes as the operators take it; what codes and scales mean is told in `quantization.rounding`."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """[outputs, columns] in int8 or int4; all tensors contiguous and on one device.

    Attributes:
        codes: [outputs, columns] int8; int4: [ceil(outputs / 2), columns] uint8, two outputs in a byte.
        scales: [outputs] fp32; int4: [outputs, groups] fp16.
        minimums: int4, of the scales' shape; None: codes 0 to 15 stand for -8 to 7.
        num_outputs: rows of the matrix, entries of a product with it.
        group_size: int4: neighbouring columns under one scale; 0: int8.
    """

    codes: Tensor
    scales: Tensor
    minimums: Tensor | None
    num_outputs: int
    group_size: int

    @property
    def num_columns(self) -> int:
        return self.codes.shape[1]

    @property
    def num_lines(self) -> int:
        """Rows of the codes: one output each, or two."""
        return self.codes.shape[0]

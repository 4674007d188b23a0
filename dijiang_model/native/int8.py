"""Weight-only quantisation to int8: one symmetric scale per output of each projection and of the head.

The compiled kernels multiply the codes with 16-bit activations in exact integer sums, so that only the
weights' rounding is felt. Without them the codes are widened on the fly: the same answer, no gain in speed.
Embedding look-ups, norms and everything of the kernel (radii, decays, mixing weights) stay as they are.
"""

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from dijiang_model.native.library import Matrix, load_library

if TYPE_CHECKING:
    from dijiang_model.model import DiJiangForCausalLM

COLUMN_BLOCK = 64
"""Rows of codes are padded with zeros to whole blocks of this, the width of the widest instruction."""
LARGEST_CODE = 127


class Int8Weight:
    """Codes of a [rows, columns] matrix.

    Attributes:
        codes: [rows, padded columns] int8, zeros behind the columns.
        scales: [rows] fp32; a weight is about `code * scale`.
        totals: [rows] int32, the sum of each row's codes.
        columns: of the matrix, without padding.
    """

    def __init__(self, weight: Tensor) -> None:
        """Quantises fp32 weights [rows, columns] on the CPU; a row of zeros keeps scale 0."""
        rows, self.columns = weight.shape
        self.scales = weight.abs().amax(dim=1).float() / LARGEST_CODE
        divisor = torch.where(self.scales > 0, self.scales, 1.0)
        padded = -(-self.columns // COLUMN_BLOCK) * COLUMN_BLOCK
        self.codes = torch.zeros((rows, padded), dtype=torch.int8)
        self.codes[:, : self.columns] = (weight / divisor[:, None]).round().to(torch.int8)
        self.totals = self.codes.sum(dim=1, dtype=torch.int32)

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def num_bytes(self) -> int:
        """Memory of codes, scales and sums."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.codes, self.scales, self.totals))

    def matrix(self, bias: int | None = None) -> Matrix:
        """As the kernels want it; it points into this object."""
        return Matrix(
            codes=self.codes.data_ptr(),
            scales=self.scales.data_ptr(),
            totals=self.totals.data_ptr(),
            bias=bias,
            rows=self.rows,
            columns=self.columns,
        )

    def dequantized(self) -> Tensor:
        """[rows, columns] fp32."""
        return self.codes[:, : self.columns].float() * self.scales[:, None]

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias for x [..., columns] fp32 on the CPU, [..., rows]."""
        library = load_library()
        if library is None:
            return functional.linear(x, self.dequantized(), bias)
        x = x.contiguous()
        y = torch.empty((*x.shape[:-1], self.rows), dtype=torch.float32)
        matrix = self.matrix(None if bias is None else bias.data_ptr())
        num_rows = x.numel() // self.columns
        threads = torch.get_num_threads()
        if library.dijiang_linear(ctypes.addressof(matrix), x.data_ptr(), num_rows, y.data_ptr(), threads):
            raise MemoryError(f"no memory for a product of {num_rows} rows")
        return y


class Int8Linear(nn.Module):
    """Stands in for a `nn.Linear`; for inference only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.quantized = Int8Weight(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., columns] -> [..., rows], fp32."""
        return self.quantized.product(x, self.bias)


@torch.no_grad()
def quantize_(model: "DiJiangForCausalLM") -> "DiJiangForCausalLM":
    """Replaces the projections and the head of a prepared fp32 model on the CPU by int8 ones; returns the model.

    Raises:
        ValueError: the model is not in fp32 on a CPU.
    """
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise ValueError(f"int8 weights need a float32 model on a CPU, not {model.dtype} on {model.device.type}")
    for block in model.blocks:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Int8Linear(child))
    model.int8_head = Int8Weight(model.head_weight.detach())
    return model.prepare()

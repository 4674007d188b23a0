"""Where a network keeps its parts."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Paths:
    """Where a family keeps its parts: module paths, as they begin the names of HF's tensors.

    Attributes:
        embedding, head, final_norm: from the model; the head where it is not the embedding.
        layers: from the model, of the list of blocks.
        attention: from a block; the following ones too.
        query: with keys and values in it, interleaved by head ([H, 3, d]), where `key` is None.
        input_norm, mlp_norm: of what attention and MLP read; None: they read the hidden state itself.
        mlp_gate: None: the MLP has no gate.
        query_norm, key_norm: of each head or of all together, before the rotary embedding; None: there are none.
        attention_output_norm, mlp_output_norm: of what is added to the hidden state; None: there are none.
    """

    embedding: str
    head: str
    final_norm: str
    layers: str
    attention: str
    input_norm: str | None
    mlp_norm: str | None
    query: str
    output: str
    mlp_up: str
    mlp_down: str
    key: str | None = None
    value: str | None = None
    mlp_gate: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    attention_output_norm: str | None = None
    mlp_output_norm: str | None = None

    @property
    def attention_projections(self) -> list[str]:
        """From a block, in the order in which they are computed."""
        return [path for path in (self.query, self.key, self.value, self.output) if path is not None]

    @property
    def projections(self) -> list[str]:
        """All matrices of a block that read or write the hidden state or the MLP's inner one, from the block."""
        mlp = (self.mlp_gate, self.mlp_up, self.mlp_down)
        return [*self.attention_projections, *(path for path in mlp if path is not None)]

    @property
    def row_parallel(self) -> tuple[str, str]:
        """From a block: the projections whose inputs are split, where a network is split by heads."""
        return self.output, self.mlp_down

    @property
    def outer(self) -> str:
        """The first part of all names but the head's, with its dot."""
        return self.embedding.partition(".")[0] + "."

    @property
    def query_and_key_scales(self) -> tuple[str, str]:
        """From a block: the last modules that give queries and keys their length."""
        if self.query_norm is not None and self.key_norm is not None:
            return self.query_norm, self.key_norm
        assert self.key is not None, "a fused projection has values in it"
        return self.query, self.key

    def attention_of(self, layer: int) -> str:
        """From the model."""
        return f"{self.layers}.{layer}.{self.attention}"

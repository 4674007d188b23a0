"""The shape of a network, frozen, from `config.json`. An unsupported value is an error that names it.

`ModelConfig` describes the backbone (dimensions, norms, rotary embedding) and, layer by layer, the
attention that replaced softmax (`AttentionConfig`). The JSON form is read and written by
`dijiang_model.checkpoints.config_json`.
"""

from dataclasses import dataclass, replace
from functools import cache
from math import frexp, isfinite
from typing import Literal

from dijiang_model.errors import ConfigError
from dijiang_model.rotary import Frequencies, RopeScaling, rotary_frequencies

SINK_RANGE = 2048
"""Positions: teachers that claim 8,192 positions saw few texts of such length, and heed sinks from there less well."""

WIDTH_MULTIPLE = 16
"""Features are computed so many at a time."""

Normalisation = Literal["softmax", "exp"]
ReadOut = Literal["denominator", "group_norm"]
Basis = Literal["dct2", "dct4", "matrix"]
Decay = Literal["static", "table"]


@dataclass(frozen=True, slots=True)
class FeatureConfig:
    """The frequency-domain feature map of one layer (paper eq. 11 and 12; `dijiang_model.features`).

    Attributes:
        bases: orthonormal transforms stacked to K = head_size * len(bases) features. `matrix` (alone)
            takes the whole projection from the checkpoint, as the released format stores it.
        normalisation: `softmax(T C x + log D)` over the features, or the paper's `D * exp(T C x)`.
        scale: temperature applied to queries and keys before the map (released: 1;
            head_size ** -0.25 reproduces softmax attention's 1/sqrt(d)).
        nodes: the recorded low-discrepancy set behind the inverse CDF, e.g. `midpoint` (see
            `features.NODE_NAMES`), or `checkpoint` when they came with the weights.
        far_rank: rank of a learned update of the queries that read the linear part, applied before the
            rotary embedding (`LinearKernel.far_query`); 0: they are the window's queries.
        rotated: whether the map reads queries and keys after the rotary embedding, as released. Before it, what
            the linear part answers does not depend on where in the text it stands; its only measure of distance
            is the decay.
        width: K where it is less: the first directions of the bases, of the lowest frequencies; 1 with `softmax`: one
            constant feature, a decayed mean; 0: no linear part.
    """

    bases: tuple[Basis, ...] = ("dct2",)
    normalisation: Normalisation = "softmax"
    scale: float = 1.0
    nodes: str = "midpoint"
    far_rank: int = 0
    rotated: bool = True
    width: int | None = None

    def num(self, head_size: int) -> int:
        """K, the features of a head of so many channels."""
        return head_size * len(self.bases) if self.width is None else self.width


@dataclass(frozen=True, slots=True)
class AnchorConfig:
    """Places of one layer's key-value heads for tokens that are kept by a learned priority (README, section 7).

    Attributes:
        places: tokens that each head holds exactly: sinks, its recent window, and as many anchors as are left.
        windows: recent tokens among them; at least `span`, so that a priority is final before it decides.
        age: what a priority gains with each position, >= 0: old anchors fade, by default by a factor of e in 2,000
            tokens. With a fifth of that, anchors go further away than a teacher of 8,192 positions ever looked.
        grid: scores are rounded to multiples of it, a power of two, so that decode and prefill choose alike.
        span: a token's priority is the largest score of the tokens up to so many away from it.
        key_bits, value_bits: of the numbers in a place: 8, values also 4.
    """

    places: tuple[int, ...]
    windows: tuple[int, ...]
    age: float = 5e-4
    grid: float = 1 / 64
    span: int = 3
    key_bits: int = 8
    value_bits: int = 8

    def place_bytes(self, head_size: int) -> int:
        """Of one token in one head: key and value, their scales, position and score."""
        return (self.key_bits + self.value_bits) * head_size // 8 + 16

    @property
    def num_scores(self) -> int:
        """Scores of the last tokens that a state keeps for each head."""
        return 2 * self.span + 1

    def of_heads(self, heads: range) -> "AnchorConfig":
        """The same of some of the heads."""
        own = slice(heads.start, heads.stop)
        return replace(self, places=self.places[own], windows=self.windows[own])

    def problems(self, *, window: int, sinks: int) -> list[str]:
        """Contradictions in words, in itself and with the layer's window and sinks."""
        found = []
        if len(self.places) != len(self.windows) or not self.places:
            return [f"anchors have {len(self.places)} places and {len(self.windows)} windows, one of each per head"]
        for head, (places, own) in enumerate(zip(self.places, self.windows, strict=True)):
            if own < max(1, self.span):
                found.append(
                    f"head {head} has a recent window of {own}, at least {max(1, self.span)} (span) are needed"
                )
            if places < sinks + own:
                found.append(f"head {head} has {places} places, fewer than {sinks} sinks and a window of {own}")
        if window < max(self.windows):
            found.append(f"window {window} must be at least the largest of the heads' windows, {max(self.windows)}")
        if not isfinite(self.age) or self.age < 0:
            found.append(f"age {self.age} must be a finite number >= 0")
        if not self.grid > 0 or frexp(self.grid)[0] != 0.5:
            found.append(f"grid {self.grid} must be a power of two")
        if self.span < 0:
            found.append(f"span {self.span} must be >= 0")
        if self.key_bits != 8 or self.value_bits not in (4, 8):
            found.append(f"keys have 8 bits and values 4 or 8, not {self.key_bits} and {self.value_bits}")
        return found


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """What one layer computes in the place of softmax attention.

    Attributes:
        features: the feature map.
        read_out: the paper's `phi(q) S / phi(q) z`, or the released GroupNorm with swish gate.
        decay: one static decay per key-value head, or the released position tables D1 and D2.
        window: w, exact-softmax tokens kept in a ring; 0: none.
        sinks: s, first tokens kept beside the ring; 0 unless `window` > 0.
        anchors: places per key-value head, kept by priority, in the place of one ring for all heads; `window` is
            then the largest of theirs, at least. None: a plain window.
    """

    features: FeatureConfig = FeatureConfig()
    read_out: ReadOut = "denominator"
    decay: Decay = "static"
    window: int = 0
    sinks: int = 0
    anchors: AnchorConfig | None = None

    def problems(self) -> list[str]:
        """Contradictions in words; empty when there are none."""
        found = []
        if self.anchors is not None:
            found += self.anchors.problems(window=self.window, sinks=self.sinks)
        if self.window < 0 or self.sinks < 0:
            found.append(f"window {self.window} and sinks {self.sinks} must be >= 0")
        if self.sinks > 0 and self.window == 0:
            found.append(f"{self.sinks} sinks need a window")
        if self.window > 0 and self.read_out != "denominator":
            found.append(f"a window needs the denominator read-out, not {self.read_out!r}")
        if self.window > 0 and self.decay != "static":
            found.append(f"a window needs a static decay, not {self.decay!r}")
        if self.decay == "table" and self.read_out != "group_norm":
            found.append(f"position tables need the group_norm read-out, not {self.read_out!r}")
        if "matrix" in self.features.bases and len(self.features.bases) > 1:
            found.append("basis 'matrix' stands alone")
        if self.features.far_rank < 0:
            found.append(f"far_rank {self.features.far_rank} must be >= 0")
        if not self.features.bases:
            found.append("at least one basis is needed")
        return found + self._width_problems()

    def _width_problems(self) -> list[str]:
        width = self.features.width
        if width is None:
            return []
        found = []
        if width < 0 or (width > 1 and width % WIDTH_MULTIPLE != 0):
            found.append(f"width {width} must be 0, 1 or a multiple of {WIDTH_MULTIPLE}")
        if width == 1 and self.features.normalisation != "softmax":
            found.append("a width of 1 needs the normalisation softmax: one constant feature")
        if "matrix" in self.features.bases:
            found.append("basis 'matrix' has its own width")
        if width == 0 and (self.window == 0 or self.features.far_rank > 0):
            found.append("only a layer with a window can do without a linear part, and needs no update of its queries")
        return found


@dataclass(frozen=True, slots=True)
class LocalLayers:
    """Layers of a teacher that see a window alone, and rotate in their own way; conversion keeps them as they are.

    Attributes:
        indices: of the layers, ascending.
        window: tokens that each sees, itself among them.
        rope_theta: base of their frequencies, which are not scaled.
    """

    indices: tuple[int, ...]
    window: int
    rope_theta: float


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A whole network.

    Attributes:
        family: the backbone's architecture, a key of `families.FAMILIES`.
        num_kv_heads: G; divides num_heads (H). GPT-NeoX has G = H.
        rotary_dims: channels of each head that rotate (the first ones), even, <= head_size; 0 for OPT.
        max_position_embeddings: the teacher's trained range in tokens. Generation does not end there;
            sink keys are seen from no further away than this (`last_sink_position`).
        activation: HF's name: `gelu`, `gelu_new`, `gelu_fast`, `gelu_pytorch_tanh`, `silu`, `relu`.
        parallel_residual: GPT-NeoX: attention and MLP both read the layer's input.
        attention_bias / mlp_bias: whether those projections carry biases.
        pre_norm: norms before attention and MLP; False (OPT-350M) has them after the residuals and none at the end.
        embedding_size: width of the token embedding if it is projected to hidden_size (OPT-350M), else 0.
        position_table_length: entries of the released D1 / D2 tables; 0 without tables.
        layers: one `AttentionConfig` per layer.
        bos_token_id / eos_token_ids / pad_token_id: from the base model; may be absent.
        rope_scaling: of the rotary frequencies; None: they are those of `rope_theta`.
        output_bias: whether the attention's output projection carries a bias; None: as `attention_bias` says.
        qk_norm: whether each head's queries and keys pass an RMS norm before they are rotated.
        norms_all_heads: whether that norm is over all heads together.
        teacher_window: tokens that the unconverted attention sees, itself among them; 0: all before it.
        local_layers: those that differ from the others in that, and in their rotation; None: there are none.
        query_scale: factor on normed queries, beside softmax's 1/sqrt(head_size).
        embedding_scale: factor on the rows of the embedding that the first block reads.
        norm_offset: RMS norms multiply with their weight plus this.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    rotary_dims: int
    rope_theta: float
    max_position_embeddings: int
    norm_eps: float
    activation: str
    parallel_residual: bool
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    layers: tuple[AttentionConfig, ...]
    pre_norm: bool = True
    embedding_size: int = 0
    position_table_length: int = 0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    rope_scaling: RopeScaling | None = None
    output_bias: bool | None = None
    qk_norm: bool = False
    norms_all_heads: bool = False
    teacher_window: int = 0
    local_layers: LocalLayers | None = None
    query_scale: float = 1.0
    embedding_scale: float = 1.0
    norm_offset: float = 0.0

    def __post_init__(self) -> None:
        """Refuses contradictions, all of them at once.

        Raises:
            ConfigError: with every contradiction in its text.
        """
        found = [f"layer {i}: {text}" for i, layer in enumerate(self.layers) for text in layer.problems()]
        if not self.layers:
            found.append("a model needs at least one layer")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads != 0:
            found.append(f"{self.num_heads} heads cannot share {self.num_kv_heads} key-value heads")
        if self.rotary_dims % 2 != 0 or not 0 <= self.rotary_dims <= self.head_size:
            found.append(f"rotary_dims {self.rotary_dims} must be even and at most the head size {self.head_size}")
        for i, layer in enumerate(self.layers):
            if layer.features.num(self.head_size) > self.head_size * len(layer.features.bases):
                found.append(f"layer {i}: a width of {layer.features.width} is more than its bases have directions")
            if layer.anchors is not None and len(layer.anchors.places) != self.num_kv_heads:
                found.append(f"layer {i}: places of {len(layer.anchors.places)} heads, there are {self.num_kv_heads}")
        tables = any(layer.decay == "table" for layer in self.layers)
        if tables and (self.num_kv_heads != self.num_heads or self.position_table_length < 1):
            found.append("position tables need a length and one key-value head per head")
        if self.num_heads < 2 and any(layer.read_out == "group_norm" for layer in self.layers):
            found.append("the group_norm read-out needs at least 2 heads: its groups have a channel of each")
        for i, layer in enumerate(self.layers):
            if 0 < self.seen_by_teacher(i) < layer.window:
                found.append(
                    f"layer {i}: a window of {layer.window} tokens is wider than the teacher's own, "
                    f"{self.seen_by_teacher(i)} tokens"
                )
        if found:
            raise ConfigError("; ".join(found))

    @property
    def last_sink_position(self) -> int:
        """Where a query seems to stand, at most, for the sinks: `SINK_RANGE`, within what the teacher was trained on.

        A window that reaches further than that keeps the teacher's distances for as long as it holds the whole text.
        """
        reach = max(layer.window + layer.sinks for layer in self.layers)
        return min(self.max_position_embeddings, max(SINK_RANGE, reach)) - 1

    @property
    def memory(self) -> str:
        """What a state holds exactly, in words."""
        held = [layer.anchors.places for layer in self.layers if layer.anchors is not None]
        if not held:
            windows = sorted({f"{layer.window + layer.sinks:,}" for layer in self.layers if layer.window > 0})
            return f"the last {' or '.join(windows)} tokens exactly" if windows else "no token exactly"
        places = sorted((places for layer in held for places in layer), reverse=True)
        mean, best = round(sum(places) / len(places)), places[len(places) // 10]
        return (
            f"{mean:,} places a head; one head in ten holds the last {best:,} tokens whole, and chosen ones for longer"
        )

    def is_local(self, layer: int) -> bool:
        """Whether a layer is one of `local_layers`."""
        return self.local_layers is not None and layer in self.local_layers.indices

    @property
    def global_layers(self) -> tuple[int, ...]:
        """The layers that are none of `local_layers`."""
        return tuple(layer for layer in range(self.num_layers) if not self.is_local(layer))

    def seen_by_teacher(self, layer: int) -> int:
        """Tokens that a layer's unconverted attention sees, itself among them; 0: all before it."""
        if self.local_layers is not None and layer in self.local_layers.indices:
            return self.local_layers.window
        return self.teacher_window

    @property
    def local_frequencies(self) -> Frequencies:
        """As `frequencies`, of the local layers."""
        assert self.local_layers is not None
        return _frequencies(self.rotary_dims, self.local_layers.rope_theta, None)

    @property
    def frequencies(self) -> Frequencies:
        """Radians for each position by which channel pairs turn, [rotary_dims / 2]."""
        return _frequencies(self.rotary_dims, self.rope_theta, self.rope_scaling)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def embedding_width(self) -> int:
        """Columns of the embedding and of the output head."""
        return self.embedding_size if self.embedding_size > 0 else self.hidden_size

    def num_features(self, layer: int) -> int:
        """K, the feature width of a layer."""
        return self.layers[layer].features.num(self.head_size)


@cache
def _frequencies(dims: int, theta: float, scaling: RopeScaling | None) -> Frequencies:
    """The same tuple for the same network, so that it is found quickly wherever it is a key."""
    return rotary_frequencies(dims, theta=theta, scaling=scaling)

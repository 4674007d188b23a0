"""A GGUF file as an HF config and HF tensors, dequantized one by one.

Of LLaMA's models llama.cpp stores the rows of q and k in another order (`families.family.Gguf`); reading undoes that.
Kinds of models that share an architecture's name but compute something else (experts, rotary factors of their own,
sliding windows where the family has none) are refused, all reasons listed.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dijiang_model.errors import CheckpointError, ConversionError
from dijiang_model.formats.problem_list import problem_list
from dijiang_model.formats.tensor_files import TensorInfo, unreadable
from dijiang_model.rotary import RopeScaling, rotary_frequencies

if TYPE_CHECKING:
    from dijiang_model.families.family import Family

CHUNK_ELEMENTS = 2**20

Bytes = npt.NDArray[np.uint8]

_PLAIN_DTYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
}
_BLOCK_PARTS = {
    "attn_norm": "input_norm",
    "attn_q": "query",
    "attn_k": "key",
    "attn_v": "value",
    "attn_output": "output",
    "attn_q_norm": "query_norm",
    "attn_k_norm": "key_norm",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "mlp_gate",
    "ffn_up": "mlp_up",
    "ffn_down": "mlp_down",
    "post_attention_norm": "attention_output_norm",
    "post_ffw_norm": "mlp_output_norm",
}
"""Attributes of `families.family.Paths` by the names of llama.cpp."""
_PARTS = {"token_embd": "embedding", "output_norm": "final_norm", "output": "head"}
_ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3_FACTORS = (8.0, 32.0)
"""Of Llama 3.1 and 3.3, and of 3.2: a file holds the divisors of the frequencies, not what they come from."""


class GgufSource:
    """An opened GGUF file; a `TensorSource` under HF's names.

    Attributes:
        metadata: scalar and array values by GGUF key.
        family: of the model.
    """

    def __init__(self, path: Path, families: Iterable["Family"]) -> None:
        """Opens a file and reads its metadata.

        Args:
            families: that may be read.

        Raises:
            ConversionError: not a readable GGUF file, or of another architecture.
        """
        self._path = path
        try:
            self._reader = gguf.GGUFReader(path)
            self.metadata: dict[str, Any] = {key: field.contents() for key, field in self._reader.fields.items()}
        except (ValueError, KeyError, IndexError, OverflowError, OSError) as error:
            raise ConversionError(_unreadable(path, error)) from error
        if self._reader.byte_order == "S":
            raise ConversionError(f"{path} was written for the other byte order, which is not supported")
        parts = self.metadata.get("split.count", 1)
        if _is_number(parts) and parts > 1:
            raise ConversionError(
                f"{path} is one of {parts} parts; join them first: llama-gguf-split --merge FIRST_PART WHOLE"
            )
        architecture = self.metadata.get("general.architecture")
        known = {family.gguf.architecture: family for family in families if family.gguf is not None}
        if architecture is None:
            raise ConversionError(f"{path} is no model: its metadata has no general.architecture")
        if architecture not in known:
            raise ConversionError(
                f"{path} has the GGUF architecture {architecture!r}; supported are {', '.join(known)}"
            )
        self.family = known[architecture]
        self._tensors = {_hf_name(tensor.name, self.family): tensor for tensor in self._reader.tensors}
        self._rope_factors = self._tensors.pop(_ROPE_FACTORS, None)
        self._infos = {name: _info(tensor) for name, tensor in self._tensors.items()}

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    @property
    def quantized_types(self) -> tuple[str, ...]:
        """Names of the quantized types in the file, the one with most tensors first."""
        types = [tensor.tensor_type.name for tensor in self._reader.tensors]
        quantized = {name for name in types if name not in _PLAIN_DTYPES}
        return tuple(sorted(quantized, key=lambda name: (-types.count(name), name)))

    def read(self, name: str) -> Tensor:
        """A tensor, fp32 if it was quantized, in its own memory."""
        tensor, info = self._tensors[name], self._infos[name]
        # A mapping of its own: pages that the reader's mapping has touched would stay in memory.
        data = np.memmap(self._path, mode="r", offset=int(tensor.data_offset), shape=(int(tensor.n_bytes),))
        try:
            value = _dequantized(data, tensor, info) if info.dtype != torch.bfloat16 else _bfloat16(data, info)
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(f"{tensor.name} of type {tensor.tensor_type.name} cannot be read: {error}") from error
        assert self.family.gguf is not None
        if self.family.gguf.norm_offset and _NORM.search(name):
            value = value - self.family.gguf.norm_offset
        if not self.family.gguf.pairs_neighbours:
            return value
        paths = self.family.paths
        if f".{paths.query}." in name:
            return _unpermuted(value, self._value("attention.head_count"))
        if f".{paths.key}." in name:
            return _unpermuted(value, self._num_kv_heads)
        return value

    def hf_config(self) -> dict[str, object]:
        """The HF config that the metadata describes.

        Raises:
            ConversionError: a missing value, or something that this code does not compute; all of it listed.
        """
        problems = self._problems()
        if problems:
            raise ConversionError(problem_list("this GGUF file cannot be converted", problems))
        token_ids = {name: self.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _TOKEN_IDS.items()}
        hidden, heads = self._value("embedding_length"), self._value("attention.head_count")
        paths = self.family.paths
        first = f"{paths.layers}.0"
        return {
            "model_type": self.family.name,
            "vocab_size": self._infos[f"{paths.embedding}.weight"].shape[0],
            "hidden_size": hidden,
            "intermediate_size": self._value("feed_forward_length"),
            "num_hidden_layers": self._value("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._num_kv_heads,
            "head_dim": self._head_size,
            "hidden_act": "silu",
            "max_position_embeddings": self._value("context_length"),
            "rms_norm_eps": self._value("attention.layer_norm_rms_epsilon"),
            "rope_theta": self._theta,
            "attention_bias": f"{first}.{paths.query}.bias" in self._infos,
            "mlp_bias": f"{first}.{paths.mlp_up}.bias" in self._infos,
            "tie_word_embeddings": f"{paths.head}.weight" not in self._infos,
            **({} if (scaling := self._rope_scaling()) is None else {"rope_scaling": scaling}),
            **(self.family.gguf.config(self._value) if self.family.gguf is not None else {}),
            **token_ids,
        }

    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends an answer: end of sequence, of turn, of message."""
        ids = (self.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
        return tuple(dict.fromkeys(item for item in ids if isinstance(item, int)))

    def _value(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(self._key(key), default)

    def _key(self, key: str) -> str:
        assert self.family.gguf is not None
        return f"{self.family.gguf.architecture}.{key}"

    @property
    def _theta(self) -> float:
        return float(self._value("rope.freq_base", 10_000.0))

    def _rope_scaling(self) -> dict[str, object] | None:
        """As HF's configs say it; None: there is none."""
        if self._rope_factors is not None:
            return self._llama3_scaling(self._rope_factors)
        kind, factor = self._value("rope.scaling.type", "none"), self._value("rope.scaling.factor", 1.0)
        if kind == "none" or factor == 1:
            return None
        original = self._value("rope.scaling.original_context_length")
        return {
            "rope_type": kind,
            "factor": factor,
            **({} if original is None else {"original_max_position_embeddings": original}),
        }

    def _llama3_scaling(self, tensor: gguf.ReaderTensor) -> dict[str, object] | None:
        """The scaling of llama3 whose divisors a file holds; None: they are others."""
        divisors = np.asarray(tensor.data, dtype=np.float64)
        plain = rotary_frequencies(self._head_size, theta=self._theta)
        for factor in _LLAMA3_FACTORS:
            scaling = RopeScaling("llama3", factor, 8192, 1.0, 4.0)
            expected = np.array(plain) / np.array(scaling.scaled(plain, theta=self._theta))
            if expected.shape == divisors.shape and np.allclose(expected, divisors, rtol=1e-3):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": scaling.low,
                    "high_freq_factor": scaling.high,
                    "original_max_position_embeddings": scaling.original_positions,
                }
        return None

    @property
    def _num_kv_heads(self) -> Any:
        return self._value("attention.head_count_kv", self._value("attention.head_count"))

    @property
    def _head_size(self) -> int:
        return int(self._value("attention.key_length", self._value("embedding_length") // self._heads_or_one))

    @property
    def _sizes(self) -> tuple[str, ...]:
        """Metadata that must be the head's size: of families whose heads rotate in part the config says how much."""
        assert self.family.gguf is not None
        says_share = "partial_rotary_factor" in self.family.gguf.config(self._value)
        return ("attention.value_length",) if says_share else ("rope.dimension_count", "attention.value_length")

    @property
    def _heads_or_one(self) -> int:
        return max(int(self._value("attention.head_count")), 1)

    def _problems(self) -> list[str]:
        key = self._key
        missing = [f"{key(name)} is missing or not a number" for name in _NEEDED if not _is_number(self._value(name))]
        if f"{self.family.paths.embedding}.weight" not in self._infos:
            missing.append("token_embd.weight is missing")
        if missing or not _is_number(self._num_kv_heads):
            return missing or [f"{key('attention.head_count_kv')} differs between layers, which is not supported"]
        problems = [
            f"{key(name)} is set: {words} is not supported"
            for name, words in _REFUSED.items()
            if self._value(name) and not (name == _WINDOW and self.family.sliding_window in ("read", "by layer"))
        ]
        if self._value("rope.scaling.type", "none") not in ("none", "linear", "yarn"):
            problems.append(f"{key('rope.scaling.type')} {self._value('rope.scaling.type')!r} is not supported")
        if self._rope_factors is not None and self._llama3_scaling(self._rope_factors) is None:
            problems.append("the rotary embedding has factors of its own, which are not supported")
        if any(name.startswith(_LONG_ROPE) for name in self._tensors):
            problems.append("the rotary embedding depends on the text's length (longrope), which is not supported")
        sizes = {name: self._value(name, self._head_size) for name in self._sizes}
        return problems + [
            f"{key(name)} is {size}, must be the head size {self._head_size}"
            for name, size in sizes.items()
            if size != self._head_size
        ]


_NEEDED = (
    "embedding_length",
    "feed_forward_length",
    "block_count",
    "context_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
_WINDOW = "attention.sliding_window"
_NORM = re.compile(r"norm\.weight$")
_LONG_ROPE = "rope_factors_"
_REFUSED = {
    _WINDOW: "a sliding window",
    "expert_count": "a mixture of experts",
    "logit_scale": "scaled logits",
    "residual_scale": "a scaled residual",
    "embedding_scale": "scaled embeddings",
    "attention.scale": "another attention scale",
}
_TOKEN_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def _unreadable(path: Path, error: Exception) -> str:
    """Why a file cannot be read as GGUF, in words that say what to do."""
    if isinstance(error, OSError):
        return f"{path} cannot be read: {error.strerror}"
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            return f"{path} is not a readable GGUF file: it does not begin with GGUF"
        version = int.from_bytes(file.read(4), "little")
    if 0 < version < gguf.GGUF_VERSION - 1:
        return f"{path} is of GGUF version {version}, which is too old; fetch a newer file of the model"
    return unreadable(path, "GGUF file")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _hf_name(name: str, family: "Family") -> str:
    """HF's name of a GGUF tensor; unknown ones keep theirs and show up as surplus."""
    paths, fused = family.paths, {one.gguf: one.path for one in family.fused}
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if block:
        part = _BLOCK_PARTS.get(block[2])
        path = fused.get(block[2]) or (None if part is None else getattr(paths, part))
        return name if path is None else f"{paths.layers}.{block[1]}.{path}.{block[3]}"
    stem, _, kind = name.rpartition(".")
    return f"{getattr(paths, _PARTS[stem])}.{kind}" if stem in _PARTS else name


def _info(tensor: gguf.ReaderTensor) -> TensorInfo:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    return TensorInfo(shape, _PLAIN_DTYPES.get(tensor.tensor_type.name, torch.float32))


def _dequantized(data: Bytes, tensor: gguf.ReaderTensor, info: TensorInfo) -> Tensor:
    """Row chunk by row chunk: the dequantizer's temporaries are several times its output."""
    value = torch.empty(info.shape, dtype=info.dtype)
    rows = value.view(-1, info.shape[-1]).numpy()
    stored = data.reshape(rows.shape[0], -1)
    is_double = info.dtype == torch.float64
    step = max(1, CHUNK_ELEMENTS // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        chunk = stored[start : start + step]
        rows[start : start + step] = chunk.view(np.float64) if is_double else gguf.dequantize(chunk, tensor.tensor_type)
    return value


def _bfloat16(data: Bytes, info: TensorInfo) -> Tensor:
    value: Tensor = torch.from_numpy(np.array(data))
    return value.view(torch.bfloat16).view(info.shape)


def _unpermuted(value: Tensor, num_heads: int) -> Tensor:
    """[heads * d, ...] with the two halves of each head interleaved -> halves one after the other."""
    halves: Tensor = value.unflatten(0, (num_heads, -1, 2)).transpose(1, 2)  # [heads, 2, d / 2, ...]
    return halves.flatten(0, 2).contiguous()

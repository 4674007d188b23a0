"""A GGUF file of the llama architecture as an HF config and HF tensors, dequantized one by one.

llama.cpp stores the rows of q and k in another order (its rotary embedding pairs neighbouring channels,
HF's pairs the halves of a head); reading undoes that. Kinds of models that share the architecture's name
but compute something else (rope scaling, sliding windows, experts) are refused, all reasons listed.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dijiang_model.errors import CheckpointError, ConversionError
from dijiang_model.formats.problem_list import problem_list
from dijiang_model.formats.tensor_files import TensorInfo

CHUNK_ELEMENTS = 2**20

Bytes = npt.NDArray[np.uint8]

_PLAIN_DTYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
}
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GgufSource:
    """An opened GGUF file; a `TensorSource` under HF's LLaMA names.

    Attributes:
        metadata: scalar and array values by GGUF key.
    """

    def __init__(self, path: Path) -> None:
        """Opens a file and reads its metadata.

        Raises:
            ConversionError: not a readable GGUF file, or not of the llama architecture.
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
        if architecture != "llama":
            raise ConversionError(f"{path} has the GGUF architecture {architecture!r}; only llama is supported")
        self._tensors = {_hf_name(tensor.name): tensor for tensor in self._reader.tensors}
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
        if ".self_attn.q_proj." in name:
            return _unpermuted(value, self._value("attention.head_count"))
        if ".self_attn.k_proj." in name:
            return _unpermuted(value, self._num_kv_heads)
        return value

    def hf_config(self) -> dict[str, object]:
        """The HF LLaMA config that the metadata describes.

        Raises:
            ConversionError: a missing value, or something that this code does not compute; all of it listed.
        """
        problems = self._problems()
        if problems:
            raise ConversionError(problem_list("this GGUF file cannot be converted", problems))
        token_ids = {name: self.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _TOKEN_IDS.items()}
        hidden, heads = self._value("embedding_length"), self._value("attention.head_count")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self._infos["model.embed_tokens.weight"].shape[0],
            "hidden_size": hidden,
            "intermediate_size": self._value("feed_forward_length"),
            "num_hidden_layers": self._value("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._num_kv_heads,
            "head_dim": self._head_size,
            "hidden_act": "silu",
            "max_position_embeddings": self._value("context_length"),
            "rms_norm_eps": self._value("attention.layer_norm_rms_epsilon"),
            "rope_theta": self._value("rope.freq_base", 10_000.0),
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self._infos,
            "mlp_bias": "model.layers.0.mlp.up_proj.bias" in self._infos,
            "tie_word_embeddings": "lm_head.weight" not in self._infos,
            **token_ids,
        }

    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends an answer: end of sequence, of turn, of message."""
        ids = (self.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
        return tuple(dict.fromkeys(item for item in ids if isinstance(item, int)))

    def _value(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"llama.{key}", default)

    @property
    def _num_kv_heads(self) -> Any:
        return self._value("attention.head_count_kv", self._value("attention.head_count"))

    @property
    def _head_size(self) -> int:
        return int(self._value("attention.key_length", self._value("embedding_length") // self._heads_or_one))

    @property
    def _heads_or_one(self) -> int:
        return max(int(self._value("attention.head_count")), 1)

    def _problems(self) -> list[str]:
        missing = [f"llama.{key} is missing or not a number" for key in _NEEDED if not _is_number(self._value(key))]
        if "model.embed_tokens.weight" not in self._infos:
            missing.append("token_embd.weight is missing")
        if missing or not _is_number(self._num_kv_heads):
            return missing or ["llama.attention.head_count_kv differs between layers, which is not supported"]
        problems = [
            f"llama.{key} is set: {words} is not supported" for key, words in _REFUSED.items() if self._value(key)
        ]
        is_linear_one = self._value("rope.scaling.type") == "linear" and self._value("rope.scaling.factor", 1.0) == 1.0
        is_scaled = self._value("rope.scaling.type", "none") != "none" and not is_linear_one
        if is_scaled or "rope_freqs.weight" in self._infos:
            problems.append("the rotary embedding is scaled, which is not supported")
        sizes = {key: self._value(key, self._head_size) for key in ("rope.dimension_count", "attention.value_length")}
        return problems + [
            f"llama.{key} is {size}, must be the head size {self._head_size}"
            for key, size in sizes.items()
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
_REFUSED = {
    "attention.sliding_window": "a sliding window",
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
    size = path.stat().st_size
    return f"{path} is not a readable GGUF file: it is cut short or damaged ({size:,} bytes); fetch it again"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _hf_name(name: str) -> str:
    """HF's name of a GGUF tensor; unknown ones keep theirs and show up as surplus."""
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if block and block[2] in _BLOCK_NAMES:
        return f"model.layers.{block[1]}.{_BLOCK_NAMES[block[2]]}.{block[3]}"
    stem, _, kind = name.rpartition(".")
    return f"{_NAMES[stem]}.{kind}" if stem in _NAMES else name


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

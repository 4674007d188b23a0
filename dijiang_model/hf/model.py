"""The network under transformers' interface: packed where that is padded, its state where that has a cache of keys."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from dijiang_model.batch import PackedBatch
from dijiang_model.checkpoints.checkpoint import load_model
from dijiang_model.checkpoints.config_json import read_stored_config
from dijiang_model.hf.cache import RecurrentCache
from dijiang_model.hf.config import DiJiangConfig
from dijiang_model.hf.loading import (
    find_device,
    find_dtype,
    find_folder,
    own_memory,
    read_generation_config,
    refuse_unknown,
)
from dijiang_model.hf.padding import Packed, pack, padded
from dijiang_model.hf.saving import save
from dijiang_model.hf.steps import Steps
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.ops.training.attention import HybridAttention
from dijiang_model.segments import run_texts


class DiJiangLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # transformers has no types
    """A network of ours for transformers, made by `from_pretrained`.

    It has the network's modules under the network's names, so that its state dict is a checkpoint. Without a cache it
    computes whole texts, with gradients; with one it steps through the recurrent state, as an engine does.

    Attributes:
        network: what computes.
        steps: its steps through states.
    """

    config: DiJiangConfig
    network: DiJiangForCausalLM
    steps: Steps
    config_class = DiJiangConfig
    supports_gradient_checkpointing = True
    _is_stateful = True

    def __init__(self, config: DiJiangConfig, network: DiJiangForCausalLM | None = None) -> None:
        """
        Args:
            network: loaded and prepared.

        Raises:
            ValueError: there is none.
        """
        if network is None:
            raise ValueError(
                "a configuration has no weights: from_pretrained(FOLDER) loads a model, and `dijiang convert` makes one"
            )
        super().__init__(config)
        self.__dict__["network"] = network  # no module of its own: its parts are this model's
        self.__dict__["_modules"] = network.__dict__["_modules"]
        self.steps = Steps(network)
        self.gradient_checkpointing = False
        self.loss_type = "ForCausalLM"
        for attention in network.attentions:
            attention.linear.requires_grad_(False)
        if self._is_tied:
            self.get_input_embeddings().register_parameter("bias", None)  # as heads have it that others read
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        config: DiJiangConfig | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        generation_config: GenerationConfig | None = None,
        state_dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> "DiJiangLM":
        """Loads a model's folder, or one on the Hugging Face hub.

        Args:
            dtype: of the weights; `auto` or None: what the folder stores. The server computes in float32 on a CPU.
            device_map: one device for all of it: its name or number, `auto`, or None for the CPU.
            state_dtype: of the states, as the server's setting of that name.

        Raises:
            ModelError: the folder is damaged or of another kind.
            ValueError: an option that is not supported.
        """
        refuse_unknown(args, options)
        folder = find_folder(str(pretrained_model_name_or_path), options)
        if config is None or config.base is None:
            config = DiJiangConfig.of(read_stored_config(folder))
        config.name_or_path = str(pretrained_model_name_or_path)
        network = load_model(folder, device=find_device(device_map), dtype=find_dtype(dtype or torch_dtype, folder))
        if network.quantization is None:
            own_memory(network)
        if state_dtype != torch.float32:
            network.keep_states_in(state_dtype)
        config.dtype = network.dtype
        model = cls(config, network)
        generation_config = read_generation_config(folder, config) if generation_config is None else generation_config
        model.generation_config = generation_config
        adapter = (options.get("adapter_kwargs") or {}).get("_adapter_model_path")
        if adapter is not None:  # a folder of PEFT was named, and its base model is what is loaded here
            model.load_adapter(adapter)
        model.eval()
        return model

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        max_shard_size: int | str = "2GB",
        **options: Any,
    ) -> None:
        """Writes a folder that transformers and the server load; of what is there, only a model of ours is replaced.

        Raises:
            CheckpointError: the folder holds something else's model, or the tensors do not fit this one.
            ValueError: it is to be pushed to a hub, which is `push_to_hub`'s.
        """
        if options.get("push_to_hub"):
            raise ValueError("save_pretrained writes a folder; model.push_to_hub(NAME) uploads one")
        if not is_main_process:
            return
        save(
            Path(save_directory),
            self.config.stored,
            self.network.state_dict() if state_dict is None else state_dict,
            eos_token_ids=(*_ids(self.config.eos_token_id), *_ids(self.generation_config.eos_token_id)),
            max_shard_size=max_shard_size,
        )
        self.generation_config.save_pretrained(save_directory)

    @property
    def base_model(self) -> Callable[..., BaseModelOutputWithPast]:
        """`hidden_states`, which is what others call for the network without its head."""
        return self.hidden_states

    def hidden_states(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPast:
        """Computes what the head reads of whole texts, with gradients: [B, n, D], 0 at padding; see `forward`."""
        packed, _ = self._packed(input_ids, attention_mask, position_ids, None, use_cache=False, options=options)
        return BaseModelOutputWithPast(last_hidden_state=padded(self._whole(packed), packed.is_token))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Computes next-token logits, [B, n, vocab] fp32; those of padding are 0.

        Args:
            input_ids: [B, n]; with `past_key_values` what comes after the tokens in it.
            attention_mask: [B, tokens in the cache + n], 0 for padding, on any side.
            past_key_values: a cache of this model, moved on in place, without gradients.
            labels: [B, n], -100 where none is wanted; the loss is transformers'.
            use_cache: whether to return a cache; None: if one was given.
            logits_to_keep: so many columns from the right, or their indices; 0: all.

        Raises:
            ValueError: what this network cannot do.
        """
        given = {**options, "inputs_embeds": inputs_embeds}
        packed, cache = self._packed(
            input_ids, attention_mask, position_ids, past_key_values, use_cache=use_cache, options=given
        )
        columns = torch.arange(packed.is_token.shape[1], device=self.device)
        columns = columns[-logits_to_keep:] if isinstance(logits_to_keep, int) else columns[logits_to_keep]
        places, wanted = packed.places(columns)
        if cache is None and self._has_gradients:
            found = self._logits(self._whole(packed)[places])
        else:
            states = RecurrentCache(self.network.state_spec, len(wanted), self.device) if cache is None else cache
            found = self._stepped(packed, states, places)
        logits, loss = padded(found, wanted), None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output if return_dict is not False else output.to_tuple()

    def train(self, mode: bool = True) -> "DiJiangLM":
        """As of any module."""
        self.steps.forget()
        super().train(mode)
        return self

    def get_input_embeddings(self) -> nn.Module:
        """Returns the module that looks tokens up."""
        return self.network.get_submodule(self.network.paths.embedding)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces it."""
        self.set_submodule(self.network.paths.embedding, value)

    def get_output_embeddings(self) -> nn.Module:
        """Returns the output head, which may be the embedding."""
        return self.network.get_submodule(self.network.paths.embedding if self._is_tied else self.network.paths.head)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replaces it."""
        self.set_submodule(self.network.paths.embedding if self._is_tied else self.network.paths.head, new_embeddings)

    @property
    def _is_tied(self) -> bool:
        return self.network.config.tie_word_embeddings

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **options: Any) -> nn.Module:
        """Returns the embedding.

        Raises:
            ValueError: it has another size; the vocabulary is the teacher's, and is extended before conversion.
        """
        if new_num_tokens not in (None, self.config.vocab_size):
            raise ValueError(
                f"the vocabulary has {self.config.vocab_size} tokens and stays so: "
                "add tokens to the original model, then `dijiang convert` it"
            )
        return self.get_input_embeddings()

    def init_weights(self) -> None:
        """Does nothing: a network comes with its weights."""

    def to(self, *args: Any, **options: Any) -> "DiJiangLM":
        """Moves the model to a device.

        Raises:
            ValueError: another dtype, which is chosen when a model is loaded: parts of it stay in float32.
        """
        _, dtype, *_ = torch._C._nn._parse_to(*args, **options)
        if dtype is not None:
            self._require(dtype)
            options = {name: value for name, value in options.items() if name != "dtype"}
            args = tuple(value for value in args if not isinstance(value, torch.dtype))
        if args or options:
            super().to(*args, **options)
        return self

    def float(self) -> "DiJiangLM":
        """As `to(torch.float32)`."""
        return self._require(torch.float32)

    def half(self) -> "DiJiangLM":
        """As `to(torch.float16)`."""
        return self._require(torch.float16)

    def bfloat16(self) -> "DiJiangLM":
        """As `to(torch.bfloat16)`."""
        return self._require(torch.bfloat16)

    def double(self) -> "DiJiangLM":
        """As `to(torch.float64)`."""
        return self._require(torch.float64)

    def _require(self, dtype: torch.dtype) -> "DiJiangLM":
        if dtype != self.network.dtype:
            name = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"the weights are {self.network.dtype}; load them anew with from_pretrained(..., dtype={name!r})"
            )
        return self

    def _validate_generation_mode(self, generation_mode: GenerationMode, *others: Any) -> None:
        if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise ValueError(
                f"{generation_mode.value} is not supported: decoding is greedy or sampled (num_beams=1, no assistant)"
            )
        super()._validate_generation_mode(generation_mode, *others)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _packed(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past: Any,
        *,
        use_cache: bool | None,
        options: Mapping[str, Any],
    ) -> tuple[Packed, RecurrentCache | None]:
        """The batch without its padding, and the cache that it moves on; None: there is none."""
        if input_ids is None or options.get("inputs_embeds") is not None:
            raise ValueError("give input_ids: embeddings alone (inputs_embeds) are not supported")
        if options.get("output_attentions") or options.get("output_hidden_states"):
            raise ValueError("attention weights and hidden states are not given out")
        if past is not None and not isinstance(past, RecurrentCache):
            raise ValueError(f"past_key_values is a {type(past).__name__}, must be what this model gave out before")
        if past is None and use_cache and not self.training:
            past = RecurrentCache(self.network.state_spec, len(input_ids), self.device)
        return pack(input_ids, attention_mask, position_ids, past), past

    def _whole(self, packed: Packed) -> Tensor:
        """Texts from their first token, with gradients; [T, D]."""
        if self.network.quantization is not None:
            kind = self.network.quantization.weights
            raise ValueError(f"{kind} weights cannot be trained: load the model that they were made from")
        if not self._is_differentiable:
            raise ValueError("attention as the paper's authors released it is for inference only")
        call = self._gradient_checkpointing_func if self.gradient_checkpointing and self.training else None
        return run_texts(self.network, packed.token_ids, packed.lengths, HybridAttention(), call=call)

    def _stepped(self, packed: Packed, cache: RecurrentCache, places: Tensor) -> Tensor:
        """Moves the rows of a cache on; logits [R, vocab] of the tokens at `places`."""
        rows = torch.tensor(packed.rows, dtype=torch.int64)
        num_decode = len(packed.rows) if sum(packed.lengths) == len(packed.rows) else 0
        slots = (rows + 1).to(self.device)
        batch = PackedBatch(packed.token_ids, packed.positions, slots, packed.lengths, num_decode, places)
        found = self.steps(batch, cache.states, self._logits)
        cache.num_tokens[rows] += torch.tensor(packed.lengths, dtype=torch.int64)
        cache.num_columns += packed.is_token.shape[1]
        return found

    def _logits(self, hidden: Tensor) -> Tensor:
        """[R, D] -> [R, vocab], by the head that others may have wrapped."""
        if self._is_tied:
            return self.network.logits(hidden)
        logits: Tensor = self.get_output_embeddings()(hidden)
        return logits if logits.dtype == torch.float64 else logits.float()

    @property
    def _has_gradients(self) -> bool:
        """Whether somebody may ask for the gradients of what is computed now."""
        if not torch.is_grad_enabled():
            return False
        can_be_trained = self.network.quantization is None and self._is_differentiable
        return self.training or (can_be_trained and any(parameter.requires_grad for parameter in self.parameters()))

    @property
    def _is_differentiable(self) -> bool:
        layers = self.network.config.layers
        return all(layer.read_out == "denominator" and layer.decay == "static" for layer in layers)


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list) else () if value is None else (value,)

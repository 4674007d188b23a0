"""Our `config.json` as transformers wants it: one document, read and written as the server does."""

import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from dijiang_model.checkpoints.config_json import (
    FORMAT_VERSION,
    MODEL_TYPE,
    StoredConfig,
    parse_stored_config,
    stored_config_text,
)

_STORED = ("model_type", "format_version", "base", "dijiang")


class DiJiangConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers has no types
    """A model's configuration; made by `from_pretrained` or `of`.

    Its dimensions stand under transformers' names too (`hidden_size` ...), for what reads them there. They follow from
    `base` and `dijiang`, and changing them changes nothing.
    """

    model_type = MODEL_TYPE
    format_version: int = FORMAT_VERSION
    base: dict[str, Any] | None = None
    dijiang: dict[str, Any] | None = None
    use_cache: bool = True

    def __post_init__(self, **others: Any) -> None:
        super().__post_init__(**others)
        if self.base is None:  # transformers makes empty ones to compare with
            return
        config = self.stored.config
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        self.intermediate_size, self.num_hidden_layers = config.intermediate_size, config.num_layers
        self.num_attention_heads, self.num_key_value_heads = config.num_heads, config.num_kv_heads
        self.head_dim, self.max_position_embeddings = config.head_size, config.max_position_embeddings
        self.tie_word_embeddings = config.tie_word_embeddings
        self.bos_token_id, self.pad_token_id = config.bos_token_id, config.pad_token_id
        self.eos_token_id = list(config.eos_token_ids) or None

    @classmethod
    def of(cls, stored: StoredConfig) -> "DiJiangConfig":
        """Returns the same configuration in this form.

        Raises:
            ConfigError: it contradicts itself.
        """
        return cls(**json.loads(stored_config_text(stored)))

    @property
    def stored(self) -> StoredConfig:
        """The configuration as the rest of the program knows it.

        Raises:
            ConfigError: unsupported or contradictory values, all of them listed.
        """
        return parse_stored_config(self._document())

    def to_dict(self) -> dict[str, Any]:
        """Returns what `config.json` says, and no more."""
        return {**self._document(), "architectures": ["DiJiangLM"]}

    def to_diff_dict(self) -> dict[str, Any]:
        """Returns the same: every value is written."""
        return self.to_dict()

    def _document(self) -> Mapping[str, Any]:
        return {name: getattr(self, name) for name in _STORED}

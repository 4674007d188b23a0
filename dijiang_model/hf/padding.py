"""Padded batches of transformers as packed ones: padding takes part in nothing."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dijiang_model.hf.cache import RecurrentCache


@dataclass(frozen=True, slots=True)
class Packed:
    """The tokens of a padded batch [B, n], row after row, T in all.

    Attributes:
        is_token: [B, n] bool; False: padding.
        token_ids, positions: [T] int64; each position counts its row's tokens from 0, padding left out.
        rows: of the batch that have a token.
        lengths: tokens of each of those.
    """

    is_token: Tensor
    token_ids: Tensor
    positions: Tensor
    rows: tuple[int, ...]
    lengths: tuple[int, ...]

    def places(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Finds the tokens in some columns [c] of the batch.

        Returns:
            [R] int64, which of the T they are, and [B, c] bool, where they stand.
        """
        number = (self.is_token.flatten().cumsum(0) - 1).view(self.is_token.shape)
        wanted = self.is_token[:, columns]
        return number[:, columns][wanted], wanted


def padded(rows: Tensor, is_token: Tensor) -> Tensor:
    """[R, D] and where they stand, [B, c] -> [B, c, D], 0 elsewhere."""
    return rows.new_zeros((*is_token.shape, rows.shape[-1])).masked_scatter(is_token[..., None], rows)


def pack(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: RecurrentCache | None
) -> Packed:
    """Takes the padding out of a batch.

    Args:
        input_ids: [B, n] int64.
        attention_mask: [B, tokens in the cache + n], 0 for padding; None: there is none.
        position_ids: [B or 1, n]; only those that count a row's tokens are taken.
        cache: what was fed before.

    Raises:
        ValueError: shapes that do not fit, a mask that says other padding than was fed, positions of another kind.
    """
    num_rows, num_columns = input_ids.shape
    past = 0 if cache is None else cache.num_columns
    seen = torch.zeros(num_rows, dtype=torch.int64) if cache is None else cache.num_tokens
    if len(seen) != num_rows:
        raise ValueError(f"input_ids has {num_rows} rows, past_key_values {len(seen)}")
    is_token = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        if attention_mask.shape != (num_rows, past + num_columns):
            raise ValueError(
                f"attention_mask has the shape {list(attention_mask.shape)}, must be {[num_rows, past + num_columns]}: "
                "a 1 or 0 for each token, those in past_key_values included"
            )
        is_token = attention_mask[:, past:].to(device=input_ids.device, dtype=torch.bool)
        if past > 0 and not torch.equal(attention_mask[:, :past].bool().sum(1).cpu(), seen):
            raise ValueError("attention_mask calls other tokens padding than it did when past_key_values was fed")
    positions = seen.to(input_ids.device)[:, None] + is_token.cumsum(1) - 1
    if position_ids is not None and not bool(((position_ids == positions) | ~is_token).all()):
        raise ValueError(
            "position_ids must count the tokens of each row from 0, padding left out; several texts in one row "
            "(packing, padding-free batches) are not supported"
        )
    counts = is_token.sum(1).tolist()
    return Packed(
        is_token,
        input_ids[is_token],
        positions[is_token],
        tuple(row for row, count in enumerate(counts) if count > 0),
        tuple(count for count in counts if count > 0),
    )

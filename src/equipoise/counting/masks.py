"""Fits masks and sequence ids to the tokens of one router call."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.errors import EquipoiseError

MTP_DEPTH = 1  # a multi-token-prediction layer sees rows one token shorter


def is_mask_of(mask: Tensor, num_tokens: int) -> bool:
    """Whether a padding mask can belong to this many tokens: to all, or to rows that are ``MTP_DEPTH`` shorter."""
    rows, length = mask.shape
    return num_tokens % max(rows, 1) == 0 and 0 <= length - num_tokens // max(rows, 1) <= MTP_DEPTH


def fit_mask(
    mask: Tensor | None, num_tokens: int, rows: int, layer: str, device: torch.device
) -> Float[Tensor, " tokens"] | None:
    """The mask of these tokens, 0 or 1, a copy. A longer 2-D mask covers a cached prefix too: its end is taken."""
    if mask is None:
        return None
    has_rows = mask.dim() == 2 and rows in (0, mask.shape[0])
    if has_rows and mask.numel() > num_tokens and num_tokens % mask.shape[0] == 0:
        mask = mask[:, -(num_tokens // mask.shape[0]) :]
    if mask.numel() != num_tokens:
        raise EquipoiseError(
            f"the mask must hold one number per token that {layer} routes: got shape {tuple(mask.shape)} for "
            f"{num_tokens} tokens. Pass the mask of these tokens with balance.token_mask(mask)."
        )
    if mask.dim() == 2 and 1 < rows == mask.shape[1] != mask.shape[0] > 1:
        raise EquipoiseError(
            f"the mask must have a row for each of the {rows} rows of the batch: got shape {tuple(mask.shape)}, which "
            "has them as columns. Pass mask.T, in the order in which the tokens are routed."
        )
    return (mask.to(device).reshape(-1) != 0).float()


def number_sequences(
    sequence_ids: Tensor | None, rows: int, num_tokens: int, device: torch.device
) -> tuple[Int[Tensor, " tokens"] | None, int]:
    """Numbers the sequences 0, 1, ...: rows of the batch, or wherever ``sequence_ids`` change.

    Also returns an upper bound of how many there are, known without looking at the data.
    """
    if sequence_ids is not None:
        ids = sequence_ids.reshape(1, -1) if sequence_ids.dim() == 1 else sequence_ids
        starts = torch.ones_like(ids, dtype=torch.bool)
        starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
        if starts.numel() != num_tokens:
            raise EquipoiseError(
                f"sequence_ids must hold one number per token: got shape {tuple(sequence_ids.shape)} for {num_tokens} "
                "tokens. Pass those of these tokens with balance.token_mask(mask, sequence_ids)."
            )
        return starts.reshape(-1).cumsum(0).sub_(1).to(device), num_tokens
    if num_tokens == 0:
        return torch.zeros(0, dtype=torch.int64, device=device), 0
    if rows <= 0 or num_tokens % rows:
        return None, 0
    return torch.arange(num_tokens, device=device) // (num_tokens // rows), rows

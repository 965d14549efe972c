"""Which tokens of a micro-batch of torchtitan count, and what its forward is told of them."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

__all__ = ["MicroBatch", "counted_tokens", "documents"]

IGNORE_INDEX = -100  # torchtitan.components.loss.IGNORE_INDEX, the label of a token without a loss


@dataclass(frozen=True)
class MicroBatch:
    """What the routers of one micro-batch need to know, for the part of the tokens that this rank routes.

    No tree of tensors to torch: a stage of a pipeline takes none of them for its inputs.

    Attributes:
        mask: which tokens count.
        sequence_ids: which document each token is in; None if no loss needs it.
        mtp_masks: the same as ``mask`` for the layers that predict 2, 3, ... tokens ahead.
        weight: the share of this micro-batch in the tokens of the step, over all ranks.
    """

    mask: Bool[Tensor, "batch sequence"]
    sequence_ids: Int[Tensor, "batch sequence"] | None
    mtp_masks: tuple[Bool[Tensor, "batch sequence"], ...]
    weight: Tensor


def documents(labels: Int[Tensor, "batch sequence"], positions: Tensor | None) -> Int[Tensor, "batch sequence"]:
    """Numbers the documents of each row. One begins wherever the positions do not go on by one."""
    if positions is None or positions.shape != labels.shape:
        return torch.zeros_like(labels)
    starts = torch.zeros_like(labels)
    starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    return starts.cumsum(1)


def counted_tokens(labels: Int[Tensor, "batch sequence"], positions: Tensor | None) -> Bool[Tensor, "batch sequence"]:
    """Which tokens count: those that have a label, or that a label follows in their document.

    So a prompt counts, whose labels are ignored, and padding does not: nothing that is learned depends on it. With
    ``documents`` d, counted_t = any(labels_u != IGNORE_INDEX for u >= t with d_u = d_t).
    """
    has_label, document = (labels != IGNORE_INDEX).long(), documents(labels, positions)
    labels_so_far = has_label.cumsum(1)
    at_the_end = torch.zeros_like(labels).scatter_reduce(1, document, labels_so_far, "amax").gather(1, document)
    return at_the_end > labels_so_far - has_label


def shifted_labels(labels: Int[Tensor, "batch sequence"], positions: Tensor | None, shift: int) -> Any:
    """The labels of a layer that predicts ``shift`` tokens further. None beyond the end of a document."""
    further = torch.full_like(labels, IGNORE_INDEX)
    document = documents(labels, positions)
    stays = document[:, shift:] == document[:, :-shift]
    further[:, :-shift] = labels[:, shift:].where(stays, IGNORE_INDEX)
    return further

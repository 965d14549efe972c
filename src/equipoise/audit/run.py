"""text by domain -> batches of token ids -> forwards of a model that is watched.

Memory does not grow with the text: one domain's documents at a time, one batch of tokens, sums.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from equipoise.errors import EquipoiseError, UsageError
from equipoise.experts.result import Audited
from equipoise.experts.watch import choose_vocabulary, watching
from equipoise.lab.text import stream_text

__all__ = ["Progress", "audit_model"]


class Progress(Protocol):
    """Who is told how it goes on."""

    def say(self, text: str) -> None: ...

    def done(self, tokens: int, of: int) -> None: ...


def _rows(documents: Sequence[str], encode: Callable[[str], list[int]], end: int | None, length: int) -> Iterator[Any]:
    """Rows of token ids, documents one after another with ``end`` between them; a last part of a row is dropped."""
    ids = chain.from_iterable([*encode(document), *([] if end is None else [end])] for document in documents)
    while len(row := list(islice(ids, length))) == length:
        yield np.array(row, np.int64)


def audit_model(
    model: nn.Module,
    encode: Callable[[str], list[int]],
    data: str | Path | None,
    progress: Progress,
    *,
    tokens: int = 100_000,
    length: int = 512,
    batch: int = 8,
    end: int | None = None,
) -> Audited:
    """Runs ``model`` on up to ``tokens`` tokens of ``data``, shared evenly by its domains, and counts at its routers.

    Args:
        encode: text to token ids, of the model's own tokenizer.
        data: as ``equipoise train --data``; None is the packaged corpus. Documents are taken in the order of their
            hash, in which the lab holds out the first.
        tokens, length, batch: in all; of a row; rows of a forward.
        end: the token between documents.

    A domain whose text does not fill its share is read to its end; one that fills no row is left out and named in
    ``notes``. Raises ``UsageError`` where nothing is left, ``EquipoiseError`` for a model without routers.
    """
    if min(tokens, length, batch) < 1:
        raise UsageError(f"tokens, length and batch must be at least 1: got {tokens}, {length} and {batch}.")
    domains = list(stream_text(data, progress.say))
    share = max(1, tokens // len(domains) // length)  # rows of a domain
    beginnings = (islice(_rows(read(), encode, end, length), share) for _, read in domains)
    vocabulary, notes = choose_vocabulary(model, beginnings)
    nats: dict[str, float] = {}
    was_training, device, done = model.training, next(model.parameters()).device, 0
    model.eval()
    try:
        with torch.no_grad(), watching(model, [name for name, _ in domains], vocabulary) as watched:
            for watched.domain, (name, read) in enumerate(domains):
                progress.say(f"{name}: {watched.domain + 1} of {len(domains)} domains")
                total, num_rows = 0.0, 0
                rows = islice(_rows(read(), encode, end, length), share)
                while part := list(islice(rows, batch)):
                    ids = torch.from_numpy(np.stack(part)).to(device)
                    total += float(_mean_nats(model, ids)) * len(part)
                    num_rows += len(part)
                    done += ids.numel()
                    progress.done(done, share * length * len(domains))
                if num_rows:
                    nats[name] = total / num_rows
                else:
                    notes.append(f"{name} fills no row of {length} tokens: it is left out")
    finally:
        model.train(was_training)
    if not nats:
        raise UsageError(
            f"the text must fill a row of {length} tokens in some domain: it fills none. Give more text, or take "
            "shorter rows."
        )
    return Audited(watched, nats, tuple(notes))


def _mean_nats(model: nn.Module, ids: Int[Tensor, "rows length"]) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    if not logits.isfinite().all():
        raise EquipoiseError(
            "the model must give finite logits: it gives nan or infinity. The checkpoint is damaged, or needs another "
            "dtype."
        )
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

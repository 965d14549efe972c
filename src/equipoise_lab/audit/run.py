"""text by domain -> batches of token ids -> forwards of a model that is watched.

Memory does not grow with the text: one domain's documents at a time, one batch of tokens, sums.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from equipoise.errors import EquipoiseError, UsageError
from equipoise_lab.experts.result import Audited
from equipoise_lab.experts.watch import Watched, choose_vocabulary, watching
from equipoise_lab.train.levels import levels_of
from equipoise_lab.train.text import stream_text

__all__ = ["CutShort", "Progress", "audit_model"]

SAMPLE = 20_000  # characters of a domain, by which its script is known


class Progress(Protocol):
    """Who is told how it goes on."""

    def say(self, text: str) -> None: ...

    def done(self, tokens: int, of: int) -> None: ...


class CutShort(Exception):
    """The text was not run to its end: ``audited`` is what was counted until then, ``reason`` what ended it."""

    def __init__(self, audited: Audited, reason: BaseException):
        super().__init__(str(reason))
        self.audited, self.reason = audited, reason


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
        tokens, length, batch: in all, but a row of each domain at least; of a row; rows of a forward.
        end: the token between documents.

    A domain whose text does not fill its share is read to its end; one that fills no row is left out and named in
    ``notes``. Raises ``UsageError`` where nothing is left, ``EquipoiseError`` for a model without routers, and
    ``CutShort`` where an error or Ctrl-C comes after the first batch.
    """
    if min(tokens, length - 1, batch) < 1:
        raise UsageError(f"tokens and batch must be at least 1, length 2: got {tokens}, {batch} and {length}.")
    domains = list(stream_text(data, progress.say))
    levels_of(data, {name: "" for name, _ in domains})  # an error now, not after the work
    share = max(1, tokens // len(domains) // length)  # rows of a domain
    beginnings = (islice(_rows(read(), encode, end, length), share) for _, read in domains)
    vocabulary, notes = choose_vocabulary(model, beginnings)
    nats: dict[str, float] = {}
    samples: dict[str, str] = {}
    was_training, device, done, of = model.training, next(model.parameters()).device, 0, share * length * len(domains)
    model.eval()
    losses: list[float] = []  # of the batches of a domain
    measured = model.register_forward_hook(  # before the hooks that count: a batch that gives nan is not counted
        lambda module, args, kwargs, output: losses.append(_mean_nats(output.logits, kwargs["input_ids"])),
        with_kwargs=True,
    )
    try:
        with torch.no_grad(), watching(model, [name for name, _ in domains], vocabulary) as watched:
            try:
                for watched.domain, (name, read) in enumerate(domains):
                    progress.say(f"{name}: {watched.domain + 1} of {len(domains)} domains")
                    total, num_rows = 0.0, 0
                    documents = read()
                    samples[name] = "".join(islice(documents, 3))[:SAMPLE]
                    rows = islice(_rows(documents, encode, end, length), share)
                    while part := list(islice(rows, batch)):
                        _forward(model, torch.from_numpy(np.stack(part)), device)
                        total += losses.pop() * len(part)
                        num_rows, done = num_rows + len(part), done + len(part) * length
                        nats[name] = total / num_rows
                        progress.done(done, of)
                    if not num_rows:
                        notes.append(f"{name} fills no row of {length} tokens: it is left out")
            except BaseException as error:
                if not watched.num_tokens.any():
                    raise
                notes.append(_cut_short(watched, of, error))
                raise CutShort(Audited(watched, nats, tuple(notes), False, samples), error) from error
    finally:
        measured.remove()
        model.train(was_training)
    if not nats:
        raise UsageError(
            f"the text must fill a row of {length} tokens in some domain: it fills none. Give more text, or take "
            "a smaller --sequence-length."
        )
    return Audited(watched, nats, tuple(notes), samples=samples)


def _cut_short(watched: Watched, of: int, error: BaseException) -> str:
    """What to know of counts that are not of the whole text."""
    reason = "it was stopped" if isinstance(error, KeyboardInterrupt) else _first_line(error)
    assert watched.domain is not None
    later = watched.domains[watched.domain + 1 :]
    return (
        f"not complete: ended within {watched.domains[watched.domain]}, after {int(watched.num_tokens.sum()):,} of "
        f"{of:,} tokens{', ' + ', '.join(later) + ' not begun' if later else ''}: {reason}"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _mean_nats(logits: Float[Tensor, "rows length vocabulary"], ids: Int[Tensor, "rows length"]) -> float:
    """Mean cross-entropy of the next token. Row by row: all at once would take the memory of the logits again."""
    total = sum(
        float(nn.functional.cross_entropy(row[:-1].float(), targets[1:], reduction="sum"))
        for row, targets in zip(logits, ids, strict=True)
    )
    nats = total / (len(ids) * (ids.shape[1] - 1))
    if not math.isfinite(nats):
        raise EquipoiseError(
            "the model must give finite logits: it gives nan or infinity. The checkpoint is damaged, or needs another "
            "dtype."
        )
    return nats


def _forward(model: nn.Module, ids: Int[Tensor, "rows length"], device: torch.device) -> None:
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    most = getattr(embedding, "num_embeddings", None)
    if most is not None and int(ids.max()) >= most:
        raise EquipoiseError(
            f"the tokenizer must be that of the model: it gives the token id {int(ids.max())}, and the model knows "
            f"{most} tokens. Put the model's own tokenizer.json beside it."
        )
    try:
        model(input_ids=ids.to(device), use_cache=False)
    except EquipoiseError:
        raise
    except Exception as error:  # whatever a model makes of it: no memory, a length that it does not take
        rows, length = ids.shape
        raise EquipoiseError(
            f"the model must run on {rows} rows of {length} tokens: it says {type(error).__name__}: "
            f"{_first_line(error).rstrip('.')}. Take a smaller --batch or --sequence-length."
        ) from error

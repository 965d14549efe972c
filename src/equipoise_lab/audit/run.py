"""text by domain -> batches of token ids -> forwards of a watched model -> AuditData.

Memory does not grow with the text: it holds one domain's documents, one batch of tokens, and sums.
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
from equipoise_lab.experts.result import AuditData
from equipoise_lab.experts.watch import RouterCounts, choose_vocabulary, watching
from equipoise_lab.train.levels import levels_of
from equipoise_lab.train.text import stream_text
from equipoise_lab.train.text_files import TEXT_KEY

__all__ = ["IncompleteAudit", "Progress", "audit_model"]

SAMPLE_CHARACTERS = 20_000  # of a domain: its script is recognised from these


class Progress(Protocol):
    """Shows how far an audit has come."""

    def say(self, text: str, /) -> None: ...

    def done(self, tokens: int, total: int, /) -> None: ...


class IncompleteAudit(Exception):
    """``reason`` ended an audit before the end of its text. ``data`` is what it measured until then."""

    def __init__(self, data: AuditData, reason: BaseException):
        super().__init__(str(reason))
        self.data, self.reason = data, reason


def _rows(documents: Sequence[str], encode: Callable[[str], list[int]], end: int | None, length: int) -> Iterator[Any]:
    """Rows of token ids from all documents, separated by ``end``. An incomplete last row is dropped."""
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
    text_key: str = TEXT_KEY,
) -> AuditData:
    """Runs ``model`` on up to ``tokens`` tokens of ``data``, split evenly over domains, and counts at its routers.

    Args:
        encode: The model's own tokenizer, text to token ids.
        data: As in ``equipoise train --data``. None is the packaged corpus. Documents come in the order of their hash.
            The lab holds out the first of them for evaluation.
        tokens: In all, but at least one row of each domain.
        length: Tokens a row.
        batch: Rows a forward.
        end: The token id between documents.
        text_key: The field or column of a row that holds its text.

    A domain with less text than its share is read to its end. One that fills no row is left out and named in ``notes``.

    Raises ``UsageError`` if no domain fills a row, ``EquipoiseError`` for a model without known routers, and
    ``IncompleteAudit`` if an error or Ctrl-C comes after the first batch.
    """
    if min(tokens, length - 1, batch) < 1:
        raise UsageError(f"tokens and batch must be at least 1, length 2: got {tokens}, {batch} and {length}.")
    domains = list(stream_text(data, progress.say, text_key))
    levels_of(data, {name: "" for name, _ in domains})  # fail before the work if the levels are wrong
    rows_per_domain = max(1, tokens // len(domains) // length)
    total_tokens = rows_per_domain * length * len(domains)
    beginnings = (islice(_rows(read(), encode, end, length), rows_per_domain) for _, read in domains)
    vocabulary, notes = choose_vocabulary(model, beginnings)
    nats: dict[str, float] = {}
    samples: dict[str, str] = {}
    was_training, device, tokens_done = model.training, next(model.parameters()).device, 0
    model.eval()
    losses: list[float] = []  # of the last batch
    loss_hook = model.register_forward_hook(  # before the counting hooks: a batch that gives nan is not counted
        lambda module, args, kwargs, output: losses.append(_mean_nats(output.logits, kwargs["input_ids"])),
        with_kwargs=True,
    )
    try:
        with torch.no_grad(), watching(model, [name for name, _ in domains], vocabulary) as counts:
            try:
                for counts.domain, (name, read) in enumerate(domains):
                    progress.say(f"{name}: {counts.domain + 1} of {len(domains)} domains")
                    total_nats, num_rows = 0.0, 0
                    documents = read()
                    samples[name] = "".join(islice(documents, 3))[:SAMPLE_CHARACTERS]
                    rows = islice(_rows(documents, encode, end, length), rows_per_domain)
                    while batch_rows := list(islice(rows, batch)):
                        _forward(model, torch.from_numpy(np.stack(batch_rows)), device)
                        total_nats += losses.pop() * len(batch_rows)
                        num_rows += len(batch_rows)
                        tokens_done += len(batch_rows) * length
                        nats[name] = total_nats / num_rows
                        progress.done(tokens_done, total_tokens)
                    if not num_rows:
                        notes.append(f"{name} fills no row of {length} tokens: it is left out")
            except BaseException as error:
                if not counts.num_tokens.any():
                    raise
                notes.append(_incomplete_note(counts, total_tokens, error))
                raise IncompleteAudit(AuditData(counts, nats, tuple(notes), False, samples), error) from error
    finally:
        loss_hook.remove()
        model.train(was_training)
    if not nats:
        raise UsageError(
            f"the text must fill a row of {length} tokens in at least one domain: it fills none. Give more text, or "
            "use a smaller --sequence-length."
        )
    return AuditData(counts, nats, tuple(notes), samples=samples)


def _incomplete_note(counts: RouterCounts, total_tokens: int, error: BaseException) -> str:
    reason = "it was stopped" if isinstance(error, KeyboardInterrupt) else _first_line(error)
    assert counts.domain is not None
    later = counts.domains[counts.domain + 1 :]
    not_begun = f" ({', '.join(later)} not begun)" if later else ""
    return (
        f"incomplete: ended in {counts.domains[counts.domain]} after {int(counts.num_tokens.sum()):,} of "
        f"{total_tokens:,} tokens{not_begun}: {reason}"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _mean_nats(logits: Float[Tensor, "rows length vocabulary"], ids: Int[Tensor, "rows length"]) -> float:
    """Mean cross-entropy of the next token. Row by row, because all rows at once need a second copy of the logits."""
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
    vocabulary_size = getattr(embedding, "num_embeddings", None)
    if vocabulary_size is not None and int(ids.max()) >= vocabulary_size:
        raise EquipoiseError(
            f"the tokenizer must belong to the model: it gives token id {int(ids.max())}, but the model has only "
            f"{vocabulary_size} tokens. Put the model's own tokenizer.json beside it."
        )
    try:
        model(input_ids=ids.to(device), use_cache=False)
    except EquipoiseError:
        raise
    except Exception as error:  # a model raises anything: out of memory, a length that it does not support
        rows, length = ids.shape
        raise EquipoiseError(
            f"the model must run on {rows} rows of {length} tokens: it raises {type(error).__name__}: "
            f"{_first_line(error).rstrip('.')}. Use a smaller --batch or --sequence-length."
        ) from error

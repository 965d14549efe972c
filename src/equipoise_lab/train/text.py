"""Reads the text of the lab and decides which documents are held out.

    corpus, folder, file or data set  ->  documents by domain  ->  hash order  ->  (held out | training text)

The split depends on the text alone, not on the file order or a seed. So everyone who reads the same documents holds out
the same ones. It needs token counts: :mod:`equipoise_lab.train.data` tokenises between :func:`in_hash_order` and
:func:`count_held_out`.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from equipoise_lab.train.location import check_location, hub_name, local_path
from equipoise_lab.train.text_files import TEXT_KEY, File, find_files, read_files
from equipoise_lab.train.text_problems import Problem, Problems, Skipped

__all__ = [
    "HELD_OUT_TOKENS",
    "Text",
    "count_held_out",
    "find_text",
    "in_hash_order",
    "max_held_out",
    "stream_text",
    "without_copies",
]

HELD_OUT_SHARE = 20  # one byte in 20 is held out,
HELD_OUT_TOKENS = 20_000  # and at least this many tokens (selection and test together),
MAX_HELD_OUT_SHARE = 4  # but at most one byte in 4
MIN_DOCUMENTS = 4  # one for selection, one for test, and more than one to train on

Documents = dict[str, list[str]]
Progress = Callable[[str], None]


class Text(NamedTuple):
    """Text that was located but not read yet."""

    where: str
    identity: tuple[tuple[str, int, str], ...]  # for each source: name, size in bytes, blake2b of the content
    read: Callable[[Progress, Progress], Documents]  # by domain, sorted; the second one gets notes of what is left out


def find_text(data: str | Path | None, progress: Progress, text_key: str = TEXT_KEY) -> Text:
    """Finds the text of ``data``: None or ``"corpus"`` (the packaged corpus), a folder, a file, or ``"hf:NAME"``.

    A folder holds one file or one sub-folder per domain. A text file directly in the folder holds documents separated
    by blank lines; in a sub-folder it is one document. ``.jsonl``, ``.parquet``, ``.csv`` and ``.tsv`` hold a document
    a row, in the field ``text_key``. ``hf:NAME`` is loaded with the library ``datasets``.
    """
    check_location(data)
    path, name = local_path(data), hub_name(data)
    if name is not None:
        progress(f"loading {data} with the library datasets")  # said first: offline, it tries for half a minute
        documents = _load_data_set(name, text_key)
        identity = tuple((name, *_digest_of_documents(texts)) for name, texts in documents.items())
        return Text(str(data), identity, lambda progress, note: documents)
    domains = _find_files(path, text_key, progress)
    files = {file.name: file.path for files in domains.values() for file in files}
    problems, sources = Problems(), list[tuple[str, int, str]]()
    for file_name, file_path in sorted(files.items()):
        with problems.collect():
            sources.append((file_name, *_size_and_digest(file_path)))
    problems.raise_error()
    return Text(str(path), tuple(sources), partial(_read_domains, domains, text_key))


def _load_data_set(name: str, text_key: str) -> Documents:
    from equipoise_lab.train.data_set import load_data_set

    return load_data_set(name, text_key)


def stream_text(
    data: str | Path | None, progress: Progress, text_key: str = TEXT_KEY
) -> Iterator[tuple[str, Callable[[], list[str]]]]:
    """Like ``find_text``, but yields each domain's name and a function that reads its documents, in hash order.

    A domain is read when its function is called, so only one domain needs to be in memory. Whether every file can be
    opened is checked at the start. ``progress`` gets notes of what is skipped.
    """
    check_location(data)
    if hub_name(data) is not None:
        for domain, documents in find_text(data, progress, text_key).read(progress, progress).items():
            yield domain, partial(in_hash_order, documents)
        return
    domains = _find_files(local_path(data), text_key, progress)
    said = set[str]()
    for domain, files in domains.items():
        yield domain, partial(_read_in_hash_order, files, text_key, progress, said)


def _find_files(path: Path, text_key: str, progress: Progress) -> dict[str, list[File]]:
    domains, skipped = find_files(path, text_key)
    if (note := skipped.note()) is not None:
        progress(note)
    return domains


def _read_in_hash_order(files: Sequence[File], text_key: str, progress: Progress, said: set[str]) -> list[str]:
    problems, skipped = Problems(), Skipped()
    documents = in_hash_order(read_files(files, text_key, problems, skipped))
    problems.raise_error()
    note = skipped.note()
    if note is not None and note not in said:  # a domain may be read twice
        said.add(note)
        progress(note)
    return documents


def _read_domains(domains: dict[str, list[File]], text_key: str, progress: Progress, note: Progress) -> Documents:
    documents, problems, skipped = {}, Problems(), Skipped()
    for number, (domain, files) in enumerate(domains.items(), start=1):
        progress(f"reading {number} of {len(domains)} domains")
        documents[domain] = read_files(files, text_key, problems, skipped)
    problems.raise_error()
    if (line := skipped.note()) is not None:
        note(line)
    return documents


def _size_and_digest(path: Path) -> tuple[int, str]:
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "blake2b").hexdigest()
            return os.fstat(file.fileno()).st_size, digest
    except OSError as error:
        raise Problem("Text must be readable", f"{path}: {error.strerror}", "Check its permissions.") from None


def _digest_of_documents(documents: Sequence[str]) -> tuple[int, str]:
    digest, size = hashlib.blake2b(), 0
    for document in documents:
        packed = document.encode()
        digest.update(f"{len(packed)}:".encode() + packed)
        size += len(packed)
    return size, digest.hexdigest()


def in_hash_order(documents: Iterable[str]) -> list[str]:
    """The distinct documents, ordered by the blake2b of their text. Documents without text are left out.

    Copies are removed, even if they differ in white space at their ends. Otherwise one copy could be trained on and
    another one held out.
    """
    ordered = sorted(set(documents), key=lambda document: hashlib.blake2b(document.encode()).digest())
    return without_copies(ordered, {copy_key("")})


def copy_key(document: str) -> bytes:
    """A key that is equal for documents that only differ in white space at their ends."""
    return hashlib.blake2b(document.strip().encode(), digest_size=16).digest()


def without_copies(documents: Iterable[str], seen: set[bytes]) -> list[str]:
    """The documents with a key that is not in ``seen`` yet, in order. Adds their keys to ``seen``."""
    distinct = []
    for document in documents:
        if (key := copy_key(document)) not in seen:
            seen.add(key)
            distinct.append(document)
    return distinct


def max_held_out(num_bytes: Sequence[int]) -> int:
    """How many documents can be held out at most: a quarter of the bytes, but at least two documents.

    ``num_bytes`` are the sizes of the documents in hash order.

    >>> max_held_out([10] * 20)
    5
    >>> max_held_out([10] * 4)
    2
    """
    return max(2, _count_until(num_bytes, sum(num_bytes) // MAX_HELD_OUT_SHARE + 1) - 1)


def count_held_out(num_bytes: Sequence[int], num_tokens: Sequence[int]) -> int:
    """How many documents are held out. Arguments: bytes and tokens of each document, in hash order.

    Documents are taken from the front until they reach 5 % of the bytes and 20,000 tokens, but at most
    :func:`max_held_out`. They then alternate: selection, test, selection, ...

    >>> count_held_out([10] * 100, [5000] * 100)
    5
    """
    share = -(-sum(num_bytes) // HELD_OUT_SHARE)  # rounded up
    enough = max(2, _count_until(num_bytes, share), _count_until(num_tokens, HELD_OUT_TOKENS))
    return min(enough, max_held_out(num_bytes))


def _count_until(sizes: Sequence[int], goal: int) -> int:
    total = 0
    for count, size in enumerate(sizes, start=1):
        total += size
        if total >= goal:
            return count
    return len(sizes)

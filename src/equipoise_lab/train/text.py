"""Reads the text of the lab and decides which documents are held out.

    corpus, folder, file or data set name  ->  documents by domain  ->  hash order  ->  (held out | training text)

The split depends on the text alone, not on the file order or a seed. So everyone who reads the same documents holds out
the same ones. It needs token counts: :mod:`equipoise_lab.train.data` tokenises between :func:`in_hash_order` and
:func:`count_held_out`.
"""

import hashlib
import json
import lzma
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from equipoise.errors import EquipoiseError, UsageError

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

CORPUS = Path(__file__).parents[1] / "corpus"
LEVELS_FILE = "levels.json"  # groups of domains: see equipoise_lab.train.levels
KINDS = (".txt", ".jsonl", ".parquet")
FORMS = "one file or one sub-folder per domain: .txt, .jsonl or .parquet, each optionally .xz"
PIECE = 2**20  # bytes
HELD_OUT_SHARE = 20  # one byte in 20 is held out,
HELD_OUT_TOKENS = 20_000  # and at least this many tokens (selection and test together),
MAX_HELD_OUT_SHARE = 4  # but at most one byte in 4
MAX_BYTES = 2**30  # of the text of one file: a few KB of .xz or .parquet can unfold to any size
MAX_LINE = 2**27  # characters of a line of .jsonl: as objects they need up to fifty times the memory
MIN_DOCUMENTS = 4  # one for selection, one for test, and more than one to train on

Documents = dict[str, list[str]]
Progress = Callable[[str], None]


class Text(NamedTuple):
    """Text that was located but not read yet."""

    where: str
    identity: tuple[tuple[str, int, str], ...]  # for each source: name, size in bytes, blake2b of the content
    read: Callable[[Progress], Documents]  # documents by domain, domains sorted


class _File(NamedTuple):
    path: Path
    name: str  # path relative to the data folder
    is_one_document: bool  # a .txt in the sub-folder of a domain


def find_text(data: str | Path | None, progress: Progress) -> Text:
    """Finds the text of ``data``: None or ``"corpus"`` (the packaged corpus), a folder, a file, or a data set.

    A folder holds one file or one sub-folder per domain. A ``.txt`` directly in the folder holds documents separated by
    blank lines; in a sub-folder it is one document. ``.jsonl`` and ``.parquet`` hold one document per row, in the field
    ``text``. A name that is neither file nor folder is loaded with the library ``datasets``.
    """
    path = CORPUS if data is None or data == "corpus" else Path(data).expanduser()
    if path.exists():
        domains = _find_domains(path)
        files = sorted({file.name: file for files in domains.values() for file in files}.values(), key=lambda f: f.name)
        identity = tuple((file.name, *_size_and_digest(file.path)) for file in files)
        return Text(str(path), identity, lambda progress: _read_domains(domains, progress))
    if isinstance(data, str) and _looks_like_dataset(data):
        # Say so first: offline, the library tries for half a minute.
        progress(f"{data} is no file or folder here: loading it with the library datasets")
        documents = _load_dataset(data)
        identity = tuple((name, *_digest_of_documents(texts)) for name, texts in documents.items())
        return Text(data, identity, lambda _: documents)
    raise UsageError(
        f"The text must be a folder, a file, or a data set's name (owner/name): {path} does not exist. Check the path, "
        "or leave the option out to use the packaged corpus."
    )


def stream_text(data: str | Path | None, progress: Progress) -> Iterator[tuple[str, Callable[[], list[str]]]]:
    """Like ``find_text``, but yields each domain's name and a function that reads its documents, in hash order.

    A domain is read when its function is called, so only one domain needs to be in memory. Whether every file can be
    opened is checked at the start.
    """
    path = CORPUS if data is None or data == "corpus" else Path(data).expanduser()
    if not path.exists():
        for domain, documents in find_text(data, progress).read(progress).items():
            yield domain, partial(in_hash_order, documents)
        return
    domains = _find_domains(path)
    for file in (file for files in domains.values() for file in files):
        _check_opens(file.path)
    for domain, files in domains.items():
        yield domain, partial(_read_in_hash_order, files)


def _check_opens(path: Path) -> None:
    try:
        with path.open("rb") as opened:
            if opened.read(1):
                return
    except OSError as error:
        raise _unreadable(path, error) from None
    raise _empty(path)


def _read_in_hash_order(files: Sequence[_File]) -> list[str]:
    return in_hash_order(document for file in files for document in _read(file))


def in_hash_order(documents: Iterable[str]) -> list[str]:
    """The distinct documents, ordered by the blake2b of their text. Documents without text are left out.

    Copies are removed, even if they differ in white space at their ends. Otherwise one copy could be trained on and
    another one held out.
    """
    ordered = sorted(set(documents), key=lambda document: hashlib.blake2b(document.encode()).digest())
    return without_copies(ordered, {text_key("")})


def text_key(document: str) -> bytes:
    """A key that is equal for documents that only differ in white space at their ends."""
    return hashlib.blake2b(document.strip().encode(), digest_size=16).digest()


def without_copies(documents: Iterable[str], seen: set[bytes]) -> list[str]:
    """The documents with a key that is not in ``seen`` yet, in order. Adds their keys to ``seen``."""
    distinct = []
    for document in documents:
        if (key := text_key(document)) not in seen:
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


def _find_domains(path: Path) -> dict[str, list[_File]]:
    if path.is_file():
        _check_kind(path)
        return {_stem(path): [_File(path, path.name, is_one_document=False)]}
    domains: dict[str, list[_File]] = {}
    for entry in _visible(path):
        if entry.is_dir():
            domain, files = entry.name, [_File(file, file.relative_to(path).as_posix(), True) for file in _walk(entry)]
            if not files:
                raise EquipoiseError(
                    f"A domain's folder must contain text: {entry} contains none. Add text, or remove it."
                )
        else:
            domain, files = _stem(entry), [_File(entry, entry.name, False)]
            _check_kind(entry)
        try:
            domain.encode()
        except UnicodeEncodeError:
            raise UsageError(f"The name of a domain must be UTF-8: got {entry}. Rename it.") from None
        if domain in domains:
            raise UsageError(
                f"A domain must be one file or one sub-folder: {domain!r} is both {domains[domain][0].name} and "
                f"{files[0].name} in {path}. Put both into one sub-folder, or rename one."
            )
        domains[domain] = files
    if not domains:
        raise UsageError(f"A folder of text must contain {FORMS}: {path} contains none of these. Check the path.")
    return dict(sorted(domains.items()))


def _visible(folder: Path) -> list[Path]:
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(folder, error) from None
    return [
        entry
        for entry in entries
        if not entry.name.startswith(".") and not _is_readme(entry) and entry.name != LEVELS_FILE
    ]


def _is_readme(path: Path) -> bool:
    """True for README, README.txt and README-fr.md. False for readmes.txt, which may be a domain."""
    name = path.name.upper()
    return _stem(path).upper() == "README" or (
        name.startswith("README") and path.is_file() and _kind(path) not in KINDS
    )


def _walk(folder: Path) -> Iterator[Path]:
    for entry in _visible(folder):
        if entry.is_dir() and not entry.is_symlink():  # a link to a parent folder would loop for ever
            yield from _walk(entry)
        else:
            _check_kind(entry)
            yield entry


def _stem(path: Path) -> str:
    return path.name.split(".")[0]


def _kind(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".xz")).suffix


def _check_kind(path: Path) -> None:
    if _kind(path) not in KINDS or not path.is_file():
        raise UsageError(f"Text must be {', '.join(KINDS)}, each optionally .xz: got {path}. Convert or remove it.")


def _size_and_digest(path: Path) -> tuple[int, str]:
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "blake2b").hexdigest()
            return os.fstat(file.fileno()).st_size, digest
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> EquipoiseError:
    return EquipoiseError(f"Text must be readable: {path}: {error.strerror}. Check its permissions.")


def _empty(path: Path) -> EquipoiseError:
    return EquipoiseError(f"A text file must contain text: {path} is empty. Add text, or remove it.")


def _digest_of_documents(documents: Sequence[str]) -> tuple[int, str]:
    digest, size = hashlib.blake2b(), 0
    for document in documents:
        packed = document.encode()
        digest.update(f"{len(packed)}:".encode() + packed)
        size += len(packed)
    return size, digest.hexdigest()


def _read_domains(domains: dict[str, list[_File]], progress: Progress) -> Documents:
    documents = {}
    for number, (domain, files) in enumerate(domains.items(), start=1):
        progress(f"reading {number} of {len(domains)} domains")
        documents[domain] = [document for file in files for document in _read(file)]
    return documents


def _read(file: _File) -> list[str]:
    is_xz, content = file.path.name.lower().endswith(".xz"), bytearray()
    try:
        with lzma.open(file.path) if is_xz else open(file.path, "rb") as opened:
            while piece := opened.read(PIECE):
                content += piece
                _check_size(len(content), file.path)
    except (lzma.LZMAError, EOFError) as error:
        raise EquipoiseError(f"{file.path} must be an xz file: {error}. The file is damaged; restore it.") from None
    except OSError as error:
        raise _unreadable(file.path, error) from None
    if not content:
        raise _empty(file.path)
    if _kind(file.path) == ".parquet":
        return _read_parquet(content, file.path)
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise EquipoiseError(
            f"Text must be UTF-8: {file.path} is invalid at byte {error.start} (value 0x{content[error.start]:02x}). "
            "Convert the file, for example with iconv."
        ) from None
    if _kind(file.path) == ".jsonl":
        return _read_jsonl(text, file.path)
    if file.is_one_document:
        return [text]
    return [document.strip("\r\n") for document in re.split(r"\n[ \t\r]*\n", text)]


def _check_size(num_bytes: int, path: Path) -> None:
    if num_bytes > MAX_BYTES:
        raise EquipoiseError(
            f"A file must hold at most {MAX_BYTES:,} bytes of text, unfolded: {path} holds more. Split it into several "
            "files in one sub-folder, or remove it."
        )


def _read_jsonl(text: str, path: Path) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON strings may contain U+2028
        if not line.strip():
            continue
        if len(line) > MAX_LINE:
            raise EquipoiseError(
                f"A line of .jsonl must have at most {MAX_LINE:,} characters: {path}, line {number} has {len(line):,}. "
                "Split the document, or remove the file."
            )
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise EquipoiseError(
                f"A line of .jsonl must be JSON: {path}, line {number}: {error}. The file is damaged; restore it."
            ) from None
        documents.append(_text_of(row.get("text") if isinstance(row, dict) else None, f"{path}, line {number}"))
    return documents


def _read_parquet(content: bytearray, path: Path) -> list[str]:
    import pyarrow
    from pyarrow import parquet

    source = pyarrow.BufferReader(content)
    try:
        schema = parquet.read_schema(source)
        if schema.names.count("text") != 1:
            raise EquipoiseError(
                f'A parquet file must have one column "text": {path} has the columns {schema.names}. Rename columns.'
            )
        kind = schema.field("text").type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if kind not in (pyarrow.string(), pyarrow.large_string()):
            _text_of(None, f"{path}, row 1")
        return _documents(parquet.ParquetFile(source, read_dictionary=["text"]).iter_batches(columns=["text"]), path)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise EquipoiseError(
            f"{path} must be a parquet file: {_first_line(error)}. The file is damaged; restore it."
        ) from None


def _documents(batches: Iterable[Any], path: Path) -> list[str]:
    """The documents in batches of a column of strings.

    Strings stay in the file's dictionary, in which one long string may stand for any number of rows, until their size
    is known.
    """
    from pyarrow import compute

    documents: list[str] = []
    num_bytes = 0
    for batch in batches:
        column = batch.column(0)
        lengths = compute.binary_length(column.dictionary).take(column.indices)
        num_bytes += len(column) + (compute.sum(lengths).as_py() or 0)
        _check_size(num_bytes, path)
        first = len(documents) + 1
        documents += [_text_of(row, f"{path}, row {i}") for i, row in enumerate(column.to_pylist(), start=first)]
    return documents


def _text_of(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise EquipoiseError(
            f'A row must have a string in its field "text": {where} has none. Add or rename the field.'
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise EquipoiseError(
            f"A document must be valid Unicode: {where} has half a surrogate pair at character {error.start}. "
            "Remove the character."
        ) from None
    return value


def _looks_like_dataset(name: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name)) and _kind(Path(name)) not in KINDS


def _load_dataset(name: str) -> Documents:
    try:
        import datasets  # slow to import, and only needed here

        rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # offline, unknown, gated, ...: the library has no common error class
        raise UsageError(
            f"The text must be a folder, a file, or a data set's name: {name} does not exist here, and the library "
            f"datasets cannot load it ({type(error).__name__}: {_first_line(error)}). Check the path, or save the data "
            "set as a folder of .parquet files while you are online."
        ) from None
    if "text" not in rows.column_names:
        raise EquipoiseError(
            f'A data set must have the column "text": {name} has the columns {rows.column_names}. Rename one.'
        )
    texts = [_text_of(text, f"{name}, row {number}") for number, text in enumerate(rows["text"], start=1)]
    if "domain" in rows.column_names:
        labels = [str(label) for label in rows["domain"]]
    else:
        config = rows.info.config_name
        labels = [config if config and config != "default" else name.split("/")[-1]] * len(texts)
    documents: Documents = {label: [] for label in sorted(set(labels))}
    for label, text in zip(labels, texts, strict=True):
        documents[label].append(text)
    if not documents:
        raise EquipoiseError(f"A data set must have rows: the split train of {name} has none. Choose another data set.")
    return documents


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0].rstrip(".")

"""Finds the files of a folder of text, domain by domain, and reads their documents.

Rows are documents in .jsonl, .parquet, .csv and .tsv. Any other file is text by its content: UTF-8 without a NUL byte
at its start. In the sub-folder of a domain, a file that is not text is skipped and counted.
"""

import csv
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from equipoise_lab.train.text_problems import Problem, Problems, Skipped

__all__ = ["LEVELS_FILE", "TEXT_KEY", "File", "checked_text", "find_files", "first_line", "read_files"]

LEVELS_FILE = "levels.json"  # groups of domains: see equipoise_lab.train.levels
TEXT_KEY = "text"  # the usual field or column of a document
ROWS = (".jsonl", ".parquet", ".csv", ".tsv")
NEVER_SKIPPED = (".txt", *ROWS)  # what such a file holds should be text, so if it is none, something is wrong
FORMS = "one text file or one sub-folder of text files per domain"
PIECE = 2**20  # bytes
START = 8000  # bytes in which a NUL shows that a file is not text, as in git
MAX_BYTES = 2**30  # of the text of one file: a few KB of .xz or .parquet can unfold to any size
MAX_LINE = 2**27  # characters of a line of .jsonl: as objects they need up to fifty times the memory
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
NOT_TEXT, EMPTY, NOT_UTF_8, NO_FILE = "not text", "empty", "not UTF-8", "no plain file"


class File(NamedTuple):
    path: Path
    name: str  # path relative to the data folder
    in_subfolder: bool  # of its domain: if it has no rows, it is one document


class _NotUTF8(Problem):
    pass


# ---- finding ----


def find_files(path: Path, text_key: str = TEXT_KEY) -> tuple[dict[str, list[File]], Skipped]:
    """The files of every domain, sorted, and what is skipped. Raises one error for all that is wrong.

    Opens every file, but reads only its start.
    """
    problems, skipped = Problems(), Skipped()
    domains: dict[str, list[File]] = {}
    for domain, files in [(_stem(path), _file(path, problems))] if path.is_file() else _walk(path, problems, skipped):
        with problems.collect():
            _check_domain(domain, files, domains, path)
            domains[domain] = files
    if not domains and not problems.all:
        note = skipped.note()
        has_none = f"{path} contains none of these{f' ({note})' if note else ''}"
        problems.add(f"A folder of text must contain {FORMS}", has_none, "Check the path.", in_use=True)
    elif text_key != TEXT_KEY and not any(_kind(file.path) in ROWS for files in domains.values() for file in files):
        has_none = f"got {text_key!r}, and {path} has none of these"
        problems.add(f"--text-key needs {', '.join(ROWS)}", has_none, "Leave it out.", in_use=True)
    problems.raise_error()
    return dict(sorted(domains.items())), skipped


def _file(path: Path, problems: Problems) -> list[File]:
    with problems.collect():
        reason = _why_no_text(path)
        if reason == EMPTY:
            raise _empty(path)
        if reason == NOT_TEXT:
            raise Problem("The text must be a text file", f"{path} is none", "Check the path.", in_use=True)
    return [File(path, path.name, in_subfolder=False)]


def _walk(folder: Path, problems: Problems, skipped: Skipped) -> Iterator[tuple[str, list[File]]]:
    """Domains and their files. A domain that has nothing but skipped files is none."""
    with problems.collect():
        for entry in _visible(folder):
            if not entry.is_dir():
                with problems.collect():
                    reason = _why_no_text(entry)
                    if reason == NOT_TEXT:
                        skipped.add(entry.name, reason)
                        continue
                    if reason is not None:
                        raise _empty(entry) if reason == EMPTY else _no_file(entry)
                    yield _stem(entry), [File(entry, entry.name, in_subfolder=False)]
                continue
            files, num_skipped = [], len(skipped.reasons)
            for path in _files_below(entry, problems):
                with problems.collect():
                    name = path.relative_to(folder).as_posix()
                    reason = _why_no_text(path)
                    if reason is None:
                        files.append(File(path, name, in_subfolder=True))
                    else:
                        skipped.add(name, reason)
            if files or len(skipped.reasons) == num_skipped:
                yield entry.name, files


def _check_domain(domain: str, files: Sequence[File], others: dict[str, list[File]], path: Path) -> None:
    try:
        domain.encode()
    except UnicodeEncodeError:
        name = os.fsencode(path / domain).decode(errors="replace")
        raise Problem("The name of a domain must be UTF-8", f"got {name}", "Rename it.", in_use=True) from None
    if not files:
        raise Problem(
            "A domain's folder must contain text", f"{path / domain} contains none", "Add text, or remove it."
        )
    if domain in others:
        raise Problem(
            "A domain must be one file or one sub-folder",
            f"{domain!r} is both {others[domain][0].name} and {files[0].name} in {path}",
            "Put both into one sub-folder, or rename one.",
            in_use=True,
        )


def _visible(folder: Path) -> list[Path]:
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(folder, error.strerror) from None
    return [
        entry
        for entry in entries
        if not entry.name.startswith(".") and not _is_readme(entry) and entry.name != LEVELS_FILE
    ]


def _is_readme(path: Path) -> bool:
    """True for README, README.txt and README-fr.md. False for readmes.txt, which may be a domain."""
    name = path.name.upper()
    return _stem(path).upper() == "README" or (
        name.startswith("README") and path.is_file() and _kind(path) not in NEVER_SKIPPED
    )


def _files_below(folder: Path, problems: Problems) -> Iterator[Path]:
    entries: list[Path] = []
    with problems.collect():
        entries = _visible(folder)
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():  # a link to a parent folder would loop for ever
            yield from _files_below(entry, problems)
        else:
            yield entry


def _why_no_text(path: Path) -> str | None:
    """Why a file cannot be text, by its start; None if it may be."""
    if not path.is_file():  # to open a pipe might never end
        return NO_FILE
    start = _read_bytes(path, most=START)
    if not start:
        return EMPTY
    is_binary = b"\0" in start and not start.startswith(UTF_16)
    return NOT_TEXT if is_binary and _kind(path) not in NEVER_SKIPPED else None


def _stem(path: Path) -> str:
    return path.name.split(".")[0]


def _kind(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".xz").removesuffix(".gz")).suffix


# ---- reading ----


def read_files(files: Sequence[File], text_key: str, problems: Problems, skipped: Skipped) -> list[str]:
    """The documents in the files of a domain. Files in a sub-folder that are not UTF-8 are skipped, unless most are."""
    documents: list[str] = []
    not_utf_8: dict[str, Problem] = {}
    for file in files:
        with problems.collect():
            try:
                documents += _read(file, text_key)
            except _NotUTF8 as problem:
                not_utf_8[file.name] = problem
    if len(not_utf_8) > len(files) / 2:
        problems.all += not_utf_8.values()
    else:
        for name in not_utf_8:
            skipped.add(name, NOT_UTF_8)
    return documents


def _read(file: File, text_key: str) -> list[str]:
    content = _read_bytes(file.path)
    if not content:
        raise _empty(file.path)
    kind = _kind(file.path)
    if kind == ".parquet":
        return _read_parquet(content, file.path, text_key)
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise _NotUTF8(
            "Text must be UTF-8",
            f"{file.path} is invalid at byte {error.start} (value 0x{content[error.start]:02x})",
            "Convert the file, for example with iconv.",
        ) from None
    if kind == ".jsonl":
        return _read_jsonl(text, file.path, text_key)
    if kind in (".csv", ".tsv"):
        return _read_csv(text, file.path, text_key)
    if file.in_subfolder:
        return [text]
    return [document.strip("\r\n") for document in re.split(r"\n[ \t\r]*\n", text)]


def _read_bytes(path: Path, most: int | None = None) -> bytearray:
    """The content, unfolded: all of it, or its first ``most`` bytes."""
    content = bytearray()
    ending = path.suffix.lower()
    try:
        with _open(path, ending) as opened:
            while piece := opened.read(PIECE if most is None else most - len(content)):
                content += piece
                _check_size(len(content), path)
    except (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) as error:
        kind = ending.removeprefix(".")
        raise Problem(
            f"{path} must be {'a gzip' if kind == 'gz' else f'an {kind}'} file",
            str(error).rstrip("."),
            "The file is damaged; restore it.",
        ) from None
    except OSError as error:
        raise _unreadable(path, error.strerror) from None
    return content


def _open(path: Path, ending: str) -> IO[bytes]:
    if ending == ".xz":
        return lzma.open(path)
    if ending == ".gz":
        return cast(IO[bytes], gzip.open(path))
    return path.open("rb")


def _check_size(num_bytes: int, path: Path) -> None:
    if num_bytes > MAX_BYTES:
        raise Problem(
            f"A file must hold at most {MAX_BYTES:,} bytes of text, unfolded",
            f"{path} holds more",
            "Split it into several files in one sub-folder, or remove it.",
        )


def _read_jsonl(text: str, path: Path, text_key: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON strings may contain U+2028
        if not line.strip():
            continue
        if len(line) > MAX_LINE:
            raise Problem(
                f"A line of .jsonl must have at most {MAX_LINE:,} characters",
                f"{path}, line {number} has {len(line):,}",
                "Split the document, or remove the file.",
            )
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Problem(
                "A line of .jsonl must be JSON",
                f"{path}, line {number}: {error}",
                "The file is damaged; restore it.",
            ) from None
        fields = row if isinstance(row, dict) else {}
        documents.append(checked_text(fields.get(text_key), text_key, f"{path}, line {number}", list(fields)))
    return documents


def _read_csv(text: str, path: Path, text_key: str) -> list[str]:
    """The column of the text. The delimiter is the one with which the first line has such a column."""
    limit = csv.field_size_limit(MAX_LINE)
    number = 0
    try:
        headers = {mark: next(csv.reader(io.StringIO(text[:PIECE], newline=""), delimiter=mark)) for mark in ",;\t"}
        marks = [mark for mark, names in headers.items() if names.count(text_key) == 1]
        if not marks:
            raise _no_column(path, text_key, headers["\t" if _kind(path) == ".tsv" else ","])
        column, documents = headers[marks[0]].index(text_key), []
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=marks[0], strict=True)
        for number, row in enumerate(rows, start=1):
            if row and number > 1:
                value = row[column] if column < len(row) else None
                documents.append(checked_text(value, text_key, f"{path}, row {number}"))
        return documents
    except (csv.Error, StopIteration) as error:
        where = f"row {number + 1}: {error or 'it has no first line'}"
        raise Problem(f"{path} must be a csv file", where, "The file is damaged; restore it.") from None
    finally:
        csv.field_size_limit(limit)


def _read_parquet(content: bytearray, path: Path, text_key: str) -> list[str]:
    import pyarrow
    from pyarrow import parquet

    source = pyarrow.BufferReader(content)
    try:
        schema = parquet.read_schema(source)
        if schema.names.count(text_key) != 1:
            raise _no_column(path, text_key, schema.names)
        kind = schema.field(text_key).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if kind not in (pyarrow.string(), pyarrow.large_string()):
            checked_text(None, text_key, f"{path}, row 1")
        opened = parquet.ParquetFile(source, read_dictionary=[text_key])
        return _documents(opened.iter_batches(columns=[text_key]), path, text_key)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise Problem(f"{path} must be a parquet file", first_line(error), "The file is damaged; restore it.") from None


def _documents(batches: Iterable[Any], path: Path, text_key: str) -> list[str]:
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
        documents += [
            checked_text(row, text_key, f"{path}, row {i}") for i, row in enumerate(column.to_pylist(), start=first)
        ]
    return documents


def checked_text(value: Any, text_key: str, where: str, fields: Sequence[str] = ()) -> str:
    """``value`` if it is a string of valid Unicode. Raises ``Problem``, which names ``where``."""
    if not isinstance(value, str):
        others = f" (its fields: {', '.join(fields[:10])})" if fields else ""
        raise Problem(
            f'A row must have a string in its field "{text_key}"',
            f"{where} has none{others}",
            "Name the field of the text with --text-key, or add it.",
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Problem(
            "A document must be valid Unicode",
            f"{where} has half a surrogate pair at character {error.start}",
            "Remove the character.",
        ) from None
    return value


def _no_column(path: Path, text_key: str, columns: Sequence[str]) -> Problem:
    is_plain = _kind(path) in (".csv", ".tsv")
    return Problem(
        f'A {"table" if is_plain else "parquet file"} must have one column "{text_key}"',
        f"{path} has the columns {list(columns)}",
        "Name the column of the text with --text-key"
        + (", or end the file's name in .txt to read it as plain text." if is_plain else ", or rename columns."),
    )


def _empty(path: Path) -> Problem:
    return Problem("A text file must contain text", f"{path} is empty", "Add text, or remove it.")


def _no_file(path: Path) -> Problem:
    return Problem("A domain must be a file or a folder", f"{path} is neither", "Remove it.")


def _unreadable(path: Path, reason: str | None) -> Problem:
    return Problem("Text must be readable", f"{path}: {reason}", "Check its permissions.")


def first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0].rstrip(".")

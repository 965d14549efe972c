"""Own text: which files are text, which rows are documents, what is skipped, and errors that name all that is wrong."""

import gzip
import json
import os
import sys
import sysconfig
import types
from pathlib import Path

import pytest

from equipoise.errors import EquipoiseError, UsageError
from equipoise_lab.train import data
from equipoise_lab.train.data import load_corpus
from equipoise_lab.train.location import check_location
from equipoise_lab.train.text import find_text, stream_text

DOCUMENTS = [f"document {i}: " + "many words " * 20 for i in range(12)]


def put(folder: Path, **files: bytes | str) -> Path:
    """Writes files. In their names "__" stands for a slash and "_" for a dot."""
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def read(folder, text_key="text"):
    """The documents by domain, and the notes of what is skipped."""
    notes = []
    return find_text(folder, notes.append, text_key).read(print, notes.append), notes


# ---- what is text ----


def test_any_text_is_read_whatever_its_name(tmp_path):
    put(tmp_path, d__a_py="a\n\nb", d__b_md="# b", d__LICENSE="c", d__e__f_json="{}", d__g_py_gz=gzip.compress(b"g"))
    put(tmp_path, notes="x\n\ny", page_html="<p>")
    documents, notes = read(tmp_path)
    assert documents == {"d": ["c", "a\n\nb", "# b", "{}", "g"], "notes": ["x", "y"], "page": ["<p>"]}
    assert notes == []


def test_what_is_no_text_is_skipped_and_counted(tmp_path):
    put(tmp_path, d__a_py="a", d__b_py="b", d__c_py="c", d__empty_py="", d__latin_py=b"caf\xe9", d__x_pyc=b"\0\1")
    put(tmp_path, d__one_png=b"\x89PNG\0", d__two_png=b"\x89PNG\0", d__utf16_txt="hé".encode("utf-16"), logo_png=b"\0")
    put(tmp_path, images__photo_png=b"\0")
    (tmp_path / "d" / "pipe").symlink_to(tmp_path / "nowhere")
    documents, notes = read(tmp_path)
    assert documents == {"d": ["a", "b", "c"]}
    assert notes == [
        "skipped 7 files: 1 empty (d/empty.py), 5 not text (d/one.png, d/two.png, d/x.pyc, ...), 1 no plain file "
        "(d/pipe)",
        "skipped 2 files: 2 not UTF-8 (d/latin.py, d/utf16.txt)",
    ]


def test_a_pipe_is_not_opened(tmp_path):
    put(tmp_path, d__a_py="a")
    os.mkfifo(tmp_path / "d" / "pipe")
    assert read(tmp_path)[0] == {"d": ["a"]}


def test_the_notes_are_said_again_when_the_text_is_in_the_cache(tmp_path):
    put(tmp_path / "text", d__x_py=b"\xff", **{f"d__{i}_py": document for i, document in enumerate(DOCUMENTS)})
    options = {"vocab_size": 300, "sequence_length": 16, "cache": tmp_path / "cache"}
    for _ in range(2):
        lines = []
        load_corpus(tmp_path / "text", progress=lines.append, **options)
        assert lines.count("skipped 1 file: 1 not UTF-8 (d/x.py)") == 1
    put(tmp_path / "text", d__x_png=b"\0")  # the text that is read stays the same
    load_corpus(tmp_path / "text", progress=lines.append, **options)
    assert lines[1:] == ["skipped 1 file: 1 not text (d/x.png)", "skipped 1 file: 1 not UTF-8 (d/x.py)"]


def test_an_audit_notes_what_is_skipped_once(tmp_path):
    put(tmp_path, d__a_py="a", d__b_py="b", d__c_py=b"\xff", d__x_png=b"\0", e_txt="e")
    lines = []
    domains = list(stream_text(tmp_path, lines.append))
    assert [(name, sorted(read_it())) for name, read_it in domains * 2] == 2 * [("d", ["a", "b"]), ("e", ["e"])]
    assert lines == ["skipped 1 file: 1 not text (d/x.png)", "skipped 1 file: 1 not UTF-8 (d/c.py)"]


def test_a_domain_that_is_mostly_of_another_encoding_is_an_error(tmp_path):
    put(tmp_path, d__a_py="a", d__b_py=b"\xe9", d__c_py=b"\xe9", e_txt="e")
    with pytest.raises(EquipoiseError, match=r"must be UTF-8: .*b\.py is invalid at byte 0 .*; .*c\.py is .*iconv"):
        read(tmp_path)


@pytest.mark.slow
def test_a_thousand_files_of_the_standard_library_work_as_they_are(tmp_path):
    library = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(library.rglob("*")) if path.is_file() and "site-packages" not in path.parts]
    files = files[:: max(1, len(files) // 1000)][:1000]
    assert len(files) == 1000 and {".py", ".pyc"} <= {path.suffix for path in files}
    for number, path in enumerate(files):
        target = tmp_path / "text" / f"part{number % 3}" / path.relative_to(library)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    lines = []
    corpus = load_corpus(tmp_path / "text", cache=tmp_path / "cache", vocab_size=300, progress=lines.append)
    assert corpus.domains == ("part0", "part1", "part2")
    assert "not text (" in next(line for line in lines if line.startswith("skipped "))


# ---- rows ----


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a_csv", 'id,text\n1,"one, ""1""\n\nand more"\n\n2,two\n'),
        ("a_csv", '\ufeffid;text;x\r\n1;"one, ""1""\n\nand more"\r\n2;two;\r\n'),
        ("a_tsv", 'text\tid\n"one, ""1""\n\nand more"\t1\ntwo\t2\n'),
    ],
    ids=["csv", "semicolons", "tsv"],
)
def test_the_rows_of_a_table_are_documents(tmp_path, name, content):
    assert read(put(tmp_path, **{name: content}))[0] == {"a": ['one, "1"\n\nand more', "two"]}


def test_a_long_cell_of_a_table_is_read(tmp_path):
    assert read(put(tmp_path, a_csv=f"text\n{'long' * 100_000}\n"))[0] == {"a": ["long" * 100_000]}


def test_text_key_names_the_field_of_jsonl_csv_and_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    put(tmp_path, a_jsonl=json.dumps({"text": "no", "body": "yes"}), b_csv="text,body\nno,yes\n", c_txt="plain")
    parquet.write_table(pyarrow.table({"text": ["no"], "body": ["yes"]}), tmp_path / "d.parquet")
    assert read(tmp_path, "body")[0] == {"a": ["yes"], "b": ["yes"], "c": ["plain"], "d": ["yes"]}
    assert read(tmp_path)[0] == {"a": ["no"], "b": ["no"], "c": ["plain"], "d": ["no"]}


def test_text_key_is_part_of_the_cache(tmp_path):
    put(tmp_path / "text", a_jsonl="\n".join(json.dumps({"text": d, "body": d[::-1]}) for d in DOCUMENTS))
    options = {"vocab_size": 300, "sequence_length": 16, "cache": tmp_path / "cache"}
    first, second = (load_corpus(tmp_path / "text", text_key=key, **options) for key in ("text", "body"))
    assert first.fingerprint != second.fingerprint


def test_text_key_without_rows_is_refused(tmp_path):
    put(tmp_path, c_txt="plain")
    with pytest.raises(UsageError, match=r"--text-key needs \.jsonl, \.parquet, \.csv, \.tsv: got 'body', and .* none"):
        read(tmp_path, "body")


def test_text_key_names_the_column_of_a_data_set(tmp_path, monkeypatch):
    rows = type("Rows", (dict,), {"column_names": ["body"], "info": types.SimpleNamespace(config_name="default")})
    loaded = types.SimpleNamespace(load_dataset=lambda name, split: rows(body=["a", 7]))
    monkeypatch.setitem(sys.modules, "datasets", loaded)
    with pytest.raises(EquipoiseError, match='must have the column "text": owner/name .*--text-key'):
        find_text("hf:owner/name", print)
    with pytest.raises(EquipoiseError, match='a string in its field "body": owner/name, row 2 has none'):
        find_text("hf:owner/name", print, "body")


# ---- errors ----


def test_all_that_is_wrong_is_named_at_once(tmp_path):
    put(tmp_path, a_txt=b"\xff", b_txt=b"ok\xff", c_jsonl="{", d__e_jsonl='{"x": 1}', d__f_txt="fine", g_csv="x\n1\n")
    with pytest.raises(EquipoiseError) as caught:
        read(tmp_path)
    message = str(caught.value)
    for part in (
        "a.txt is invalid at byte 0",
        "b.txt is invalid at byte 2",
        "c.jsonl, line 1",
        "d/e.jsonl, line 1",
        "g.csv",
    ):
        assert part in message
    assert message.count("Text must be UTF-8") == 1 and message.count("iconv") == 1
    for suffix in "hijk":
        (tmp_path / f"{suffix}.txt").touch()
    with pytest.raises(EquipoiseError, match=r"must contain text: .*h\.txt is empty; .*k\.txt is empty\. Add text"):
        read(tmp_path)


def test_an_error_of_very_many_files_is_short(tmp_path):
    for number in range(500):
        (tmp_path / f"{number}.txt").write_bytes(b"\xff")
    with pytest.raises(EquipoiseError, match="And 490 more of 500 problems") as caught:
        read(tmp_path)
    assert len(str(caught.value)) < 200 * len(str(tmp_path))


def test_every_domain_with_too_little_text_is_named(tmp_path):
    put(tmp_path / "text", a_py="one", b_py="one more", c_txt="\n\n".join(DOCUMENTS))
    with pytest.raises(
        EquipoiseError, match=r"'a' in .* has 1; 'b' in .* has 1\. Split .* into one sub-folder"
    ) as caught:
        load_corpus(tmp_path / "text", cache=tmp_path / "cache")
    assert "'c'" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text", r"text does not exist here\. Did you mean texts\?"),
        ("owner/name", r"does not exist here\. .*data set of the Hugging Face Hub is written hf:owner/name"),
        ("hf:owner/name/more", r"must be hf:NAME or hf:OWNER/NAME: got hf:owner/name/more"),
        ("hf:", "must be hf:NAME or hf:OWNER/NAME"),
    ],
)
def test_a_wrong_name_is_refused_without_a_server(tmp_path, monkeypatch, name, message):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    with pytest.raises(UsageError, match=message):
        find_text(name, print)
    with pytest.raises(UsageError, match=message):
        check_location(name)


def test_a_data_set_of_the_hub_is_not_looked_up_before_it_is_read():
    check_location("hf:owner/name")


def test_the_tokenizer_is_checked_before_the_text_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "find_text", None)
    with pytest.raises(UsageError, match="must be a tokenizer.json or a folder with one"):
        load_corpus(put(tmp_path, a_txt="text"), tokenizer=tmp_path / "none.json")
    with pytest.raises(UsageError, match="--vocab-size must be at least"):
        load_corpus(tmp_path, vocab_size=7)


def test_the_checks_of_the_options_refuse_a_wrong_path(tiny, tmp_path):
    """They come before heavy imports."""
    tiny().check()
    with pytest.raises(UsageError, match="does not exist here"):
        tiny(data=str(tmp_path / "nowhere")).check()
    with pytest.raises(UsageError, match="must be a tokenizer.json or a folder with one"):
        tiny(tokenizer=tmp_path / "nowhere").check()

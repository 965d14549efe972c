"""The text pipeline of the lab: reading, split, tokenizer, cache, micro-batches, and every kind of bad input."""

import gzip
import hashlib
import json
import lzma
import math
import os
import subprocess
import sys
import tracemalloc
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from equipoise.errors import EquipoiseError, UsageError
from equipoise_lab.train import data, run_text, text, text_files
from equipoise_lab.train.batches import Batches
from equipoise_lab.train.data import SPLITS, Corpus, load_corpus
from equipoise_lab.train.ranks import ONE_PROCESS
from equipoise_lab.train.text import count_held_out, find_text, max_held_out, stream_text

END = "<|endoftext|>"


def make_documents(domain: str, num: int = 40) -> list[str]:
    rng = np.random.default_rng(len(domain))
    words = ["".join(rng.choice(list("aeioubcdlmnrst"), size=7)) for _ in range(60)] + ["çok", "天地", "É", END]
    return [f"{domain} {i}: " + " ".join(rng.choice(words, size=30 + i % 7)) for i in range(num)]


def write_jsonl(path: Path, documents: list[str]) -> None:
    content = "".join(json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in documents).encode()
    path.write_bytes(lzma.compress(content) if path.suffix == ".xz" else content)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "text"
    root.mkdir()
    for domain in ("ask", "book", "code"):
        write_jsonl(root / f"{domain}.en.jsonl.xz", make_documents(domain))
    (root / "README.md").write_text("not text to train on")
    (root / ".hidden").write_text("neither")
    return root


def load(source, cache, **options) -> Corpus:
    return load_corpus(source, cache=cache, **{"vocab_size": 400, "sequence_length": 16, **options})


def documents_of(corpus: Corpus, split: str, domain: str) -> list[str]:
    """The documents decoded from the tokens, which are split at the end-of-text token."""
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_file))
    tokens = corpus.tokens[split][domain]
    ends = np.flatnonzero(tokens == tokenizer.token_to_id(END))
    return [tokenizer.decode(part.tolist()) for part in np.split(tokens, ends + 1)[:-1]]


# ---- split and tokens -----------------------------------------------------------------------------------------------


def test_a_folder_with_the_name_of_the_packaged_corpus_is_not_passed_over_silently(
    tiny, new_watcher, tmp_path, monkeypatch
):
    def load(*args, **options):
        raise EquipoiseError("far enough")

    monkeypatch.setattr(run_text, "load_corpus", load)
    monkeypatch.chdir(tmp_path)
    notes = []
    for _ in range(2):
        watcher = new_watcher()
        with pytest.raises(EquipoiseError, match="far enough"):
            run_text.load_text(tiny(data="corpus"), watcher, ONE_PROCESS)
        notes.append(watcher.said)
        (tmp_path / "corpus").mkdir(exist_ok=True)
    note = "the text is the packaged corpus; for the one in the current folder, write --data ./corpus"
    assert notes == [[], [note]]


def test_split_is_disjoint_and_exhaustive_and_decodes_to_the_text(folder, tmp_path):
    corpus = load(folder, tmp_path / "cache")
    assert corpus.domains == ("ask", "book", "code")
    for domain in corpus.domains:
        parts = {split: documents_of(corpus, split, domain) for split in SPLITS}
        # 40 distinct documents: none twice, none lost
        assert sorted(sum(parts.values(), [])) == sorted(make_documents(domain))
        assert all(parts.values())


def test_held_out_documents_are_the_first_in_hash_order_and_alternate(folder, tmp_path):
    corpus = load(folder, tmp_path / "cache")
    for domain in corpus.domains:
        ranked = sorted(make_documents(domain), key=lambda d: hashlib.blake2b(d.encode()).digest())
        selection, test = documents_of(corpus, "selection", domain), documents_of(corpus, "test", domain)
        held_out = len(selection) + len(test)
        assert selection == ranked[0:held_out:2]
        assert test == ranked[1:held_out:2]
        assert documents_of(corpus, "train", domain) == ranked[held_out:]


def test_at_most_a_quarter_of_the_bytes_is_held_out(folder, tmp_path):
    corpus = load(folder, tmp_path / "cache")  # far fewer than 20,000 tokens per domain: the limit of a quarter applies
    for domain in corpus.domains:
        held_out = corpus.num_bytes["selection"][domain] + corpus.num_bytes["test"][domain]
        total = held_out + corpus.num_bytes["train"][domain]
        assert total == sum(len(document.encode()) for document in make_documents(domain))
        assert 0.2 * total < held_out <= 0.25 * total


@pytest.mark.parametrize(
    ("num_bytes", "num_tokens", "expected"),
    [
        ([10] * 100, [5000] * 100, 5),  # 5 % of the bytes, 25,000 tokens
        ([10] * 100, [2001] * 100, 10),  # 20,000 tokens need ten documents
        ([10] * 100, [1000] * 100, 20),
        ([10] * 100, [100] * 100, 25),  # the limit of a quarter applies
        ([10] * 4, [10**6] * 4, 2),  # at least two, though that is half
        ([1000, 1000, 1, 1], [10, 10, 1, 1], 2),
        ([26] + [10] * 10, [1] * 11, 2),  # 36 of 126 is more than a quarter, and two are needed
        ([10] * 101, [20_000] * 101, 6),  # 5 % of 1010 is 50.5: five documents are not enough
    ],
)
def test_count_held_out_matches_a_hand_calculation(num_bytes, num_tokens, expected):
    assert count_held_out(num_bytes, num_tokens) == expected
    assert expected <= max_held_out(num_bytes)


def test_split_and_fingerprint_do_not_depend_on_file_order_or_packing(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for domain in ("ask", "book", "code"):
        write_jsonl(other / f"{domain}.jsonl", make_documents(domain)[::-1])
    first, second = load(folder, tmp_path / "a"), load(other, tmp_path / "b")
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != load(other, tmp_path / "b", vocab_size=410).fingerprint
    for split in SPLITS:
        for domain in first.domains:
            assert np.array_equal(first.tokens[split][domain], second.tokens[split][domain])


def test_duplicate_documents_are_kept_once_and_empty_ones_dropped(tmp_path):
    write_jsonl(tmp_path / "web.jsonl", make_documents("web") * 3 + ["", " \n"])
    corpus = load(tmp_path / "web.jsonl", tmp_path / "cache")
    everything = sum((documents_of(corpus, split, "web") for split in SPLITS), [])
    assert sorted(everything) == sorted(make_documents("web"))


def test_no_document_is_trained_on_in_one_domain_and_held_out_in_another(tmp_path):
    """Removes copies in another domain, and copies that only differ in white space at their ends."""
    shared = make_documents("shared", 30)
    write_jsonl(tmp_path / "a.jsonl", make_documents("a") + shared + [document + "\n" for document in shared])
    write_jsonl(tmp_path / "b.jsonl", make_documents("bb") + [" " + document for document in shared])
    lines = []
    corpus = load(tmp_path, tmp_path / "cache", progress=lines.append)
    everything = [d.strip() for split in SPLITS for domain in "ab" for d in documents_of(corpus, split, domain)]
    assert sorted(everything) == sorted(make_documents("a") + shared + make_documents("bb"))
    assert "left out 30 documents that an earlier domain has too" in lines


def test_tokenising_in_parts_loses_no_document(tmp_path):
    documents = [f"{i} {'word ' * 8}" for i in range(600)]
    write_jsonl(tmp_path / "web.jsonl", documents)
    corpus = load(tmp_path / "web.jsonl", tmp_path / "cache")
    assert sorted(sum((documents_of(corpus, split, "web") for split in SPLITS), [])) == sorted(documents)


def test_tokenizer_never_sees_text_that_can_be_held_out(folder, tmp_path, monkeypatch):
    sample, seen = data._sample, []

    def watched(*arguments):
        seen.extend(sample(*arguments))
        return sample(*arguments)

    monkeypatch.setattr(data, "_sample", watched)
    corpus = load(folder, tmp_path / "cache")
    held_out = {d for s in ("selection", "test") for n in corpus.domains for d in documents_of(corpus, s, n)}
    assert seen and not held_out & set(seen)


def test_tokenizer_takes_an_even_share_of_each_domain():
    long, short = ["é" * 300 + str(i) for i in range(40)], ["s" * 90 + str(i) for i in range(40)]
    assert sum(len(d.encode()) for d in data._sample(long, share=2001)) == 2000  # cut between characters
    assert sum(len(d.encode()) for d in data._sample(short, share=2001)) == 2001


def test_bytes_per_token_matches_a_hand_calculation(folder, tmp_path):
    corpus = load(folder, tmp_path / "cache")
    documents = documents_of(corpus, "test", "book")
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_file))
    tokenizer.encode_special_tokens = True
    num_tokens = sum(len(tokenizer.encode(document).ids) + 1 for document in documents)
    num_bytes = sum(len(document.encode()) for document in documents)
    assert corpus.bytes_per_token("test", "book") == num_bytes / num_tokens


def test_bytes_of_unknown_words_are_not_lost(folder, tmp_path):
    from tokenizers import AddedToken, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens([AddedToken("<unk>", special=True), AddedToken("</s>", special=True)])
    words.save(str(tmp_path / "words.json"))
    corpus = load(folder, tmp_path / "cache", tokenizer=tmp_path / "words.json")
    whole = corpus.num_bytes["test"]["book"] / len(corpus.tokens["test"]["book"])
    assert corpus.bytes_per_token("test", "book", 20) == whole > 2  # "<unk>" decodes to nothing


def test_sequences_are_the_tokens_in_order_without_the_remainder(folder, tmp_path):
    corpus = load(folder, tmp_path / "cache")
    tokens, rows = corpus.tokens["train"]["ask"], corpus.sequences("train", "ask", 17)
    assert rows.shape == (len(tokens) // 17, 17) and len(tokens) % 17
    assert rows[1].tolist() == tokens[17:34].tolist()
    assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16 and not tokens.flags.writeable


def test_saved_tokenizer_loads_in_transformers(folder, tmp_path):
    from transformers import PreTrainedTokenizerFast

    corpus = load(folder, tmp_path / "cache")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(corpus.tokenizer_file))
    assert len(tokenizer) == corpus.vocab_size == 400
    assert tokenizer.decode(tokenizer("天地 é")["input_ids"]) == "天地 é"


def test_a_given_tokenizer_is_used_without_its_truncation(folder, tmp_path):
    trained = load(folder, tmp_path / "cache")
    tokenizer = Tokenizer.from_file(str(trained.tokenizer_file))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=50)
    (tmp_path / "tok").mkdir()
    tokenizer.save(str(tmp_path / "tok" / "tokenizer.json"))
    for path in (tmp_path / "tok", tmp_path / "tok" / "tokenizer.json"):
        corpus = load(folder, tmp_path / "cache", tokenizer=path, vocab_size=7)
        assert corpus.tokenizer_file != trained.tokenizer_file and corpus.vocab_size == 400
        for domain in trained.domains:
            assert np.array_equal(corpus.tokens["test"][domain], trained.tokens["test"][domain])


def test_a_large_vocabulary_takes_four_bytes_a_token(folder, tmp_path):
    tokenizer = Tokenizer.from_file(str(load(folder, tmp_path / "cache").tokenizer_file))
    tokenizer.add_tokens([f"<{i}>" for i in range(2**16)])
    tokenizer.save(str(tmp_path / "large.json"))
    corpus = load(folder, tmp_path / "cache", tokenizer=tmp_path / "large.json")
    assert corpus.vocab_size == 2**16 + 400
    assert corpus.tokens["train"]["ask"].dtype == np.uint32


# ---- reading --------------------------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    import pyarrow
    from pyarrow import parquet

    documents = make_documents("web", 12)
    root = tmp_path / "text"
    for sub in ("many", "mixed"):
        (root / sub / "deep").mkdir(parents=True)
    (root / "blank.txt").write_text("\n\n" + "\n \n\n".join(documents) + "\n", encoding="utf-8")
    (root / "dos.txt.xz").write_bytes(lzma.compress("\r\n\r\n".join(documents).encode()))
    write_jsonl(root / "lines.v1.jsonl", documents)
    table = pyarrow.table({"id": range(12), "text": documents})
    parquet.write_table(table, root / "table.parquet")
    (root / "packed.parquet.xz").write_bytes(lzma.compress((root / "table.parquet").read_bytes()))
    for i, document in enumerate(documents):
        (root / "many" / f"{i}.txt").write_text(document, encoding="utf-8")
    (root / "many" / "deep" / "README").write_text("ignored")
    write_jsonl(root / "mixed" / "deep" / "a.jsonl.xz", documents[:5])
    parquet.write_table(table.slice(5), root / "mixed" / "b.parquet")

    texts_by_domain = text.find_text(root, print).read(print, print)
    assert list(texts_by_domain) == ["blank", "dos", "lines", "many", "mixed", "packed", "table"]
    for domain, texts in texts_by_domain.items():
        assert sorted(filter(str.strip, texts)) == sorted(documents), domain


def test_readmes_are_skipped_but_a_domain_may_have_a_similar_name(tmp_path):
    for name in ("README", "readme.txt", "README-fr.md", "READMEs_of_repositories.txt"):
        (tmp_path / name).write_text("words")
    assert list(text.find_text(tmp_path, print).read(print, print)) == ["READMEs_of_repositories"]


def test_a_txt_in_a_domain_folder_is_one_document_and_keeps_its_blank_lines(tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "one.txt").write_text("a\n\nb\n")
    assert text.find_text(tmp_path, print).read(print, print) == {"books": ["a\n\nb\n"]}


def test_jsonl_lines_end_at_newlines_only(tmp_path):
    documents = ["one\u2028line\u0085here", "two"]
    write_jsonl(tmp_path / "a.jsonl", documents)
    assert text.find_text(tmp_path, print).read(print, print) == {"a": documents}


def test_a_byte_order_mark_is_removed(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\ntwo")
    assert text.find_text(tmp_path, print).read(print, print) == {"a": ["one", "two"]}


def test_progress_names_each_stage(folder, tmp_path):
    lines = []
    load(folder, tmp_path / "cache", progress=lines.append)
    assert "reading 3 of 3 domains" in lines and "tokenising 1 of 3 domains" in lines
    assert "training the tokenizer" in lines
    lines.clear()
    load(folder, tmp_path / "cache", progress=lines.append)
    assert lines == []


class FakeRows:
    def __init__(self, columns, config="default"):
        self.columns, self.column_names = columns, list(columns)
        self.info = types.SimpleNamespace(config_name=config)

    def __getitem__(self, name):
        return self.columns[name]


def fake_datasets(monkeypatch, rows):
    def load_dataset(name, split):
        assert (name, split) == ("owner/name", "train")
        if isinstance(rows, Exception):
            raise rows
        return rows

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


def test_data_set_gives_domains_by_column_by_configuration_or_by_name(monkeypatch, tmp_path):
    documents = make_documents("web")
    fake_datasets(monkeypatch, FakeRows({"text": documents, "domain": ["b", "a"] * 20}))
    corpus = load("hf:owner/name", tmp_path / "cache")
    assert corpus.domains == ("a", "b")
    assert set(documents_of(corpus, "train", "b")) < set(documents[::2])
    fake_datasets(monkeypatch, FakeRows({"text": documents}, config="en"))
    assert load("hf:owner/name", tmp_path / "cache").domains == ("en",)
    fake_datasets(monkeypatch, FakeRows({"text": documents}))
    assert load("hf:owner/name", tmp_path / "cache").domains == ("name",)


def test_the_error_says_why_a_data_set_cannot_be_loaded(monkeypatch, tmp_path):
    fake_datasets(monkeypatch, ConnectionError("no route\nto the hub"))
    with pytest.raises(
        UsageError, match=r"must be able to load owner/name: ConnectionError: no route\. Check the name"
    ):
        load("hf:owner/name", tmp_path)
    fake_datasets(monkeypatch, FakeRows({"content": ["a"]}))
    with pytest.raises(
        EquipoiseError, match=r'must have the column "text": owner/name has the columns \[\'content\'\]'
    ):
        load("hf:owner/name", tmp_path)


@pytest.mark.slow
def test_reading_a_folder_does_not_import_datasets(folder, tmp_path):
    code = (
        "import sys; from equipoise_lab.train.data import load_corpus; "
        f"load_corpus({str(folder)!r}, vocab_size=400, sequence_length=16, cache={str(tmp_path / 'cache')!r}); "
        "print(sorted({'datasets', 'transformers', 'pyarrow', 'tokenizers'} & set(sys.modules)))"
    )
    outputs = [
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
        for _ in range(2)
    ]
    assert outputs == ["['tokenizers']", "[]"]  # the second call reads from the cache


# ---- cache ----------------------------------------------------------------------------------------------------------


def forbid_training(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("the tokenizer must not be trained again")

    monkeypatch.setattr(data, "_train_tokenizer", refuse)


def same(first: Corpus, second: Corpus) -> bool:
    return (first.fingerprint, first.domains, first.num_bytes, first.vocab_size, first.tokenizer_file) == (
        second.fingerprint,
        second.domains,
        second.num_bytes,
        second.vocab_size,
        second.tokenizer_file,
    ) and all(
        np.array_equal(first.tokens[split][domain], second.tokens[split][domain])
        for split in SPLITS
        for domain in first.domains
    )


def test_cache_hit_is_identical_and_does_not_train(folder, tmp_path, monkeypatch):
    first = load(folder, tmp_path / "cache")
    forbid_training(monkeypatch)
    assert same(first, load(folder, tmp_path / "cache"))
    with pytest.raises(AssertionError, match="trained again"):
        load(folder, tmp_path / "cache", vocab_size=401)
    write_jsonl(folder / "ask.en.jsonl.xz", make_documents("ask", 41))
    with pytest.raises(AssertionError, match="trained again"):
        load(folder, tmp_path / "cache")


def test_the_default_cache_folder_comes_from_the_environment(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "mine"))
    assert load(folder, None).tokenizer_file.is_relative_to(tmp_path / "mine")
    monkeypatch.delenv("EQUIPOISE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert load(folder, None).tokenizer_file.is_relative_to(tmp_path / "xdg" / "equipoise")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert load(folder, None).tokenizer_file.is_relative_to(tmp_path / "home" / ".cache" / "equipoise")


def damage_missing(folder: Path) -> None:
    next(folder.glob("*-test.bin")).unlink()


def damage_short(folder: Path) -> None:
    file = next(folder.glob("*-train.bin"))
    file.write_bytes(file.read_bytes()[:-2])


def damage_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def damage_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": 1')


def damage_meaning(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


@pytest.mark.parametrize(
    "damage",
    [damage_missing, damage_short, damage_tokenizer, damage_manifest, damage_meaning],
    ids=lambda f: f.__name__,
)
def test_damaged_cache_is_rebuilt(folder, tmp_path, damage):
    first = load(folder, tmp_path / "cache")
    expected = np.array(first.tokens["train"]["ask"])
    damage(first.tokenizer_file.parent)
    again = load(folder, tmp_path / "cache")
    assert np.array_equal(again.tokens["train"]["ask"], expected)
    assert again.fingerprint == first.fingerprint
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1  # no temporary folder remains


def test_half_written_cache_is_ignored_and_leaves_nothing(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(data.json, "dumps", lambda *a, f=json.dumps, **k: f(*a, **k) if "indent" not in k else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            load(folder, tmp_path / "cache")
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []
    killed = tmp_path / "cache" / "tokens" / ".killed.0123"
    killed.mkdir()
    (killed / "0001-train.bin").write_bytes(b"half")
    assert load(folder, tmp_path / "cache").domains == ("ask", "book", "code")


def test_loser_of_a_race_uses_the_folder_of_the_winner(folder, tmp_path, monkeypatch):
    write, winner = data._write, []

    def write_second(*arguments):
        monkeypatch.setattr(data, "_write", write)
        # Stands for another process that runs from start to end meanwhile.
        winner.append(load(folder, tmp_path / "cache"))
        write(*arguments)

    monkeypatch.setattr(data, "_write", write_second)
    loser = load(folder, tmp_path / "cache")
    assert same(loser, winner[0])
    inodes = [corpus.tokenizer_file.stat().st_ino for corpus in (loser, winner[0])]
    assert inodes[0] == inodes[1] and len(list((tmp_path / "cache" / "tokens").iterdir())) == 1


def test_an_unwritable_cache_is_an_error(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EquipoiseError, match=r"cache must be a writable folder: .*EQUIPOISE_CACHE"):
        load(folder, tmp_path / "file")


# ---- micro-batches --------------------------------------------------------------------------------------------------


def toy(nums=(7, 12, 30, 16), length=4) -> Corpus:
    """Row i of domain d is [1000 d + i] * length, so a sequence shows its origin."""
    names = tuple("abcdefgh"[: len(nums)])
    tokens = {
        name: np.repeat(np.arange(num, dtype=np.uint16) + 1000 * d, length)
        for d, (name, num) in enumerate(zip(names, nums, strict=True))
    }
    return Corpus(names, 9000, Path("none"), dict.fromkeys(SPLITS, tokens), {}, "toy")


def batches(corpus=None, **options) -> Batches:
    defaults = {"sequence_length": 4, "sequences_per_micro_batch": 2, "micro_batches_per_step": 3, "seed": 5}
    return Batches(corpus or toy(), **{**defaults, **options})


def origins(window) -> list[int]:
    return [row for batch in window for row in batch.input_ids[:, 0].tolist()]


def test_micro_batches_are_whole_sequences_of_the_domain_they_name():
    for step in range(10):
        for domain, input_ids in batches().window(step):
            assert input_ids.shape == (2, 4) and input_ids.dtype == torch.int64
            assert (input_ids == input_ids[:, :1]).all()
            assert set((input_ids[:, 0] // 1000).tolist()) == {"abcd".index(domain)}


@pytest.mark.parametrize("shuffled", [False, True])
def test_window_is_a_pure_function_of_seed_and_step(shuffled):
    forward = batches(shuffled=shuffled)
    windows = [forward.window(step) for step in range(20)]
    for step in (19, 3, 0, 11):  # in any order, with a new or a used object
        for other in (forward, batches(shuffled=shuffled)):
            for first, second in zip(windows[step], other.window(step), strict=True):
                assert first.domain == second.domain and torch.equal(first.input_ids, second.input_ids)
    other_seed = batches(shuffled=shuffled, seed=6)
    assert [origins(w) for w in windows] != [origins(other_seed.window(s)) for s in range(20)]


def test_window_does_not_touch_the_global_generators():
    before = (np.random.get_state()[1].tolist(), torch.get_rng_state())
    batches(shuffled=True).window(3)
    assert np.random.get_state()[1].tolist() == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_window_is_the_same_on_every_machine():
    # Recorded once. A change here changes every run of the lab, so it needs a reason.
    assert origins(batches().window(0)) == [3003, 3014, 2022, 2017, 6, 1]


@pytest.mark.parametrize("shuffled", [False, True])
def test_ranks_share_the_one_rank_window_without_overlap(shuffled):
    alone = batches(micro_batches_per_step=6, shuffled=shuffled)
    ranks = [batches(micro_batches_per_step=2, rank=r, num_ranks=3, shuffled=shuffled) for r in range(3)]
    for step in range(12):
        parts = [ranks[r].window(step)[m] for m in range(2) for r in range(3)]
        assert [len(ranks[r].window(step)) for r in range(3)] == [2, 2, 2]
        for batch, expected in zip(parts, alone.window(step), strict=True):
            assert batch.domain == expected.domain and torch.equal(batch.input_ids, expected.input_ids)


def test_every_domain_occurs_once_a_round_in_a_newly_drawn_order():
    names = [batch.domain for step in range(80) for batch in batches().window(step)]  # 240 = 60 rounds of 4
    rounds = [tuple(names[i : i + 4]) for i in range(0, 240, 4)]
    assert all(sorted(order) == ["a", "b", "c", "d"] for order in rounds)
    assert len(set(rounds)) > 15  # of 24 possible orders
    assert max(Counter(order[0] for order in rounds).values()) < 30  # 15 expected for each


def test_each_sequence_occurs_once_an_epoch_and_epochs_differ():
    stream: dict[str, list[int]] = {name: [] for name in "abcd"}
    for step in range(84):  # 252 micro-batches, 63 of each domain, 126 sequences: four epochs of the longest
        for batch in batches().window(step):
            stream[batch.domain] += batch.input_ids[:, 0].tolist()
    for index, (name, size) in enumerate(zip("abcd", (7, 12, 30, 16), strict=True)):
        epochs = [stream[name][i : i + size] for i in range(0, len(stream[name]) - size + 1, size)]
        assert len(epochs) >= 4
        assert all(sorted(epoch) == [1000 * index + row for row in range(size)] for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_shuffled_has_the_same_sequences_in_each_step_and_mixes_domains():
    mixing = []
    for step in range(20):
        ordered = batches(micro_batches_per_step=8).window(step)
        shuffled = batches(micro_batches_per_step=8, shuffled=True).window(step)
        assert Counter(origins(ordered)) == Counter(origins(shuffled)) and origins(ordered) != origins(shuffled)
        assert {batch.domain for batch in shuffled} == {"mixed"}
        mixing += [len(set((batch.input_ids[:, 0] // 1000).tolist())) for batch in shuffled]
    assert sum(mixing) / len(mixing) > 1.6  # 1 + 12/15 expected: 12 of the other 15 sequences are of another domain


def test_shuffled_draws_another_permutation_each_step():
    orders = set()
    for step in range(4):
        ordered = origins(batches(toy((90, 90)), micro_batches_per_step=8).window(step))
        shuffled = origins(batches(toy((90, 90)), micro_batches_per_step=8, shuffled=True).window(step))
        orders.add(tuple(ordered.index(row) for row in shuffled))
    assert len(orders) == 4


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("together", [2, 3, 6])
def test_joined_micro_batches_have_the_sequences_of_single_ones(together, shuffled):
    alone = batches(micro_batches_per_step=6, shuffled=shuffled)
    joined = batches(micro_batches_per_step=6, shuffled=shuffled, balance_batch=together)
    for step in range(5):
        one_by_one, window = alone.window(step), joined.window(step)
        assert [len(batch.input_ids) for batch in window] == [2 * together] * (6 // together)
        assert origins(window) == origins(one_by_one)
        for number, batch in enumerate(window):
            parts = {part.domain for part in one_by_one[number * together : (number + 1) * together]}
            assert batch.domain == (parts.pop() if len(parts) == 1 else "mixed")


def test_joined_micro_batches_of_one_domain_keep_its_name():
    assert {batch.domain for batch in batches(toy((30,)), balance_batch=3).window(0)} == {"a"}


def test_joined_micro_batches_are_the_same_on_any_number_of_ranks():
    alone = batches(micro_batches_per_step=12, balance_batch=2).window(3)
    for num in (2, 3):
        ranks = [
            batches(micro_batches_per_step=12 // num, balance_batch=2, rank=r, num_ranks=num).window(3)
            for r in range(num)
        ]
        dealt = [ranks[r][m] for m in range(6 // num) for r in range(num)]
        assert [origins([batch]) for batch in dealt] == [origins([batch]) for batch in alone]


def test_batches_can_use_another_split(folder, tmp_path):
    corpus = load(folder, tmp_path / "cache")
    window = batches(corpus, sequence_length=16, split="test").window(0)
    rows = {tuple(row) for row in corpus.sequences("test", window[0].domain, 16).tolist()}
    assert {tuple(row) for row in window[0].input_ids.tolist()} <= rows


# ---- bad input ------------------------------------------------------------------------------------------------------


def put(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder


GOOD = b'{"text": "good"}\n'


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        (
            "a.csv",
            b"id,body\n1,x\n",
            r"one column \"text\": .*a\.csv has the columns \['id', 'body'\]\. .*--text-key, or",
        ),
        ("a.csv", b'text\n"open\n', r"a\.csv must be a csv file: row 2: unexpected end of data\. .*damaged"),
        ("a.csv", b"\n", r"must have one column \"text\": .*a\.csv has the columns \[\]"),
        ("a.csv", b"id,text\n1\n", r"string in its field \"text\": .*a\.csv, row 2 has none"),
        ("a.bin", b"text\0", r"one text file or .*: .* contains none of these \(skipped 1 file: 1 not text \(a\.bin"),
        ("a.xz", b"text\n", r"a\.xz must be an xz file: .*damaged"),
        ("a.txt.gz", b"text\n", r"a\.txt\.gz must be a gzip file: .*damaged"),
        (
            "a.txt.gz",
            gzip.compress(b"text" * 99, mtime=0)[:-9],
            r"a\.txt\.gz must be a gzip file: .*damaged",
        ),  # one time, so that workers agree on the name
        ("d/a.py", b"caf\xe9", r"must be UTF-8: .*d/a\.py is invalid at byte 3"),
        ("a.md", "text".encode("utf-16"), r"must be UTF-8: .*a\.md is invalid at byte 0"),
        ("README.md", b"only this", r"must contain one text file or one sub-folder .*: .* contains none of these"),
        ("d/README.md", b"only this", r"domain's folder must contain text: .*d contains none"),
        ("a.txt", b"", r"must contain text: .*a\.txt is empty"),
        ("a.parquet", b"", r"must contain text: .*a\.parquet is empty"),
        ("a.txt", b"one document\n", r"at least 4 different documents.*'a' in .* has 1\. Split its text"),
        ("a.txt", b" \n\n\n", r"at least 4 different documents.*'a' in .* has 0"),
        ("a.jsonl", GOOD * 9, r"at least 4 different documents.*'a' in .* has 1"),
        ("a.txt", b"abc\n\nd\xff\n", r"must be UTF-8: .*a\.txt is invalid at byte 6 \(value 0xff\)"),
        ("a.txt.xz", lzma.compress(b"ab\xe9"), r"must be UTF-8: .*a\.txt\.xz is invalid at byte 2"),
        ("a.jsonl", GOOD + b'{"text": "half\n', r"must be JSON: .*a\.jsonl, line 2: .*damaged"),
        (
            "a.jsonl",
            GOOD + b'\n{"content": "x"}\n',
            r'"text": .*a\.jsonl, line 3 has none \(its fields: content\)\. .*--text-key',
        ),
        ("a.jsonl", b'["text"]\n', r'string in its field "text": .*a\.jsonl, line 1 has none'),
        ("a.jsonl", b'{"text": 7}\n', r'string in its field "text": .*a\.jsonl, line 1 has none'),
        ("a.jsonl", b'{"text": "a\\ud800"}\n', r"line 1 has half a surrogate pair at character 1"),
        ("a.jsonl.xz", b"no xz at all", r"a\.jsonl\.xz must be an xz file: .*damaged"),
        ("a.jsonl.xz", lzma.compress(GOOD * 99)[:-9], r"a\.jsonl\.xz must be an xz file: .*damaged"),
        ("a.parquet", b"PAR1 and then nothing", r"a\.parquet must be a parquet file: .*damaged"),
    ],
)
def test_bad_text_is_refused(tmp_path, name, content, match):
    put(tmp_path / "text", name, content)
    with pytest.raises(EquipoiseError, match=match) as caught:
        load(tmp_path / "text", tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_a_domain_name_that_is_not_utf8_is_refused(tmp_path):
    try:
        (tmp_path / "caf\udce9.txt").write_text("words")
    except OSError:
        pytest.skip("this file system has no such names")
    with pytest.raises(UsageError, match="The name of a domain must be UTF-8"):
        load(tmp_path, tmp_path / "cache")


def test_parquet_without_text_is_refused(tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"content": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(
        EquipoiseError, match=r'must have one column "text": .*a\.parquet has the columns \[\'content\'\]'
    ):
        load(tmp_path / "a.parquet", tmp_path / "cache")
    twice = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    parquet.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(EquipoiseError, match=r'must have one column "text": .*has the columns \[\'text\', \'text\'\]'):
        load(tmp_path / "a.parquet", tmp_path / "cache")
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(EquipoiseError, match=r'string in its field "text": .*a\.parquet, row 2 has none'):
        load(tmp_path / "a.parquet", tmp_path / "cache")


def _many_rows_of_one_string(path):
    """20 MB of text in less than a kilobyte."""
    import pyarrow
    from pyarrow import parquet

    rows = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 200, pyarrow.int32()), ["a" * 100_000])
    parquet.write_table(pyarrow.table({"text": rows}), path, compression="zstd")


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.txt.xz", lambda path: path.write_bytes(lzma.compress(bytes(20_000_000), preset=0))),
        ("a.jsonl.xz", lambda path: path.write_bytes(lzma.compress(GOOD) + lzma.compress(bytes(20_000_000), preset=0))),
        ("a.parquet", _many_rows_of_one_string),
        ("a.txt", lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 20_000_000)),
    ],
    ids=["xz", "second stream of xz", "parquet dictionary", "sparse file"],
)
@pytest.mark.parametrize("reader", ["train", "audit"])
def test_a_file_that_unfolds_beyond_the_limit_is_refused_before_it_fills_the_memory(
    tmp_path, monkeypatch, name, write, reader
):
    monkeypatch.setattr(text_files, "MAX_BYTES", 1_000_000)
    write(tmp_path / name)
    read = {
        "train": lambda: find_text(tmp_path, print).read(print, print),
        "audit": lambda: [read() for _, read in stream_text(tmp_path, print)],
    }[reader]
    tracemalloc.start()
    with pytest.raises(EquipoiseError, match=rf"must hold at most 1,000,000 bytes of text, unfolded: .*{name} holds"):
        read()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000


def test_a_line_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_LINE", 100)
    write_jsonl(tmp_path / "a.jsonl", ["short", "long" * 30])
    with pytest.raises(EquipoiseError, match=r"at most 100 characters: .*a\.jsonl, line 2 has 132"):
        find_text(tmp_path, print).read(print, print)


def test_rows_without_text_count_too(tmp_path, monkeypatch):
    """A column of empty strings needs no space in a file, but each row needs memory."""
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setattr(text_files, "MAX_BYTES", 1000)
    parquet.write_table(pyarrow.table({"text": [""] * 1001}), tmp_path / "a.parquet")
    with pytest.raises(EquipoiseError, match="at most 1,000 bytes of text"):
        find_text(tmp_path, print).read(print, print)


def test_files_at_the_limit_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_BYTES", 3_000_000)
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"a" * 1_500_000) + lzma.compress(b"b" * 1_500_000))
    assert find_text(tmp_path, print).read(print, print) == {"a": ["a" * 1_500_000 + "b" * 1_500_000]}


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "a/b/c", "nothing.txt", "owner/nothing.jsonl.xz"])
def test_a_missing_path_is_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)  # fails if one of these is taken for a data set
    with pytest.raises(
        UsageError, match=r"must be corpus, a folder, a file, or hf:NAME: .* does not exist here\. Check the path"
    ):
        load(path, tmp_path / "cache")


def test_an_empty_folder_and_two_sources_of_one_domain_are_refused(tmp_path):
    with pytest.raises(UsageError, match="contains none of these"):
        load(tmp_path, tmp_path / "cache")
    put(put(tmp_path / "text", "web.a.txt", b"x"), "web/b.txt", b"y")
    with pytest.raises(UsageError, match=r"'web' is both web/b\.txt and web\.a\.txt in .*Put both into one sub-folder"):
        load(tmp_path / "text", tmp_path / "cache")


def test_a_split_shorter_than_a_sequence_is_refused(folder, tmp_path):
    with pytest.raises(EquipoiseError, match=r"hold a sequence of 5000 tokens: the train text of 'ask' in .*Add text"):
        load(folder, tmp_path / "cache", sequence_length=5000)


def test_bad_options_are_refused(folder, tmp_path):
    with pytest.raises(UsageError, match=r"--vocab-size must be at least 300, .*got 299"):
        load(folder, tmp_path / "cache", vocab_size=299)
    with pytest.raises(UsageError, match=r"--vocab-size must be at most 1,000,000: got 10,000,000,000. Lower it"):
        load(folder, tmp_path / "cache", vocab_size=10**10)
    with pytest.raises(
        UsageError, match=r"must be a tokenizer\.json or a folder with one: .*none\.json does not exist"
    ):
        load(folder, tmp_path / "cache", tokenizer=tmp_path / "none.json")
    with pytest.raises(UsageError, match=r"must be a tokenizer\.json or a folder with one: .*tokenizer\.json does not"):
        load(folder, tmp_path / "cache", tokenizer=tmp_path)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(EquipoiseError, match=r"tokenizer\.json of the library tokenizers: .*bad\.json: .*Restore"):
        load(folder, tmp_path / "cache", tokenizer=tmp_path / "bad.json")
    content = load(folder, tmp_path / "cache").tokenizer_file.read_text().replace(END, "<|nonsense|>")
    (tmp_path / "endless.json").write_text(content)
    with pytest.raises(EquipoiseError, match=r"token for the end of a document: it has none of <\|endoftext\|>"):
        load(folder, tmp_path / "cache", tokenizer=tmp_path / "endless.json")


def test_bad_arguments_of_batches_and_corpus_are_refused():
    with pytest.raises(
        UsageError, match=r"micro-batch of 8 sequences: the train text of 'a' has 7 sequences of 4 tokens\. Add text"
    ):
        batches(sequences_per_micro_batch=8)
    for name in (
        "sequence_length",
        "sequences_per_micro_batch",
        "micro_batches_per_step",
        "balance_batch",
        "num_ranks",
    ):
        with pytest.raises(ValueError, match=rf"{name} must be at least 1: got 0"):
            batches(**{name: 0})
    with pytest.raises(ValueError, match="seed must be at least 0: got -1"):
        batches(seed=-1)
    with pytest.raises(ValueError, match="balance_batch must divide micro_batches_per_step: got 2 and 3"):
        batches(balance_batch=2)
    with pytest.raises(ValueError, match=r"got rank 2 of 2"):
        batches(rank=2, num_ranks=2)
    with pytest.raises(ValueError, match="step must be at least 0"):
        batches().window(-1)
    with pytest.raises(ValueError, match="split must be one of train, selection, test: got 'valid'"):
        batches(split="valid")
    with pytest.raises(ValueError, match="domain must be one of a, b, c, d: got 'e'"):
        toy().sequences("train", "e", 4)
    with pytest.raises(ValueError, match="length must be at least 1 token: got 0"):
        toy().sequences("train", "a", 0)


# ---- the packaged corpus --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_packaged_corpus_is_split_and_cached(tmp_path, monkeypatch):
    corpus = load_corpus("corpus", cache=tmp_path)
    assert len(corpus.domains) == 8 and corpus.vocab_size == 4096
    for domain in corpus.domains:
        held_out = [corpus.num_bytes[split][domain] for split in ("selection", "test")]
        tokens = sum(len(corpus.tokens[split][domain]) for split in ("selection", "test"))
        total = sum(held_out) + corpus.num_bytes["train"][domain]
        assert 0.05 * total <= sum(held_out) < 0.15 * total and tokens >= 20_000
        assert len(corpus.sequences("test", domain, 128)) > 40
        assert 2 < corpus.bytes_per_token("train", domain) < 4  # 0.55 nats per byte is 2 nats per token
    forbid_training(monkeypatch)
    assert same(corpus, load_corpus(cache=tmp_path))
    assert math.isclose(sum(len(t) for t in corpus.tokens["train"].values()), 3.95e6, rel_tol=0.02)

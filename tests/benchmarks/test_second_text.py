"""The second text: which files of a package are documents, and which of them are taken."""

import gzip
import importlib.util
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONG = "Zeile für Zeile. " * 40


@pytest.fixture
def second_text():
    spec = importlib.util.spec_from_file_location("benchmark_second_text", ROOT / "benchmarks" / "second_text.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _tar(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "elsewhere"
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return tarfile.open(fileobj=io.BytesIO(buffer.getvalue()))


def test_documents_are_the_long_texts_of_one_folder(second_text):
    tar = _tar(
        {
            "usr/man/de/a.gz": gzip.compress(LONG.encode()),
            "usr/man/de/short.gz": gzip.compress(b".so a"),
            "usr/man/de/link.gz": None,
            "usr/man/de/latin1.gz": gzip.compress(LONG.encode("latin-1")),
            "usr/man/de/other.txt": b"x" * 1000,
            "usr/man/fr/a.gz": gzip.compress(LONG.encode()),
        }
    )
    source = second_text.Source("manpages-de", "usr/man/de/", (".gz",))
    assert list(second_text.documents(tar, source)) == [LONG.strip()]


def test_as_many_as_fit_are_taken_in_an_order_that_does_not_depend_on_the_package(second_text):
    texts = [f"{number}" * 100 for number in range(10)]
    chosen = second_text.first_by_hash(iter([*texts, texts[0]]), most_bytes=450)
    assert len(chosen) == 4 and len(set(chosen)) == 4
    assert second_text.first_by_hash(reversed(texts), most_bytes=450) == chosen


def test_a_missing_package_is_named(second_text, tmp_path):
    command = [sys.executable, ROOT / "benchmarks/second_text.py", "--packages", tmp_path, "--out", tmp_path / "text"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "must hold one file of the package manpages-de: it has 0" in done.stderr

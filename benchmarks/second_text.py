"""Makes the second text of the evidence from packages of Debian: ``python benchmarks/second_text.py``.

    packages ──(apt-get download)──> documents by domain ──> runs/second_text/DOMAIN.jsonl, and README.md beside

Eight domains that a model must tell apart, in human and in programming languages: manual pages in German, French,
Spanish and Polish, Python's library and its documentation, modules of Perl, headers of C++. As in the packaged text,
each has about 1.5 MB: documents in the order of their hashes, as many as fit.

Needs Debian 12 (``apt-get``, ``dpkg-deb``), or the packages in a folder (``--packages``) and ``dpkg-deb``. Other
versions of the packages give another text; ``README.md`` has the versions and a hash of each domain. The texts are free
(MIT, GPL, PSF, Artistic licences), and they are not shipped.
"""

import argparse
import gzip
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
MOST_BYTES = 1_500_000  # of a domain
LEAST_CHARACTERS = 500  # of a document; shorter ones are mostly links to others


class Source(NamedTuple):
    """Where the documents of a domain are."""

    package: str
    folder: str  # in the package
    suffixes: tuple[str, ...]  # of file names


DOMAINS = {
    "manual_de": Source("manpages-de", "usr/share/man/de/", (".gz",)),
    "manual_es": Source("manpages-es", "usr/share/man/es/", (".gz",)),
    "manual_fr": Source("manpages-fr", "usr/share/man/fr/", (".gz",)),
    "manual_pl": Source("manpages-pl", "usr/share/man/pl/", (".gz",)),
    "python": Source("libpython3.11-stdlib", "usr/lib/python3.11/", (".py",)),
    "python_docs": Source("python3.11-doc", "usr/share/doc/python3.11/html/_sources/", (".rst.txt",)),
    "perl": Source("perl-modules-5.36", "usr/share/perl/", (".pm", ".pl", ".pod")),
    "cpp": Source("libstdc++-12-dev", "usr/include/c++/12/", ("",)),
}


def documents(tar: tarfile.TarFile, source: Source) -> Iterator[str]:
    """The texts of a package that are long enough. Links are left out, so no document comes twice."""
    for member in tar:
        name = member.name.removeprefix("./")
        if not (member.isfile() and name.startswith(source.folder) and name.endswith(source.suffixes)):
            continue
        file = tar.extractfile(member)
        assert file is not None
        content = file.read()
        try:
            text = (gzip.decompress(content) if name.endswith(".gz") else content).decode("utf-8").strip()
        except UnicodeDecodeError:
            continue
        if len(text) >= LEAST_CHARACTERS:
            yield text


def first_by_hash(texts: Iterator[str], most_bytes: int = MOST_BYTES) -> list[str]:
    """Different texts in the order of their hashes, as many as fit into ``most_bytes``."""
    by_hash = {hashlib.blake2b(text.encode()).digest(): text for text in texts}
    chosen, size = [], 0
    for _, text in sorted(by_hash.items()):
        if size + len(text.encode()) <= most_bytes:
            chosen.append(text)
            size += len(text.encode())
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/second_text", help="folder of the text")
    parser.add_argument("--packages", type=Path, help="folder with the .deb files; without it they are downloaded")
    options = parser.parse_args()
    if options.out.exists():
        sys.exit(f"--out must be a new folder: {options.out} exists. Remove it or choose another.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.packages or Path(temporary)
        if options.packages is None:
            packages = [source.package for source in DOMAINS.values()]
            _run(["apt-get", "download", *packages], folder)
        made = Path(temporary) / "text"
        made.mkdir()
        rows = [_make(domain, source, folder, made) for domain, source in DOMAINS.items()]
        table = ["| domain | documents | bytes | package | blake2b |", "|---|---|---|---|---|", *rows]
        (made / "README.md").write_text("\n".join(table) + "\n", encoding="utf-8")  # no text, to the lab
        options.out.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made, options.out)  # only now, so that a folder of this name is complete


def _make(domain: str, source: Source, packages: Path, out: Path) -> str:
    """Writes a domain; returns its row in the README."""
    files = sorted(packages.glob(f"{source.package}_*.deb"))
    if len(files) != 1:
        sys.exit(f"{packages} must hold one file of the package {source.package}: it has {len(files)}.")
    with tarfile.open(fileobj=io.BytesIO(_run(["dpkg-deb", "--fsys-tarfile", str(files[0])]))) as tar:
        texts = first_by_hash(documents(tar, source))
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    (out / f"{domain}.jsonl").write_text(content, encoding="utf-8")
    size = sum(len(text.encode()) for text in texts)
    print(f"{domain}: {len(texts)} documents, {size:,} bytes, from {files[0].name}")
    digest = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
    return f"| {domain} | {len(texts)} | {size:,} | {files[0].name} | {digest} |"


def _run(command: list[str], folder: Path | None = None) -> bytes:
    try:
        return subprocess.run(command, cwd=folder, check=True, capture_output=True).stdout
    except FileNotFoundError:
        sys.exit(f"this script must run where {command[0]} exists, as on Debian: it was not found.")
    except subprocess.CalledProcessError as error:
        sys.exit(f"`{' '.join(command)}` must succeed: it exited with {error.returncode}. {error.stderr.decode()}")


if __name__ == "__main__":
    main()

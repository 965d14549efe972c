"""What a run is made with: the commit of the code and the CPU. Imports no torch."""

import hashlib
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from equipoise.errors import EquipoiseError
from equipoise_lab.records import read_json, write_json

__all__ = ["NOT_RECORDED", "THREADS", "MadeWith", "commit", "cpu_name", "made_with", "remember"]

NOT_RECORDED = "not recorded"
THREADS = 1  # of a run
_SOURCE = Path(__file__).parents[2]  # the folder with the packages equipoise and equipoise_lab
_CODE_OF_RUNS = ("equipoise", "equipoise_lab", ":(exclude)equipoise_lab/reproduce")  # what a run imports
_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class MadeWith:
    """The commit of the code and the CPU."""

    commit: str
    cpu: str


def made_with() -> MadeWith:
    return MadeWith(commit(), cpu_name())


def commit(source: Path = _SOURCE) -> str:
    """The last commit that changed the code of a run, with "+ changes" and a fingerprint of these if that code differs
    from it now.

    Files of claims and of results do not count: while they are added and committed, runs go on and stay comparable.
    If the code lies outside a repository of its own: the version of the package. If git cannot be asked in a clone, it
    says that the commit is unknown.
    """
    if _git(source, "ls-files", "--error-unmatch", "equipoise/__init__.py") is None:
        is_clone = (source.parent / ".git").exists() and _git(source, "rev-parse") is None
        try:
            return f"equipoise {version('equipoise')}{', commit unknown' if is_clone else ''}"
        except PackageNotFoundError:
            return NOT_RECORDED
    name = _git(source, "log", "-1", "--format=%h", "--abbrev=12", "--", *_CODE_OF_RUNS)
    changes = _git(source, "--no-optional-locks", "status", "--porcelain", "--", *_CODE_OF_RUNS)
    if not name or changes is None:
        raise EquipoiseError(
            f"git must say at which commit {source} is, since results name it: it did not. Try `git status` there."
        )
    return f"{name} + changes {_fingerprint(source)}" if changes else name


def _fingerprint(source: Path) -> str:
    """A hash of all that differs from the last commit, in tracked and untracked files."""
    of_changes = hashlib.sha256((_git(source, "diff", "HEAD", "--", *_CODE_OF_RUNS) or "").encode())
    new = _git(source, "ls-files", "--others", "--exclude-standard", "--", *_CODE_OF_RUNS) or ""
    for file in new.splitlines():
        of_changes.update(file.encode() + (source / file).read_bytes())
    return of_changes.hexdigest()[:8]


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None if it is not there or fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_name(cpu_info: Path = _CPU_INFO) -> str:
    """The name of the CPU's model, with its numbers: virtual machines often give many models one name. Where the system
    does not say it, its architecture."""
    try:
        first_core = cpu_info.read_text(errors="replace").partition("\n\n")[0]
    except OSError:
        first_core = ""
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first_core.splitlines())}
    if not values.get("model name"):
        return platform.processor() or platform.machine() or NOT_RECORDED
    numbers = " ".join(f"{key} {values[key]}" for key in ("cpu family", "model", "stepping") if key in values)
    return values["model name"] + (f" ({numbers})" if numbers else "")


def remember(path: Path, folder: Path) -> MadeWith:
    """What the run in ``folder``, which starts now, is made with, stored in ``path`` until its result is.

    A run that goes on from a checkpoint names what its parts were made with, one after the other.
    """
    now = made_with()
    is_complete = (folder / "result.json").exists()  # so nothing of it is made now
    if is_complete or any(folder.glob("checkpoints/*")):
        before = MadeWith(**read_json(path)) if path.exists() else MadeWith(NOT_RECORDED, NOT_RECORDED)
        now = before if is_complete else MadeWith(_then(before.commit, now.commit), _then(before.cpu, now.cpu))
    write_json(path, {"commit": now.commit, "cpu": now.cpu})
    return now


def _then(before: str, now: str) -> str:
    return before if before.split(", then ")[-1] == now else f"{before}, then {now}"

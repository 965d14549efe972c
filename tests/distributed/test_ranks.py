"""The helper that runs ranks: it brings back what each returned, says what failed, and leaves no process behind."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import run_on_ranks

pytestmark = pytest.mark.xdist_group("ranks")
HERE = Path(__file__).parent


def _processes(session: int) -> list[str]:
    """What runs in this session of the system."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(after_name[3]) == session and after_name[0] != "Z":
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")
def test_no_process_is_left_behind():
    code = "from ranks import run_on_ranks\nimport operator\nprint(run_on_ranks(2, operator.neg))"
    program = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path[:0] = ['{HERE.parent}', '{HERE}']\n{code}"],
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert program.communicate(timeout=60)[0].strip() == "[0, -1]"
    until = time.monotonic() + 20
    while (left := _processes(program.pid)) and time.monotonic() < until:
        time.sleep(0.1)
    assert left == []


def test_the_search_for_processes_finds_one():
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as program:
        until = time.monotonic() + 10
        while _processes(program.pid) == [""] and time.monotonic() < until:  # not begun yet, on a busy machine
            time.sleep(0.05)
        assert _processes(program.pid) == ["sleep 60 "]
        program.kill()


def test_what_a_rank_raises_comes_back_and_keeps_nobody_waiting():
    found = run_on_ranks(2, divmod, 0)
    assert all("ZeroDivisionError" in text for text in found)

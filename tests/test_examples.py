"""The examples run as they are written, on a small model that the lab saved."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = "--steps 4 --layers 1 --width 32 --experts 8 --experts-per-token 2 --expert-width 16 --sequence-length 32"


def _run(*command, cwd=None):
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    text = folder / "text.txt"
    text.write_text(
        "\n\n".join(f"Of {n} eggs {n * 7 % 5} were left, said the hen to her {n} chicks." for n in range(600))
    )
    _run("-m", "equipoise", "train", "--out", folder / "run", *SMALL.split())
    return folder / "run" / "model", text


def test_fine_tuning_with_the_trainer(base, tmp_path):
    model, text = base
    shown = _run(EXAMPLES / "finetune_trainer.py", model, text, "--out", tmp_path, "--steps", 4)
    assert "loss of held-out text: " in shown
    before, after = (float(part.split()[0]) for part in shown.split("text: ")[1].split(" -> "))
    assert after < before
    rows = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert sum("equipoise/maxvio_batch" in row for row in rows) == 4
    assert "MaxVio" in (tmp_path / "curves.html").read_text() and (tmp_path / "model" / "model.safetensors").exists()


def test_fine_tuning_in_a_loop_of_ones_own(base, tmp_path):
    shown = _run(EXAMPLES / "finetune_loop.py", *base, 2, cwd=tmp_path)
    note, *steps = shown.splitlines()
    assert note.startswith("In 2 steps at rate 0.001") and [line.split(":")[0] for line in steps] == [
        "step 1",
        "step 2",
    ]
    assert (tmp_path / "runs" / "tuned" / "model.safetensors").exists()
    assert len((EXAMPLES / "finetune_loop.py").read_text().splitlines()) <= 34

"""The examples run as they are written: with what they make themselves, and on a small model that the lab saved."""

import functools
import importlib.util
import json
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import equipoise

FOLDER = Path(__file__).parent.parent / "examples"
ENVIRONMENTS = Path(__file__).parent / "frameworks" / "environments"  # their tests run the examples of frameworks
FRAMEWORKS = {f"{path.stem}_loop" for path in ENVIRONMENTS.glob("*.txt")}
EXAMPLES = sorted(path for path in FOLDER.glob("*.py") if path.stem not in FRAMEWORKS)
SMALL = "--steps 4 --layers 1 --width 32 --experts 8 --experts-per-token 2 --expert-width 16 --sequence-length 32"
every_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)


def _run(*command, cwd=None):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def _table(shown):
    """The table at the end: by strategy, its figures."""
    _, table = shown.rsplit("\nstrategy ", 1)
    titles, *rows = table.strip().splitlines()
    assert titles.split("  ")[-1].strip() == "loss, nats"
    return {name: [float(figure) for figure in figures] for name, *figures in map(str.split, rows)}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """What an example prints with --smoke, run once in an empty folder."""
    return functools.cache(lambda example: _run(example, "--smoke", cwd=tmp_path_factory.mktemp(example.stem)))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    text = folder / "text.txt"
    text.write_text(
        "\n\n".join(f"Of {n} eggs {n * 7 % 5} were left, said the hen to her {n} chicks." for n in range(1500))
    )
    _run("-m", "equipoise", "train", "--out", folder / "run", *SMALL.split())
    return folder / "run" / "model", text


# ---- all of them ----


@every_example
def test_help_names_every_option_and_how_long_it_takes(example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [example.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(example), run_name="__main__")
    shown, source = capsys.readouterr().out, example.read_text()
    assert ended.value.code == 0
    options = re.findall(r'add_argument\(\s*"(--[\w-]+)"', source)
    assert {"--steps", "--strategy", "--smoke"} <= set(options)
    assert source.count("add_argument(") == len(options)
    for option in options:
        assert re.search(rf"^  {option}\b.*", shown, re.MULTILINE)
    assert re.search(r"Takes\s+about", shown)


@every_example
def test_it_runs_without_any_file_and_compares_with_no_balancing(example, smoke):
    table = _table(smoke(example))
    strategies = [name for name in table if name != "before"]
    assert strategies[0] == "none" and len(strategies) == 2
    assert all(math.isfinite(figure) for figures in table.values() for figure in figures)


@pytest.mark.parametrize("example", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_the_page_of_the_examples_names_it(example):
    assert f"[{example.name}]({example.name})" in (FOLDER / "README.md").read_text()


@pytest.mark.slow
def test_pretraining_shows_the_effect(tmp_path):
    table = _table(_run(FOLDER / "pretrain_loop.py", "--steps", 60, "--strategy", "quantile", cwd=tmp_path))
    (unbalanced, dead, loss), (balanced, dead_balanced, loss_balanced) = table["none"], table["quantile"]
    assert balanced < unbalanced / 2 and dead_balanced <= dead
    assert loss_balanced < loss + 0.1


# ---- with a model and text of one's own ----


def test_fine_tuning_with_the_trainer(base, tmp_path):
    model, text = base
    example, loss = FOLDER / "finetune_trainer.py", "lbl:scope=global_batch,coefficient=1e-2"
    shown = _run(example, "--model", model, "--text", text, "--out", tmp_path, "--steps", 4, "--strategy", loss)
    changes = re.findall(r"^(.+): loss of held-out text: ([\d.]+) -> ([\d.]+)", shown, re.MULTILINE)
    assert [strategy for strategy, *_ in changes] == ["none", loss]
    assert all(float(after) < float(before) for _, before, after in changes)
    rows = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert sum("equipoise/maxvio_batch" in row for row in rows) == 4
    assert "MaxVio" in (tmp_path / "curves.html").read_text() and (tmp_path / "model" / "model.safetensors").exists()


def test_fine_tuning_in_a_loop_of_ones_own(base, tmp_path):
    model, text = base
    shown = _run(FOLDER / "finetune_loop.py", "--model", model, "--text", text, "--steps", 4, cwd=tmp_path)
    strategy = "frozen+lbl:scope=global_batch,coefficient=1e-2"  # the lab's model brings a bias
    assert re.findall(rf"^{re.escape(strategy)}: step (\d)", shown, re.MULTILINE) == ["1", "2", "3", "4"]
    table = _table(shown)
    assert list(table) == ["before", "none", strategy]
    assert table[strategy][-1] < table["before"][-1]
    assert (tmp_path / "runs" / "tuned" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["finetune_loop", "finetune_trainer"])
def test_a_text_that_is_too_short_is_refused_with_what_it_must_fill(name, base, tmp_path, monkeypatch):
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    monkeypatch.setattr(sys, "argv", [name, "--model", str(base[0]), "--text", str(short)])
    with pytest.raises(SystemExit, match="The text must fill 128 rows of 128 tokens: it fills 0."):
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")


# ---- Accelerate ----

BIAS = "loss-free:rate=1e-2+lbl:scope=sequence,coefficient=1e-4"  # exact in any division of the micro-batches
_RUN_AND_CHECK_CLEANUP = """
import runpy, torch

runpy.run_path({example!r}, run_name="__main__")
assert not torch.distributed.is_initialized(), "a rank that ends without destroying its process groups may abort"
"""


def _steps(shown):
    """MaxVio by step, as the example prints it for each strategy."""
    lines = re.findall(r"^(.+): step \d+: MaxVio ([\d.]+)$", shown, re.MULTILINE)
    return {name: [value for other, value in lines if other == name] for name in dict.fromkeys(n for n, _ in lines)}


def _by_hand(strategy):
    """The same loop without Accelerate: one process with all micro-batches of a step."""
    spec = importlib.util.spec_from_file_location("accelerate_loop", FOLDER / "accelerate_loop.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    rows = example.read_rows(10_000)[32:]
    micro_batches = list(rows[: 3 * example.MICRO_BATCHES * example.ROWS].split(example.ROWS))
    model = example.make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    balance = equipoise.attach(model, strategy)
    max_violations = []
    for start in range(0, len(micro_batches), example.MICRO_BATCHES):
        for ids in micro_batches[start : start + example.MICRO_BATCHES]:
            loss = model(input_ids=ids, labels=ids).loss + balance.loss()
            (loss / example.MICRO_BATCHES).backward()
        optimizer.step()
        optimizer.zero_grad()
        balance.step()
        max_violations.append(f"{balance.metrics()['maxvio_batch']:.2f}")
    return max_violations


def test_the_loop_over_accelerate_equals_a_loop_without_it(smoke):
    steps = _steps(smoke(FOLDER / "accelerate_loop.py"))
    assert list(steps) == ["none", "lbl:scope=global_batch,coefficient=1e-2"]
    assert steps == {strategy: _by_hand(strategy) for strategy in steps}


def test_the_loop_under_lightning_equals_a_loop_without_it(smoke):
    steps = _steps(smoke(FOLDER / "lightning_loop.py"))
    assert list(steps) == ["none", "lbl:scope=global_batch,coefficient=1e-2"]
    assert steps == {strategy: _by_hand(strategy) for strategy in steps}


@pytest.mark.slow
def test_on_two_ranks_it_equals_one_process_with_the_tokens_of_both(tmp_path):
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    script = tmp_path / "run_and_check_cleanup.py"
    script.write_text(_RUN_AND_CHECK_CLEANUP.format(example=str(FOLDER / "accelerate_loop.py")))
    shown = _run(*launch, script, "--smoke", "--strategy", BIAS)
    assert _steps(shown) == {name: _by_hand(name) for name in ("none", BIAS)}

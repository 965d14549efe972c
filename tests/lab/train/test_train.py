"""Training runs: records, resuming, checkpoints, saved models and refused options."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import safetensors.torch
import shrunken
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

import equipoise
from equipoise.errors import EquipoiseError, UsageError
from equipoise_lab.records import Run
from equipoise_lab.train import checkpoint
from equipoise_lab.train import loop as training
from equipoise_lab.train.config import ARCHITECTURES
from equipoise_lab.train.engine import learning_rate_at
from equipoise_lab.train.loop import train

KEYS = [
    "strategy", "seed", "steps", "tokens", "val_nats", "val_perplexity", "val_bits_per_byte", "maxvio_global",
    "maxvio_batch", "maxvio_micro", "domain_information_bits", "dead_experts", "tokens_per_second", "domains",
    "train_nats", "selection_nats", "selection_maxvio",
]  # fmt: skip


def _without_times(result):
    return {key: value for key, value in result.items() if key != "tokens_per_second"}


def _rows(folder, log="steps"):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in Run(folder).rows(log)]


def test_train_writes_a_whole_run_folder(tiny, new_watcher):
    config, watcher = tiny(steps=20, evaluate_every=8), new_watcher()
    result = train(config, watcher)
    run = Run(config.out)
    assert run.complete
    assert run.result == result
    assert set(KEYS) <= set(result)
    steps, loads = list(run.rows("steps")), list(run.rows("loads"))
    assert [row["step"] for row in steps] == list(range(1, 21)) == [row["step"] for row in loads]
    assert [row["tokens"] for row in steps] == [96 * step for step in range(1, 21)]
    assert all(sum(layer) == 3 * 2 * 16 * 2 for row in loads for layer in row["load"])  # micro x sequences x length x k
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert result["tokens"] == 20 * 96
    for name, of_step in (("maxvio_batch", "maxvio_batch"), ("maxvio_micro", "maxvio_micro"), ("train_nats", "loss")):
        assert result[name] == pytest.approx((steps[18][of_step] + steps[19][of_step]) / 2, rel=1e-12)  # the last tenth
    assert steps[18]["loss"] != steps[19]["loss"]
    assert result["maxvio_micro"] > result["maxvio_batch"]
    seconds = sorted(row["seconds"] for row in steps)
    assert result["tokens_per_second"] == pytest.approx(96 / ((seconds[9] + seconds[10]) / 2)) == watcher.speeds[-1]
    evaluations = list(run.rows("evaluations"))
    assert [(row["step"], row["split"]) for row in evaluations] == [
        (8, "selection"),
        (16, "selection"),
        (20, "selection"),
        (20, "test"),
    ]
    assert result["selection_nats"] == evaluations[2]["val_nats"] != result["val_nats"] == evaluations[3]["val_nats"]
    assert result["selection_maxvio"] == evaluations[2]["maxvio_global"]
    assert len(watcher.rows) == 20
    assert not (config.out / "checkpoints").exists()
    assert run.config["layers"] == ["model.layers.0.mlp.gate"]
    assert run.config["num_active_parameters"] < run.config["num_parameters"]


def test_every_strategy_starts_from_the_same_weights_and_sees_the_same_text(tiny, new_watcher, tmp_path):
    rows = []
    for number, strategy in enumerate(("none", "lbl:scope=micro_batch", "loss-free:rate=1e-2")):
        config = tiny(strategy=strategy, steps=2, out=tmp_path / str(number), save_model=False)
        train(config, new_watcher())
        rows.append(_rows(config.out))
    assert rows[0][0]["loss"] == rows[1][0]["loss"] == rows[2][0]["loss"]
    assert rows[0][0]["maxvio_batch"] == rows[1][0]["maxvio_batch"] == rows[2][0]["maxvio_batch"]
    assert rows[0][1]["loss"] != rows[1][1]["loss"], "the balancing loss did not reach the weights"
    assert all(row["learning_rate"] == rows[0][i]["learning_rate"] for r in rows for i, row in enumerate(r))


def test_another_seed_gives_other_weights_and_another_order(tiny, new_watcher, tmp_path):
    losses = []
    for seed in (0, 1):
        config = tiny(seed=seed, steps=1, out=tmp_path / str(seed), save_model=False)
        train(config, new_watcher())
        losses.append(_rows(config.out)[0]["loss"])
    assert losses[0] != losses[1]


def test_two_runs_of_the_same_options_are_the_same_bit_for_bit(tiny, new_watcher, tmp_path):
    first, second = (train(tiny(out=tmp_path / name, dtype="auto"), new_watcher()) for name in "ab")
    assert _without_times(first) == _without_times(second)
    for log in ("steps", "loads", "evaluations"):
        assert _rows(tmp_path / "a", log) == _rows(tmp_path / "b", log)


def test_the_recorded_balancing_loss_is_the_mean_of_the_micro_batches(tiny, new_watcher):
    """If tokens take all experts, the loss of a layer is 1. Here: two layers, times 0.25."""
    config = tiny(strategy="lbl:scope=micro_batch,coefficient=0.25", experts_per_token=4, layers=2, steps=1)
    train(config, new_watcher())
    assert _rows(config.out)[0]["balancing_loss"] == pytest.approx(0.5)


def test_only_matrices_have_weight_decay(tiny, new_watcher):
    run = training._Training(tiny(weight_decay=0.25), new_watcher(), "")
    decay = {p: group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    weights = dict(run.model.named_parameters())
    assert {name: decay[p] for name, p in weights.items()} == {
        name: 0.25 * (p.dim() > 1) for name, p in weights.items()
    }
    assert set(decay.values()) == {0.25, 0.0}


def test_the_records_of_a_step_are_on_the_disk_before_its_checkpoint_is_saved(tiny, new_watcher, monkeypatch):
    on_disk, saved = {}, []  # on_disk: number of bytes by inode

    def fsync(handle):
        on_disk[os.fstat(handle).st_ino] = os.fstat(handle).st_size

    def save(folder, step, *rest):
        logs = [(folder.parent / f"{log}.jsonl").stat() for log in ("steps", "loads")]
        saved.append((step, [on_disk.get(log.st_ino) == log.st_size for log in logs]))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(training.checkpoint, "save", save)
    train(tiny(save_model=False), new_watcher())
    assert saved == [(5, [True, True]), (10, [True, True])]


@pytest.mark.parametrize("stop_after", [3, 5, 8, 12])
def test_a_resumed_run_equals_an_uninterrupted_one(tiny, new_watcher, tmp_path, stop_after):
    whole = train(tiny(out=tmp_path / "whole", evaluate_every=4), new_watcher())
    config = tiny(out=tmp_path / "cut", evaluate_every=4)
    with pytest.raises(KeyboardInterrupt):
        train(config, new_watcher(stop_after))
    watcher = new_watcher()
    resumed = train(tiny(out=tmp_path / "cut", evaluate_every=4, resume=True), watcher)
    assert watcher.done == (stop_after - 1) // 5 * 5  # the step is shown before its checkpoint is written
    assert _without_times(resumed) == _without_times(whole)
    for log in ("steps", "loads", "evaluations"):
        assert _rows(tmp_path / "cut", log) == _rows(tmp_path / "whole", log)


@pytest.mark.slow
def test_a_killed_run_resumes_like_an_uninterrupted_one(tiny, new_watcher, tmp_path):
    whole = train(tiny(out=tmp_path / "whole", steps=40), new_watcher())
    config = tiny(out=tmp_path / "cut", steps=40)
    options = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in {**config.shared(), "strategy": config.strategy, "out": config.out}.items()
        if value is not None and not isinstance(value, bool)
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "equipoise", "train", *options],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    steps = config.out / "steps.jsonl"
    deadline = time.monotonic() + 120
    while not steps.exists() or steps.read_bytes().count(b"\n") < 7:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Run(config.out).complete
    resumed = train(tiny(out=tmp_path / "cut", steps=40, resume=True), new_watcher())
    assert _without_times(resumed) == _without_times(whole)
    assert _rows(tmp_path / "cut") == _rows(tmp_path / "whole")


def _flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1  # in a tensor: safetensors alone would load it
    path.write_bytes(content)


def test_a_damaged_newest_checkpoint_is_reported_and_the_previous_one_used(tiny, new_watcher, tmp_path):
    whole = train(tiny(out=tmp_path / "whole"), new_watcher())
    config = tiny(out=tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        train(config, new_watcher(11))
    newest = tmp_path / "cut" / "checkpoints" / "step-00000010"
    _flip_a_bit(newest / "state.safetensors")
    watcher = new_watcher()
    with pytest.raises(KeyboardInterrupt):
        train(tiny(out=tmp_path / "cut", resume=True), new_watcher(8))
    names = sorted(path.name for path in newest.parent.iterdir())
    assert names == ["damaged-step-00000010", "step-00000005"], "the damaged one is not taken for the newest"
    newest.with_name("damaged-step-00000010").rename(newest)
    resumed = train(tiny(out=tmp_path / "cut", resume=True), watcher)
    assert any(
        "step-00000010 cannot be read (ValueError: state.safetensors is not the one" in line for line in watcher.said
    )
    assert watcher.done == 5
    assert _without_times(resumed) == _without_times(whole)


def test_a_stop_after_the_last_step_leaves_its_checkpoint_as_it_is(tiny, new_watcher, monkeypatch):
    """Its evaluation is stopped, twice. To write the checkpoint again could lose it."""
    written, save = [], checkpoint.save

    def note(folder, step, *others):
        written.append(step)
        save(folder, step, *others)

    monkeypatch.setattr(checkpoint, "save", note)
    monkeypatch.setattr(training._Training, "_evaluate", lambda run, split: run._stop())
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            train(tiny(resume=resume), new_watcher())
    assert written == [5, 10, 12]


def test_a_run_that_does_not_fit_into_memory_says_so(tiny, new_watcher, monkeypatch):
    def fails(run):
        raise torch.OutOfMemoryError("Tried to allocate 3 GiB.")

    monkeypatch.setattr(training._Training, "run", fails)
    with pytest.raises(
        EquipoiseError, match="must fit into memory: .* seed 0, needs more. Tried to allocate 3 GiB. Use"
    ):
        train(tiny(), new_watcher())


def test_a_run_with_only_damaged_checkpoints_is_refused(tiny, new_watcher):
    config = tiny()
    with pytest.raises(KeyboardInterrupt):
        train(config, new_watcher(6))
    state = config.out / "checkpoints" / "step-00000005" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    before = (config.out / "steps.jsonl").read_bytes()
    with pytest.raises(EquipoiseError, match="all 1 in .* are damaged"):
        train(tiny(resume=True), new_watcher())
    assert (config.out / "steps.jsonl").read_bytes() == before


def test_a_complete_run_is_not_trained_again(tiny, new_watcher):
    config = tiny(steps=2)
    result = train(config, new_watcher())
    watcher = new_watcher()
    assert train(tiny(steps=2, resume=True), watcher) == result
    assert watcher.rows == []


def test_a_resumed_run_must_keep_its_options(tiny, new_watcher):
    train(tiny(steps=1), new_watcher())
    with pytest.raises(EquipoiseError, match="has learning_rate=0.003, got 0.01"):
        train(tiny(steps=1, learning_rate=0.01, resume=True), new_watcher())


def test_a_folder_with_other_files_is_left_unchanged(tiny, new_watcher):
    config = tiny()
    config.out.mkdir()
    (config.out / "thesis.tex").write_text("years of work")
    with pytest.raises(EquipoiseError, match=r"must be new or empty: .* holds thesis.tex"):
        train(config, new_watcher())
    with pytest.raises(EquipoiseError, match="config.json"):
        train(tiny(resume=True), new_watcher())
    assert [path.name for path in config.out.iterdir()] == ["thesis.tex"]
    assert (config.out / "thesis.tex").read_text() == "years of work"


def test_a_diverged_run_keeps_its_records_and_is_an_error(tiny, new_watcher, monkeypatch):
    original = training.language_model_loss
    calls = []

    def broken(model, ids):
        calls.append(1)
        return original(model, ids) * (math.nan if len(calls) > 6 else 1)

    monkeypatch.setattr(training, "language_model_loss", broken)
    config = tiny()
    with pytest.raises(EquipoiseError, match=r"must not diverge: .* is nan at step 3"):
        train(config, new_watcher())
    assert len(_rows(config.out)) == 3
    assert not Run(config.out).complete


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_trains(tiny, new_watcher, arch):
    result = train(tiny(arch=arch, steps=2), new_watcher())
    assert math.isfinite(result["val_nats"])


def test_interleaved_order_knows_fewer_micro_batches_and_gives_different_weights(tiny, new_watcher, tmp_path):
    losses = []
    for order in ("forwards_first", "interleaved"):
        config = tiny(order=order, strategy="lbl:scope=global_batch,coefficient=1", steps=3, out=tmp_path / order)
        train(config, new_watcher())
        losses.append([row["loss"] for row in _rows(config.out)])
    assert losses[0][0] == losses[1][0]
    assert losses[0][2] != losses[1][2]


def _logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_the_saved_model_of_a_slot_family_is_the_trained_one_in_plain_transformers(tiny, new_watcher):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = tiny(steps=4)
    train(config, new_watcher())
    model = AutoModelForCausalLM.from_pretrained(config.out / "model")
    slot = model.model.layers[0].mlp.gate.e_score_correction_bias
    assert slot.dtype == torch.float32
    assert slot.abs().max() > 0.005, "the biases were not saved"
    tokenizer = AutoTokenizer.from_pretrained(config.out / "model")
    assert tokenizer.decode(tokenizer("apple pear").input_ids) == "apple pear"
    row = list(Run(config.out).rows("evaluations"))[-1]
    total = []
    from equipoise_lab.train.data import load_corpus

    corpus = load_corpus(config.data, vocab_size=300, sequence_length=16)
    for domain in corpus.domains:
        ids = torch.tensor(corpus.sequences("test", domain, 16)[: row["domains"][domain]["tokens"] // 16].tolist())
        with torch.no_grad():
            total.append(float(model.eval()(input_ids=ids, labels=ids).loss))
    assert sum(total) / 3 == pytest.approx(row["val_nats"], rel=1e-5)  # batches of another size round differently


def test_the_saved_model_of_a_family_without_a_slot_carries_its_biases_beside_it(tiny, new_watcher):
    from transformers import AutoModelForCausalLM

    config = tiny(arch="qwen3_moe", strategy="loss-free:rate=0.5", steps=4)
    watcher = new_watcher()
    train(config, watcher)
    assert any("has no slot for biases" in line for line in watcher.said)
    folder = config.out / "model"
    assert json.loads((folder / "config.json").read_text())["equipoise"] == {"biases": "equipoise_biases.safetensors"}
    ids = torch.arange(64).view(4, 16)
    model = AutoModelForCausalLM.from_pretrained(folder)
    without = _logits(model, ids)
    balance = equipoise.attach(model, "frozen", biases=folder)
    assert max(float(bias.abs().max()) for bias in balance.biases.values()) > 0.01
    again = AutoModelForCausalLM.from_pretrained(folder)
    equipoise.attach(again, "frozen", biases=folder)
    assert torch.equal(_logits(model, ids), _logits(again, ids))
    assert not torch.equal(_logits(model, ids), without)


@pytest.mark.parametrize("tokenizer", ["given", "beside the weights"])
def test_training_can_start_from_a_saved_model(tiny, new_watcher, tmp_path, tokenizer):
    """In Python, too, a run stands for the model that it saved. The ids of another text are those of its tokenizer."""
    first = train(tiny(steps=12, out=tmp_path / "first"), new_watcher())
    file = tmp_path / "first" / "model" / "tokenizer.json"
    config = tiny(model=tmp_path / "first", steps=1, out=tmp_path / "second")
    if tokenizer == "given":
        file.rename(tmp_path / "tokenizer.json")
        with pytest.raises(EquipoiseError, match="--model must have the tokenizer that its weights were trained with"):
            train(config, new_watcher())
        config, file = replace(config, tokenizer=tmp_path / "tokenizer.json"), tmp_path / "tokenizer.json"
    assert config.model == tmp_path / "first" / "model"
    other = tmp_path / "text"
    shutil.copytree(config.data, other)
    (other / "river.txt").write_text((other / "river.txt").read_text().replace("rhine", "zzzz"))
    saved = train(replace(config, data=str(other), out=tmp_path / "other"), new_watcher())
    assert (tmp_path / "other" / "model" / "tokenizer.json").read_bytes() == file.read_bytes() and saved
    train(config, new_watcher())
    assert _rows(config.out)[0]["loss"] < _rows(tmp_path / "first")[0]["loss"] - 0.1
    assert math.isfinite(first["val_nats"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "loss-free:rate=0"}, "rate must be above 0"),
        (
            {"strategy": "lossfree"},
            "must be none, or made of .*, or a recipe .*: got 'lossfree'. Did you mean loss-free",
        ),
        ({"steps": 0}, "--steps must be at least 1: got 0"),
        ({"width": 40}, "--width must be a multiple of 32"),
        ({"experts_per_token": 5}, "must be at most --experts: got 5 and 4"),
        ({"learning_rate": float("nan")}, "--learning-rate must be a finite number above 0: got nan"),
        ({"warmup": 1.0}, "--warmup must be a share"),
        ({"decay_to": 1.5}, "--decay-to must be a share of the peak learning rate, from 0 to 1: got 1.5"),
    ],
)
def test_invalid_options_are_refused_before_anything_is_written(tiny, new_watcher, options, message):
    config = tiny(**options)
    with pytest.raises(UsageError, match=message):
        train(config, new_watcher())
    assert not config.out.exists()


def test_learning_rate_rises_and_falls():
    rates = [learning_rate_at(step, steps=100, peak=2.0, warmup=0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == 2.0
    assert rates[-1] == pytest.approx(0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate_at(0, steps=1, peak=1.0, warmup=0.0) == 1.0
    to_zero = [learning_rate_at(step, steps=100, peak=2.0, warmup=0.1, decay_to=0.0) for step in range(100)]
    assert to_zero[:10] == rates[:10] and to_zero[-1] == 0.0 and 0 < to_zero[-2] < 0.01


def test_a_run_is_not_continued_over_a_gap_in_its_records(tiny, new_watcher):
    config = tiny()
    with pytest.raises(KeyboardInterrupt):
        train(config, new_watcher(11))
    log = config.out / "loads.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:3]))
    with pytest.raises(EquipoiseError, match="all 10 steps before its checkpoint: .*loads.jsonl has 3"):
        train(tiny(resume=True), new_watcher())


def test_a_run_with_nan_results_writes_valid_json(tiny, new_watcher, monkeypatch):
    original = training.evaluate

    def diverged(*a, **k):
        figures, audited = original(*a, **k)
        return figures | {"val_nats": math.nan}, audited

    monkeypatch.setattr(training, "evaluate", diverged)
    monkeypatch.setattr(training.nn.utils, "clip_grad_norm_", lambda *args: torch.tensor(math.inf))
    config = tiny(steps=1, save_model=False)
    result = train(config, new_watcher())
    assert result["val_nats"] is None
    assert result == Run(config.out).result
    for path in config.out.glob("*.json*"):
        assert not {"NaN", "Infinity"} & set(path.read_text().replace(",", ":").replace("}", ":").split(":"))
    assert _rows(config.out)[0]["grad_norm"] is None


def test_leftover_checkpoints_of_a_complete_run_are_removed(tiny, new_watcher):
    config = tiny(steps=1)
    train(config, new_watcher())
    (config.out / "checkpoints" / "step-00000001").mkdir(parents=True)
    train(tiny(steps=1, resume=True), new_watcher())
    assert not (config.out / "checkpoints").exists()


@pytest.mark.parametrize(("most_bytes", "message"), [(60_000, "A checkpoint must"), (20_000, "The trained model must")])
def test_a_full_disk_is_one_error_and_the_run_can_be_resumed(tiny, new_watcher, tmp_path, most_bytes, message):
    resource = pytest.importorskip("resource")
    steps = 12 if most_bytes > 20_000 else 3
    whole = train(tiny(out=tmp_path / "whole", steps=steps), new_watcher())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        with pytest.raises(EquipoiseError, match=message):
            train(tiny(steps=steps), new_watcher())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert _without_times(train(tiny(steps=steps, resume=True), new_watcher())) == _without_times(whole)


@pytest.mark.parametrize("moment", ["write", "read"])
def test_ctrl_c_during_a_checkpoint_is_not_reported_as_damage(tiny, new_watcher, monkeypatch, moment):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    config, watcher = tiny(), new_watcher()
    if moment == "read":
        with pytest.raises(KeyboardInterrupt):
            train(config, new_watcher(11))
        monkeypatch.setattr(safetensors, "safe_open", stop)
    else:
        monkeypatch.setattr(safetensors.torch, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(resume=moment == "read"), watcher)
    assert not any("cannot be read" in line for line in watcher.said)


def test_a_resumed_run_keeps_its_precision_and_reports_what_changed(tiny, new_watcher, monkeypatch):
    config = tiny(dtype="auto")
    monkeypatch.setattr(training, "machine", lambda dtype: (torch.device("cpu"), False))
    with pytest.raises(KeyboardInterrupt):
        train(config, new_watcher(6))
    monkeypatch.setattr(training, "machine", lambda dtype: (torch.device("cpu"), True))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    watcher = new_watcher()
    again = training._Training(tiny(dtype="auto", resume=True), watcher, "")
    assert not again.autocast
    assert any("threads changed" in line for line in watcher.said)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a tiny model of Transformers and its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=300, hidden_size=32, intermediate_size=16, moe_intermediate_size=16, head_dim=32,
        num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(5)  # not the seed of the runs
    folder = tmp_path_factory.mktemp("saved")
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "apple": 1, "iron": 2, "?": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


@pytest.mark.parametrize("kind", ["safetensors", "bin", "config"])
def test_a_model_saved_in_bfloat16_trains_float32_weights(tiny, new_watcher, saved, tmp_path, kind):
    folder = _copy(saved, tmp_path)
    saved_weights = safetensors.torch.load_file(folder / "model.safetensors")
    if kind != "safetensors":
        (folder / "model.safetensors").unlink()
    if kind == "bin":
        torch.save(saved_weights, folder / "pytorch_model.bin")
    model = training._Training(tiny(model=folder), new_watcher(), "").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    embeddings = model.get_input_embeddings().weight.bfloat16()
    assert torch.equal(embeddings, saved_weights["model.embed_tokens.weight"]) == (kind != "config")


@pytest.mark.parametrize("damage", ["truncated", "missing", "size", "field"])
def test_a_damaged_model_is_refused_in_one_line(tiny, new_watcher, saved, tmp_path, damage):
    folder = _copy(saved, tmp_path)
    weights, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    tensors = safetensors.torch.load_file(weights)
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:300])
    elif damage == "missing":
        remaining = {name: value for name, value in tensors.items() if "experts" not in name}
        safetensors.torch.save_file(remaining, weights, metadata={"format": "pt"})
    else:
        config |= {"hidden_size": 64} if damage == "size" else {"num_hidden_layers": "three"}
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(EquipoiseError, match="--model must") as caught:
        train(tiny(model=folder, steps=1), new_watcher())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model.gguf", "adapter_config.json"])
def test_a_model_whose_weights_cannot_be_read_is_not_started_afresh(tiny, new_watcher, saved, tmp_path, name):
    folder = _copy(saved, tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / name).write_text('{"weight_map": {"model.norm.weight": "model-1.safetensors"}}')
    with pytest.raises(EquipoiseError, match="--model must contain all of its weights: .*remove all weight files"):
        train(tiny(model=folder, steps=1), new_watcher())


def test_biases_beside_a_model_are_loaded(tiny, new_watcher, saved, tmp_path):
    folder = _copy(saved, tmp_path)
    name = "model.layers.0.mlp.gate"
    safetensors.torch.save_file({name: torch.tensor([0.5, -0.5, 0.0, 0.0])}, folder / "equipoise_biases.safetensors")
    watcher = new_watcher()
    steered = training._Training(tiny(model=folder, strategy="frozen", out=tmp_path / "a"), watcher, "")
    assert steered.balance.biases[name].tolist() == [0.5, -0.5, 0.0, 0.0]
    assert watcher.said == []
    training._Training(tiny(model=folder, strategy="none", out=tmp_path / "b"), watcher, "")
    assert "the strategy none has no biases" in watcher.said[0]


def test_the_saved_tokenizer_ends_documents_with_its_own_token(tiny, new_watcher, tmp_path):
    from transformers import AutoTokenizer

    first = tiny(steps=1, out=tmp_path / "first")
    train(first, new_watcher())
    file = tmp_path / "tokenizer.json"
    file.write_text((first.out / "model" / "tokenizer.json").read_text().replace("<|endoftext|>", "</s>"))
    config = tiny(steps=1, tokenizer=file)
    train(config, new_watcher())
    tokenizer = AutoTokenizer.from_pretrained(config.out / "model")
    assert (tokenizer.eos_token, len(tokenizer)) == ("</s>", 300)


def test_bits_per_byte_uses_the_evaluated_text(tiny, new_watcher):
    from equipoise_lab.train.data import load_corpus

    config = tiny(steps=1, evaluation_sequences=1)
    result, all_bytes = train(config, new_watcher()), 0
    corpus = load_corpus(config.data, vocab_size=300, sequence_length=16)
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_file))
    for name, domain in result["domains"].items():
        num_bytes = len(tokenizer.decode(corpus.sequences("test", name, 16)[0].tolist()).encode())
        assert domain["bits_per_byte"] == pytest.approx(domain["nats"] * 16 / num_bytes / math.log(2))
        all_bytes += num_bytes
    all_nats = sum(domain["nats"] * 16 for domain in result["domains"].values())
    assert result["val_bits_per_byte"] == pytest.approx(all_nats / all_bytes / math.log(2)), "must pool all domains"


# ---- one process at a time ----


def test_two_processes_cannot_train_in_one_folder(tiny, new_watcher):
    first = training._Training(tiny(), new_watcher(), "")
    for options in ({}, {"resume": True}):
        with pytest.raises(
            EquipoiseError, match=f"only one process may train in a folder: .* is in use by process {os.getpid()}"
        ):
            training._Training(tiny(**options), new_watcher(), "")
    first.run()
    first.folder.release()
    assert not list(first.config.out.glob(".lock")) and Run(first.config.out).complete
    with pytest.raises(EquipoiseError, match="another run has started in"):
        training._Training(tiny(), new_watcher(), "")  # its folder was still new when the options were checked
    assert not list(first.config.out.glob(".lock")), "a refused run still has the lock"


def test_the_lock_of_a_killed_process_is_free(tiny, new_watcher):
    config = tiny(steps=2)
    config.out.mkdir()
    (config.out / ".lock").write_text("process 1 on elsewhere")  # the lock itself ends with its process
    assert train(config, new_watcher()) and not (config.out / ".lock").exists()


def test_the_warm_up_of_ddp_uses_no_random_numbers(tiny, new_watcher):
    """Otherwise dropout after a resume on several ranks would differ from the dropout of an uninterrupted run."""
    run = training._Training(tiny(), new_watcher(), "")
    for module in run.inner.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    before = torch.get_rng_state()
    run._warm_up_ddp()
    assert torch.equal(torch.get_rng_state(), before)
    run.inner(input_ids=run.batches.window(0)[0].input_ids)
    assert not torch.equal(torch.get_rng_state(), before), "the model has no dropout, so the test shows nothing"


def test_levels_that_lack_a_domain_are_refused_before_the_first_step(tiny, new_watcher, text, tmp_path):
    folder = tmp_path / "text"
    shutil.copytree(text, folder)
    for content, message in (
        ({"kind": {"fruit": "a", "metal": "b"}}, "with a label for every domain at every level: KeyError: 'river'"),
        ({"domain": dict.fromkeys(("fruit", "metal", "river"), "a")}, 'no level may be called "domain"'),
    ):
        (folder / "levels.json").write_text(json.dumps(content))
        with pytest.raises(UsageError, match=message):
            train(tiny(data=str(folder)), new_watcher())
    assert not tiny().out.exists()


def test_a_checkpoint_with_the_name_of_another_step_counts_as_damaged(tiny, new_watcher):
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), new_watcher(stop_after=11))
    newest = tiny().out / "checkpoints" / "step-00000010"
    (newest / "facts.json").write_text('{"step": 99}')
    watcher = new_watcher()
    train(tiny(resume=True), watcher)
    assert watcher.done == 5 and any("facts.json belongs to another step" in line for line in watcher.said)


def test_resuming_a_complete_run_reports_a_missing_model(tiny, new_watcher):
    train(tiny(save_model=False), new_watcher())
    watcher = new_watcher()
    train(tiny(resume=True), watcher)
    assert any("was trained with --no-save-model: there is no model to save" in line for line in watcher.said)


def test_k_comes_from_the_routers_and_must_be_equal_in_all_layers(tiny, new_watcher, tmp_path):
    """A config may contain a list of values for k, or use another name for it."""
    config = shrunken.build("hunyuan_v1_moe").config
    config.vocab_size, config.num_hidden_layers = 300, 2
    for name, k in (("same", [2, 2]), ("mixed", [1, 2])):
        config.moe_topk = k
        config.save_pretrained(tmp_path / name)
    run = training._Training(tiny(model=tmp_path / "same", steps=1, strategy="lbl"), new_watcher(), "")
    assert (run.k, run.num_experts) == (2, 8) and run.run()["val_nats"] > 0
    with pytest.raises(
        UsageError, match="same k and number of experts in every layer: .* choose 1 of 8 and 2 of 8 experts"
    ):
        training._Training(tiny(model=tmp_path / "mixed", strategy="lbl", out=tmp_path / "b"), new_watcher(), "")

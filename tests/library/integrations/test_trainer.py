"""``EquipoiseCallback``: a training under ``transformers.Trainer`` equals our own loop, or is refused."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from models import family
from ranks import distance
from safetensors.torch import load_file
from torch import nn
from trainer_ranks import ACCUMULATED, BATCH, LENGTH, Stop, Watch, batches, label_tokens, own_loop, rows, train
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint

import equipoise
from equipoise.errors import EquipoiseError, UsageError
from equipoise.integrations import EquipoiseCallback
from equipoise.integrations.trainer.checkpoints import STATE_FILE
from equipoise.integrations.trainer.checks import check_training_arguments
from equipoise.saved import BIASES_FILE

BIASES, LOSS = "loss-free:rate=1e-2", "lbl:coefficient=1e-1"
BOTH = (BIASES, LOSS)
FAMILIES = ("qwen3_moe", "glm4_moe")  # without a slot, with one
TOLERANCE = 1e-6  # of the relative distance, in float32


def assert_same(ours, expected):
    """Two lists of dicts of tensors are equal, bit for bit."""
    assert len(ours) == len(expected) > 0
    for one, other in zip(ours, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def assert_close_gradients(ours, expected):
    assert len(ours) == len(expected) > 0
    for one, other in zip(ours, expected, strict=True):
        assert distance(one, other) < TOLERANCE


# ---- the gradient ----


@pytest.mark.parametrize("by_label_tokens", [True, False], ids=["by label tokens", "plain mean"])
@pytest.mark.parametrize("name", (*FAMILIES, "deepseek_v3"))
def test_gradients_and_biases_are_those_of_our_own_loop(name, by_label_tokens):
    """Twelve rows: a window of four micro-batches and a short one of two, with uneven label tokens and padding."""
    model, data = family(name), rows(12)
    other = copy.deepcopy(model)
    if not by_label_tokens:
        model.accepts_loss_kwargs = False  # so the Trainer passes no num_items_in_batch
    callback = EquipoiseCallback(*BOTH)
    watch = Watch(callback)
    train(model, data, [callback, watch])
    gradients, biases, loads = own_loop(other, data, BOTH, by_label_tokens=by_label_tokens)
    assert len(gradients) == 2
    assert len({label_tokens(batch) for batch in batches(data)}) > 2
    assert_close_gradients(watch.gradients, gradients)
    assert_same(watch.biases, biases)
    assert_same(watch.load, loads)


def test_the_two_weights_give_different_gradients():
    """Otherwise the test above could not fail."""
    model, data = family("qwen3_moe"), rows(12)
    by_label_tokens, _, _ = own_loop(copy.deepcopy(model), data, BOTH)
    plain_mean, _, _ = own_loop(copy.deepcopy(model), data, BOTH, by_label_tokens=False)
    without_loss, _, _ = own_loop(model, data, (BIASES,))
    assert distance(by_label_tokens[0], plain_mean[0]) > 1e-2
    assert distance(by_label_tokens[0], without_loss[0]) > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        dict(activation_checkpointing=True),
        dict(activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True}),
        pytest.param(dict(torch_compile=True, torch_compile_backend="aot_eager"), marks=pytest.mark.slow),
    ],
    ids=["checkpointing", "reentrant", "compiled"],
)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_checkpointing_and_compiling_change_nothing(name, options):
    model, data = family(name), rows(12)
    other = copy.deepcopy(model)
    callback = EquipoiseCallback(*BOTH)
    watch = Watch(callback)
    train(model, data, [callback, watch], **options)
    gradients, biases, loads = own_loop(other, data, BOTH)
    assert_close_gradients(watch.gradients, gradients)
    assert_same(watch.biases, biases)
    assert_same(watch.load, loads)
    torch.compiler.reset()


@pytest.mark.parametrize("name", FAMILIES)
def test_autocast_equals_our_loop_under_autocast(name):
    model, data = family(name), rows(12)
    other = copy.deepcopy(model)
    callback = EquipoiseCallback(*BOTH)
    watch = Watch(callback)
    train(model, data, [callback, watch], bf16=True)
    gradients, biases, loads = own_loop(other, data, BOTH, autocast=True)
    assert_close_gradients(watch.gradients, gradients)
    assert_same(watch.load, loads)
    assert_same(watch.biases, biases)


def test_shift_labels_are_counted_instead_of_labels():
    """Collators that pack sequences give ``shift_labels``. The Trainer counts them, and the loss uses them."""
    data = rows(8)
    for row in data:
        row["shift_labels"] = [*row["labels"][1:], -100]
        row["shift_labels"][6] = -100  # between two packed sequences
    model = family("qwen3_moe")
    other, callback = copy.deepcopy(model), EquipoiseCallback(LOSS)
    watch = Watch(callback)
    train(model, data, [callback, watch], remove_unused_columns=False)
    window = batches(data)
    total = sum(int((batch["shift_labels"] != -100).sum()) for batch in window)
    balance = equipoise.attach(other, LOSS)
    for batch in window:
        loss = other(**batch).loss + balance.loss()
        (loss * int((batch["shift_labels"] != -100).sum()) / total).backward()
    assert_close_gradients(watch.gradients, [{n: p.grad for n, p in other.named_parameters() if p.grad is not None}])


def test_packed_rows_are_cut_where_their_positions_begin_anew():
    data = [{key: row[key] for key in ("input_ids", "labels")} for row in rows(8)]
    for index, row in enumerate(data):
        cut = 3 + index % 5
        row["position_ids"] = [*range(cut), *range(LENGTH - cut)]
    strategy = "lbl:scope=sequence,coefficient=1e-1"
    model = family("qwen3_moe", use_cache=False)  # as the Trainer sets it: with a cache a row would attend as one
    cut_up, whole, callback = copy.deepcopy(model), copy.deepcopy(model), EquipoiseCallback(strategy)
    watch = Watch(callback)
    train(model, data, [callback, watch])
    total = sum(label_tokens(batch) for batch in batches(data))
    expected = []
    for other, is_cut in ((cut_up, True), (whole, False)):
        balance = equipoise.attach(other, strategy)
        for batch in batches(data):
            starts = batch["position_ids"] == 0
            balance.token_mask(None, starts.cumsum(1) if is_cut else torch.zeros_like(starts))
            loss = other(**batch).loss + balance.loss()
            (loss * label_tokens(batch) / total).backward()
        expected.append({n: p.grad for n, p in other.named_parameters() if p.grad is not None})
    assert_close_gradients(watch.gradients, expected[:1])
    assert distance(*expected) > 1e-3


class TupleTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs, num_items_in_batch=num_items_in_batch, return_dict=False)[0]


def test_a_model_that_returns_tuples_gets_the_balancing_loss():
    model, data = family("glm4_moe"), rows(12)
    other, callback = copy.deepcopy(model), EquipoiseCallback(*BOTH)
    watch = Watch(callback)
    train(model, data, [callback, watch], kind=TupleTrainer)
    gradients, _, _ = own_loop(other, data, BOTH)
    assert_close_gradients(watch.gradients, gradients)


def test_loads_equal_a_count_by_hand():
    """Every unmasked token counts once, whatever its label. The first window sees the model before any step."""
    model, data = family("glm4_moe"), rows(8)
    counts = {f"model.layers.{layer}.mlp.gate": torch.zeros(8, dtype=torch.int64) for layer in range(2)}

    def count(name):
        def hook(module, args, output):
            expert_ids = output[2][mask.reshape(-1) == 1]
            counts[name] += torch.tensor([int((expert_ids == expert).sum()) for expert in range(8)])

        return hook

    probe = copy.deepcopy(model)
    for name in counts:
        probe.get_submodule(name).register_forward_hook(count(name))
    for batch in batches(data):
        mask = batch["attention_mask"]
        probe(**batch)
    callback = EquipoiseCallback(*BOTH)
    watch = Watch(callback)
    train(model, data, [callback, watch])
    assert_same(watch.load, [counts])
    assert sum(counts["model.layers.0.mlp.gate"]) == 2 * sum(sum(row["attention_mask"]) for row in data)


def test_a_strategy_without_balancers_changes_nothing():
    model, data = family("qwen3_moe"), rows(12)
    other = copy.deepcopy(model)
    with_callback, without_callback = Watch(), Watch()
    callback = EquipoiseCallback("none")
    train(model, data, [callback, with_callback])
    train(other, data, [without_callback])
    assert_same(with_callback.gradients, without_callback.gradients)
    assert callback.balance.metrics()["tokens"] > 0


# ---- steps ----


class OverflowingScaler:
    """A GradScaler that finds an overflow in the second step."""

    steps = 0

    def step(self, optimizer, closure=None):
        self.steps += 1
        if self.steps != 2:
            optimizer.step()

    def update(self):
        pass


class ScaledTrainer(Trainer):
    """As with fp16 on a GPU: Accelerate's own optimizer notices that the scaler skipped a step."""

    scaler = OverflowingScaler

    def create_scheduler(self, *args, **kwargs):
        self.optimizer = AcceleratedOptimizer(self.optimizer.optimizer, scaler=self.scaler())
        return super().create_scheduler(*args, **kwargs)


class FusedOverflowingScaler(OverflowingScaler):
    """As a GradScaler does with a fused optimizer: it stores ``found_inf`` on it and always calls it."""

    def step(self, optimizer, closure=None):
        self.steps += 1
        optimizer.found_inf = torch.tensor(float(self.steps == 2))
        optimizer.step()
        del optimizer.found_inf


class FusedScaledTrainer(ScaledTrainer):
    scaler = FusedOverflowingScaler


@pytest.mark.parametrize(("kind", "optim"), [(ScaledTrainer, "adamw_torch"), (FusedScaledTrainer, "adamw_torch_fused")])
def test_a_step_that_was_skipped_moves_nothing(kind, optim):
    model, callback = family("glm4_moe"), EquipoiseCallback(*BOTH)
    watch = Watch(callback)
    train(model, rows(24), [callback, watch], kind=kind, optim=optim)
    first, second, third = watch.biases
    assert_same([first], [second])
    assert any(not torch.equal(third[name], second[name]) for name in second)
    assert callback.balance.state_dict()["num_windows"] == 3
    callback.detach()


def test_micro_batches_left_over_by_a_stream_are_in_the_step_that_has_their_gradient(tmp_path):
    """The dataset ends two micro-batches after a step of four. The Trainer takes no step for them, and keeps their
    gradients until the first step of the next epoch."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows(12))

    class Kept(TrainerCallback):
        def on_epoch_end(self, args, state, control, model=None, **kwargs):
            gradients_left.append(sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None))

    gradients_left = []
    model, callback = family("glm4_moe"), EquipoiseCallback(*BOTH)
    watch = Watch(callback)
    train(model, Stream(), [callback, watch, Kept()], tmp_path, max_steps=2, save_strategy="epoch")
    assert gradients_left[0] > 0, "the Trainer keeps the gradients"
    a_step, an_epoch = (2 * sum(sum(row["attention_mask"]) for row in rows(12)[:n]) for n in (BATCH * ACCUMULATED, 12))
    counted = [int(load["model.layers.0.mlp.gate"].sum()) for load in watch.load]
    assert counted == [a_step, an_epoch - a_step + a_step]
    assert not callback.balance.has_open_window
    assert (tmp_path / "checkpoint-1" / STATE_FILE).exists()


def test_a_second_training_continues_with_the_biases():
    model, data = family("qwen3_moe"), rows(8)
    other, callback = copy.deepcopy(model), EquipoiseCallback(BIASES)
    watch = Watch(callback)
    for _ in range(2):
        train(model, data, [callback, watch])
    _, biases, _ = own_loop(other, data, (BIASES,), epochs=2)
    assert_same(watch.biases, biases)
    assert callback.balance.state_dict()["num_windows"] == 2


class Interruption(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def test_an_interrupted_training_leaves_no_counts_for_the_next():
    model, data = family("qwen3_moe"), rows(8)
    callback = EquipoiseCallback(*BOTH)
    with pytest.raises(KeyboardInterrupt):
        train(model, data, [callback, Interruption()])
    watch = Watch(callback)
    train(model, data, [callback, watch])
    (load,) = watch.load
    assert int(load["model.layers.0.mlp.gate"].sum()) == 2 * sum(sum(row["attention_mask"]) for row in data)


def test_an_interrupted_training_goes_on_with_the_state_of_its_last_step():
    class Interrupted(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                raise KeyboardInterrupt

    callback = EquipoiseCallback("loss-free:rule=momentum,rate=1e-2")
    model, watch = family("qwen3_moe"), Watch(callback)
    with pytest.raises(KeyboardInterrupt):
        train(model, rows(24), [callback, watch, Interrupted()])
    states = []

    class Beginning(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            states.append(callback.balance.state_dict())

    train(model, rows(8), [callback, Beginning()])
    assert states[0]["num_windows"] == 1 and callback.balance.num_windows == 2
    assert_same([states[0]["biases"]], watch.biases)
    assert all(momentum.any() for momentum in states[0]["state"]["momentum"].values())


# ---- evaluation and logs ----


def test_evaluation_has_no_balancing_loss_and_moves_nothing():
    model, data = family("qwen3_moe"), rows(8)
    callback = EquipoiseCallback(*BOTH)
    trainer = train(
        model,
        data,
        [callback],
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
        trainer_options=dict(eval_dataset=rows(6, seed=1)),
    )
    before = callback.balance.state_dict()
    losses_logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses_logged) == 2
    again = trainer.evaluate()["eval_loss"]
    after = callback.balance.state_dict()
    assert_same([before["biases"], before["load"]], [after["biases"], after["load"]])
    assert before["num_windows"] == after["num_windows"] == 1
    # by hand, with the same biases and without the callback
    biases = callback.detach()
    balance = equipoise.attach(model.eval(), "frozen", biases=biases)
    with torch.no_grad():
        losses = [float(model(**batch).loss) for batch in batches(rows(6, seed=1))]
    assert again == losses_logged[-1] == pytest.approx(sum(losses) / len(losses), abs=1e-6)
    balance.detach()


def test_the_first_evaluation_is_the_same_without_the_callback():
    options = dict(eval_on_start=True, eval_strategy="steps", eval_steps=100, max_steps=1)
    losses = []
    for callbacks in ([], [EquipoiseCallback(*BOTH)]):
        trainer = train(
            family("glm4_moe"), rows(8), callbacks, trainer_options=dict(eval_dataset=rows(6, seed=1)), **options
        )
        losses.append(next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry))
    assert losses[0] == losses[1]


class Reporter(TrainerCallback):
    """Comes before the user's callbacks, as the reporting integrations of Transformers do."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_metrics_are_in_the_logs_of_every_reporter_and_in_the_saved_state(tmp_path):
    reporter, callback = Reporter(), EquipoiseCallback(*BOTH)
    trainer = train(family("glm4_moe"), rows(16), [reporter, callback], tmp_path, save_strategy="steps", save_steps=2)
    steps = [logs for logs in reporter.logs if "loss" in logs]
    assert len(steps) == 2
    for logs in (*steps, *(entry for entry in trainer.state.log_history if "loss" in entry)):
        metrics = {name: value for name, value in logs.items() if name.startswith("equipoise/")}
        assert {"equipoise/maxvio_batch", "equipoise/load_balancing_loss", "equipoise/bias_max"} <= metrics.keys()
        assert all(type(value) is float for value in metrics.values())
    constants = ("collectives", "collective_bytes")
    last = {f"equipoise/{k}": value for k, value in callback.balance.metrics().items() if k not in constants}
    assert last.items() <= steps[-1].items()
    assert not [name for name in steps[-1] if "collective" in name]  # the same at each step
    assert not any(name.startswith("equipoise/") for name in reporter.logs[-1])  # the summary at the end
    saved = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert last.items() <= saved["log_history"][-1].items()


def test_the_logged_loss_holds_the_balancing_loss():
    """For one window it is the weighted sum of its micro-batches' cross-entropies and balancing losses."""
    model, data = family("glm4_moe"), rows(8)
    other = copy.deepcopy(model)
    trainer = train(model, data, [EquipoiseCallback(LOSS)])
    balance = equipoise.attach(other, LOSS)
    total = sum(label_tokens(batch) for batch in batches(data))
    expected = 0.0
    for batch in batches(data):
        expected += float((other(**batch).loss + balance.loss()).detach()) * label_tokens(batch) / total
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-6)


# ---- checkpoints ----


@pytest.mark.parametrize("strategy", [BOTH, ("loss-free:rule=momentum,rate=1e-2",)], ids=["sign", "momentum"])
@pytest.mark.parametrize("name", FAMILIES)
def test_resuming_equals_never_having_stopped(name, strategy, tmp_path):
    data, options = rows(24), dict(save_strategy="steps", save_steps=1, num_train_epochs=2)
    whole, callback = family(name), EquipoiseCallback(*strategy)
    watch = Watch(callback)
    train(whole, data, [callback, watch], **options)
    train(family(name), data, [EquipoiseCallback(*strategy), Stop(4)], tmp_path, **options)
    assert get_last_checkpoint(tmp_path).endswith("checkpoint-4")
    resumed, second = family(name, seed=1), EquipoiseCallback(*strategy)
    rest = Watch(second)
    train(resumed, data, [second, rest], tmp_path, resume=True, **options)
    assert len(watch.biases) == 6
    assert_same(rest.biases, watch.biases[4:])
    assert_same(rest.load, watch.load[4:])
    assert_same(rest.gradients, watch.gradients[4:])
    assert_same([dict(resumed.named_parameters())], [dict(whole.named_parameters())])
    one, other = second.balance.state_dict(), callback.balance.state_dict()
    assert one["num_windows"] == other["num_windows"] == 6
    for key in one["state"]:
        assert_same([one["state"][key]], [other["state"][key]])


def test_a_checkpoint_in_another_folder_is_resumed(tmp_path):
    data, options = rows(24), dict(save_strategy="steps", save_steps=1, num_train_epochs=1)
    train(family("qwen3_moe"), data, [EquipoiseCallback(BIASES), Stop(2)], tmp_path / "one", **options)
    (tmp_path / "one" / "checkpoint-2").rename(tmp_path / "kept")
    callback = EquipoiseCallback(BIASES)
    watch = Watch(callback)
    train(family("qwen3_moe"), data, [callback, watch], tmp_path / "two", resume=str(tmp_path / "kept"), **options)
    assert callback.balance.state_dict()["num_windows"] == 3


def test_a_checkpoint_without_our_state_is_refused_unless_fresh(tmp_path):
    data, options = rows(24), dict(save_strategy="steps", save_steps=1)
    train(family("qwen3_moe"), data, [Stop(1)], tmp_path, **options)
    with pytest.raises(EquipoiseError, match="saved without this callback.*fresh=True"):
        train(family("qwen3_moe"), data, [EquipoiseCallback(BIASES)], tmp_path, resume=True, **options)
    model = family("qwen3_moe")
    with pytest.raises(EquipoiseError, match="fresh=True"):
        train(model, data, [EquipoiseCallback(BIASES)], tmp_path, resume=True, **options)
    callback = EquipoiseCallback(BIASES, fresh=True)
    train(model, data, [callback], tmp_path, resume=True, **options)  # the same model, as in a notebook
    assert callback.balance.state_dict()["num_windows"] == 2


def test_a_sharded_checkpoint_replaces_the_state_that_an_earlier_training_left(tmp_path):
    """It is saved without save_pretrained, into a folder that exists already."""

    class Sharded(Trainer):
        def save_model(self, output_dir=None, _internal_call=False):
            Path(output_dir or self.args.output_dir).mkdir(parents=True, exist_ok=True)

    options = dict(save_strategy="steps", save_steps=1, kind=Sharded)
    train(family("qwen3_moe"), rows(16), [EquipoiseCallback(BIASES)], tmp_path, **options)
    first = torch.load(tmp_path / "checkpoint-2" / STATE_FILE, weights_only=True)
    train(family("qwen3_moe"), rows(16), [EquipoiseCallback("loss-free:rate=5e-2")], tmp_path, **options)
    second = torch.load(tmp_path / "checkpoint-2" / STATE_FILE, weights_only=True)
    assert any(not torch.equal(bias, second["biases"][name]) for name, bias in first["biases"].items())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_saved_within_a_step_has_the_state_of_the_last_one(name, tmp_path, caplog):
    """What was counted since is left out, once with a warning; the training goes on as if nothing had been saved."""
    data, strategy = rows(16), ("loss-free:rule=momentum,rate=1e-2", LOSS)
    model, callback = family(name), EquipoiseCallback(*strategy)
    undisturbed = Watch(EquipoiseCallback(*strategy))
    train(copy.deepcopy(model), data, [undisturbed.callback, undisturbed])

    class SavingCallback(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            model.save_pretrained(tmp_path / f"within-{state.global_step}")

        def on_step_end(self, args, state, control, **kwargs):
            model.save_pretrained(tmp_path / f"after-{state.global_step}")

    caplog.clear()
    watch = Watch(callback)
    train(model, data, [callback, watch, SavingCallback()])
    assert_same(watch.gradients, undisturbed.gradients)
    assert_same(watch.biases, undisturbed.biases)
    assert [record.message for record in caplog.records if record.message.startswith("state_dict: ")] == [
        "state_dict: 1 micro-batch(es) were counted since the last step() and are left out of the state. A training "
        "that resumes from it does not have them, nor their gradients. Save after step() to lose nothing."
    ]
    first, within, after = (torch.load(tmp_path / f / STATE_FILE) for f in ("within-0", "within-1", "after-1"))
    assert first["num_windows"] == 0 and within["num_windows"] == after["num_windows"] == 1
    assert not any(bias.any() for bias in first["biases"].values())
    for part in ("biases", "load"):
        assert_same([within[part]], [after[part]])
    assert_same([within["state"]["momentum"]], [after["state"]["momentum"]])
    assert_same([within["biases"]], watch.biases[:1])
    assert (tmp_path / "within-1" / BIASES_FILE).exists() == (name == "qwen3_moe")


class WorseningTrainer(Trainer):
    """Its evaluation loss grows from step to step, so the first checkpoint is the best."""

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_loss": float(self.state.global_step)}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


@pytest.mark.parametrize("name", FAMILIES)
def test_the_best_model_has_its_biases(name, tmp_path):
    callback = EquipoiseCallback(BIASES)
    watch = Watch(callback)
    train(
        family(name),
        rows(24),
        [callback, watch],
        tmp_path,
        kind=WorseningTrainer,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        trainer_options=dict(eval_dataset=rows(2)),
    )
    assert len(watch.biases) == 3
    assert_same([callback.balance.biases], watch.biases[:1])


def test_a_saved_family_with_a_slot_has_its_biases_in_float32(tmp_path):
    model = family("glm4_moe").to(torch.bfloat16)
    callback = EquipoiseCallback("loss-free:rate=1e-3")
    trainer = train(model, rows(24), [callback], tmp_path, save_strategy="steps", save_steps=3)
    trainer.save_model(str(tmp_path / "final"))
    for folder in ("checkpoint-3", "final"):
        saved = load_file(tmp_path / folder / "model.safetensors")
        for layer, bias in callback.balance.biases.items():
            slot = saved[f"{layer}.e_score_correction_bias"]
            assert slot.dtype == torch.float32 and torch.equal(slot, bias) and bias.any()
        assert not (tmp_path / folder / BIASES_FILE).exists()


def test_a_saved_family_without_a_slot_has_its_biases_beside_the_weights(tmp_path):
    model, callback = family("qwen3_moe"), EquipoiseCallback("loss-free:rate=1e-1")
    trainer = train(model, rows(24), [callback], tmp_path, save_strategy="steps", save_steps=3)
    trainer.save_model(str(tmp_path / "final"))
    assert (tmp_path / "checkpoint-3" / STATE_FILE).exists()
    assert not (tmp_path / "final" / STATE_FILE).exists()
    ids = torch.randint(3, 64, (2, LENGTH), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
    for folder in ("checkpoint-3", "final"):
        loaded = type(model).from_pretrained(tmp_path / folder).eval()
        with torch.no_grad():
            assert not torch.equal(loaded(input_ids=ids).logits, expected)
            equipoise.attach(loaded, "frozen", biases=tmp_path / folder)
            assert torch.equal(loaded(input_ids=ids).logits, expected)


def test_a_copy_of_the_model_is_free_of_the_callback(tmp_path):
    model, callback = family("qwen3_moe"), EquipoiseCallback(*BOTH)
    copies = {}

    class CopyingCallback(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            copies["copy"], copies["pickled"] = copy.deepcopy(model), pickle.loads(pickle.dumps(model))

    train(model, rows(8), [callback, CopyingCallback()])
    for name, other in copies.items():
        batch = batches(rows(2))[0]
        loss = other.train()(**batch).loss
        logits = other(**batch).logits[:, :-1].float().reshape(-1, 64)
        plain = nn.functional.cross_entropy(logits, batch["labels"][:, 1:].reshape(-1))
        assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
        loss.backward()
        other.save_pretrained(tmp_path / name)
        assert not (tmp_path / name / BIASES_FILE).exists()
        assert other.save_pretrained.model is other
        owners = [getattr(hook, "callback", None) for hook in other._forward_hooks.values()]
        assert {*owners} == {None}  # no hook of the copy reaches the callback
    biases = callback.detach()
    assert biases and callback.detach() == {}
    assert "save_pretrained" not in vars(model) and not model._forward_hooks


# ---- what is refused ----


def refused(match, *strategy, error=EquipoiseError, model=None, callbacks=None, callback_options=None, **options):
    model = family("qwen3_moe") if model is None else model
    callback = EquipoiseCallback(*(strategy or BOTH), **(callback_options or {}))
    with pytest.raises(error, match=match):
        train(model, rows(8), callbacks or [callback], **options)
    return callback


def a_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].reshape(-1, outputs.logits.shape[-1])
    return nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1))


class TrainerThatTakesLogits(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return a_loss(outputs, inputs["labels"])


class TrainerThatKeepsLabels(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return a_loss(model(**inputs), labels)


class TrainerThatTakesTheLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        return outputs.loss + 0.0 * outputs.logits.sum()


LOSSES_WITHOUT_THE_MODELS = {
    "label smoothing": dict(label_smoothing_factor=0.1),
    "compute_loss_func": dict(trainer_options=dict(compute_loss_func=a_loss)),
    "logits": dict(kind=TrainerThatTakesLogits),
    "labels": dict(kind=TrainerThatKeepsLabels),
}


@pytest.mark.parametrize("strategy", [BIASES, LOSS])
@pytest.mark.parametrize("name", LOSSES_WITHOUT_THE_MODELS)
def test_a_loss_that_is_not_the_models_is_accepted(name, strategy):
    """test_trainer_weights.py has the gradients."""
    callback = EquipoiseCallback(strategy)
    train(family("qwen3_moe"), rows(8), [callback], **LOSSES_WITHOUT_THE_MODELS[name])
    assert callback.balance.num_windows == 1


def test_a_compute_loss_that_takes_the_models_loss_is_accepted():
    model, data = family("qwen3_moe"), rows(12)
    other, callback = copy.deepcopy(model), EquipoiseCallback(*BOTH)
    watch = Watch(callback)
    train(model, data, [callback, watch], kind=TrainerThatTakesTheLoss)
    gradients, _, _ = own_loop(other, data, BOTH)
    assert_close_gradients(watch.gradients, gradients)


def test_a_compute_loss_may_add_the_balancing_loss_itself():
    model, data = family("qwen3_moe"), rows(12)
    other, callback = copy.deepcopy(model), EquipoiseCallback(*BOTH, add_loss=False)
    watch = Watch(callback)

    class AddingTrainer(Trainer):
        loss_is_scaled_for_ga = False

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return a_loss(model(**inputs), inputs["labels"]) + callback.balance.loss()

    train(model, data, [callback, watch], kind=AddingTrainer)
    gradients, _, _ = own_loop(other, data, BOTH, by_label_tokens=False)
    assert_close_gradients(watch.gradients, gradients)


def test_a_compute_loss_that_forgets_the_balancing_loss_raises():
    refused("balance.loss\\(\\) must be added", callback_options=dict(add_loss=False), kind=TrainerThatTakesLogits)


def test_a_balancing_loss_of_the_models_own_is_refused_unless_asked_for():
    def model():
        return family("qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.01)

    refused("only one load-balancing loss must act.*router_aux_loss_coef=0.01.*with_model_loss=True", model=model())
    for strategy, options in ((BOTH, dict(with_model_loss=True)), ((BIASES,), {})):
        callback = EquipoiseCallback(*strategy, **options)
        train(model(), rows(8), [callback])
        assert callback.balance.state_dict()["num_windows"] == 1


def test_a_callback_without_a_trainer_is_refused_if_it_has_a_loss():
    model = family("qwen3_moe")
    arguments, state = Trainer(model).args, TrainerState()
    with pytest.raises(EquipoiseError, match="must be called by a transformers.Trainer.*use equipoise.attach"):
        EquipoiseCallback(LOSS).on_train_begin(arguments, state, None, model=model)
    callback = EquipoiseCallback(BIASES)
    callback.on_train_begin(arguments, state, None, model=model)
    callback.detach()


def test_compute_loss_of_the_trainer_is_its_own_again_after_the_training():
    model, callback = family("qwen3_moe"), EquipoiseCallback(*BOTH)
    trainer = train(model, rows(8), [callback])
    assert "compute_loss" not in vars(trainer)
    own = trainer.compute_loss = lambda *args, **kwargs: Trainer.compute_loss(trainer, *args, **kwargs)
    trainer.train()
    assert trainer.compute_loss is own and callback.balance.num_windows == 2


def test_two_callbacks_are_refused():
    refused("must have one EquipoiseCallback", callbacks=[EquipoiseCallback(LOSS), EquipoiseCallback(BIASES)])


def test_a_second_callback_may_replace_the_one_of_an_earlier_trainer():
    model, first = family("qwen3_moe"), EquipoiseCallback(BIASES)
    train(model, rows(8), [first])
    refused("belongs to an earlier Trainer, call detach\\(\\)", model=model)
    biases = first.detach()
    second = EquipoiseCallback("frozen", biases=biases)
    train(model, rows(8), [second])
    assert_same([second.balance.biases], [biases])


def test_a_model_that_is_attached_already_is_refused():
    model = family("qwen3_moe")
    balance = equipoise.attach(model, "loss-free")
    refused("is attached already. Call detach", model=model)
    balance.detach()
    train(model, rows(8), [EquipoiseCallback(*BOTH)])


def test_data_parallel_and_sequence_parallelism_are_refused():
    class Args:
        n_gpu = 2

    with pytest.raises(EquipoiseError, match="one process must drive one GPU: got 2"):
        check_training_arguments(Args)

    class Parallelism:
        sp_enabled = True

    Args.n_gpu, Args.parallelism_config = 1, Parallelism
    with pytest.raises(EquipoiseError, match="each rank must have whole sequences"):
        check_training_arguments(Args)


def test_wrong_arguments_are_refused_at_once():
    with pytest.raises(TypeError, match="group, biases, fused, allow_empty.*got groups"):
        EquipoiseCallback("loss-free", groups=None)
    with pytest.raises(TypeError, match="got rate. Options of a strategy belong into its string"):
        EquipoiseCallback("loss-free", rate=1e-3)
    with pytest.raises(UsageError, match="must have a strategy"):
        Trainer(family("glm4_moe"), callbacks=[EquipoiseCallback])  # the class, as the Trainer allows
    with pytest.raises(UsageError, match="loss-fre"):
        EquipoiseCallback("loss-fre")
    with pytest.raises(UsageError, match="one balancer may move the bias"):
        EquipoiseCallback("loss-free", "quantile")

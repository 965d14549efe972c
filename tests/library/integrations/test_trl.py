"""``EquipoiseCallback`` under the trainers of TRL: counts by hand, biases by the sign rule, and the gradient of the
balancing loss of autograd over the whole model in float64."""

import copy
import itertools
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from ranks import distance
from trainer_ranks import Stop
from trl_runs import (
    ACCUMULATED,
    COEFFICIENT,
    Watch,
    balancing_gradient,
    by_sign,
    difference,
    label_tokens,
    model_for,
    route,
    rows,
    train,
)

from equipoise.errors import UsageError
from equipoise.integrations import EquipoiseCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # FutureWarnings of TRL, PEFT and Transformers about each other
LOSS = f"lbl:scope=global_batch,coefficient={COEFFICIENT}"
BIASES = "loss-free:rule=sign,rate=1e-2"
KINDS = ("sft", "dpo", "kto", "reward", "grpo")
REENTRANT = dict(gradient_checkpointing_kwargs={"use_reentrant": True})
OFF = dict(gradient_checkpointing=False)

# Each trainer computes its loss in checkpointed layers, TRL's default, unless it says otherwise.
CASES = {kind: (kind, {}) for kind in KINDS} | {
    "sft, not checkpointed": ("sft", OFF),
    "sft, reentrant": ("sft", REENTRANT),
    "sft, selective": ("sft", dict(gradient_checkpointing_kwargs={"selective": True})),
    "sft, dft": ("sft", dict(loss_type="dft")),
    "sft, label smoothing": ("sft", dict(label_smoothing_factor=0.1)),
    "sft, a short last step": ("sft", dict(number=14, gradient_accumulation_steps=4, max_steps=-1, num_train_epochs=1)),
    "dpo, reentrant": ("dpo", REENTRANT),
    "dpo, precomputed": ("dpo", dict(precompute_ref_log_probs=True)),
    "kto, reentrant": ("kto", REENTRANT),
    "reward, not checkpointed": ("reward", OFF),
    "grpo, reentrant": ("grpo", REENTRANT),
    "grpo, two iterations": ("grpo", dict(num_iterations=2)),
    "grpo, by sequence": ("grpo", dict(loss_type="grpo", mask_truncated_completions=True)),
    "grpo, an entropy bonus": ("grpo", dict(entropy_coef=0.1)),
    "rloo": ("rloo", dict(beta=0.0)),
}
RARER = ("sft, selective", "sft, dft", "dpo, reentrant", "dpo, precomputed", "grpo, an entropy bonus")


def weights_of(kind, window):
    """What each micro-batch of a step weighs, by hand: its labels over those of the step, or equally."""
    labels = [label_tokens(batch) for batch in window] if kind == "sft" else [1] * len(window)
    return [number / sum(labels) for number in labels]


def balancing_parts(kind, model, weigh=None, strategy=LOSS, **options):
    """By step: the gradient of the balancing loss under the trainer, and what autograd says. The weights stay."""
    options, without, watch = dict(learning_rate=0.0) | options, Watch(), Watch()
    start = copy.deepcopy(model)
    train(kind, copy.deepcopy(model), [EquipoiseCallback("none"), without], **options)
    callback = EquipoiseCallback(strategy)
    train(kind, model, [callback, watch], **options)
    callback.detach()
    ours = [difference(one, other) for one, other in zip(watch.gradients, without.gradients, strict=True)]
    windows = watch.batches[: len(ours)]
    assert windows == watch.batches[:-1] and watch.batches[-1] == []
    expected = [balancing_gradient(start, window, (weigh or weights_of)(kind, window)) for window in windows]
    return ours, expected, watch


def errors(ours, expected):
    """The relative distances; what is behind the last router has no part of the balancing loss."""
    for one, other in zip(ours, expected, strict=True):
        assert other.keys() <= one.keys()
        assert all(float(one[name].abs().max()) < 1e-9 for name in one.keys() - other.keys())
    return [distance({name: one[name] for name in other}, other) for one, other in zip(ours, expected, strict=True)]


# ---- the gradient ----


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in RARER else case for case in CASES]
)
def test_the_gradient_of_the_balancing_loss_is_that_of_float64_autograd(case):
    kind, options = CASES[case]
    ours, expected, watch = balancing_parts(kind, model_for(kind).double(), **options)
    assert len(ours) == 2 and len(watch.batches[0]) == options.get("gradient_accumulation_steps", ACCUMULATED)
    assert any(not batch["attention_mask"].all() for batch in watch.batches[0])  # padded
    assert max(errors(ours, expected)) < 1e-6


def test_the_two_weights_differ():
    """Otherwise the test above could not tell them apart."""
    ours, equally, _ = balancing_parts(
        "sft", model_for("sft").double(), weigh=lambda kind, window: weights_of("", window)
    )
    assert min(errors(ours, equally)) > 1e-2


PACKED = {
    "wrapped": dict(packing=True, packing_strategy="wrapped", max_length=12),
    "best fit": dict(packing=True, packing_strategy="bfd", max_length=24),
    "padding-free": dict(padding_free=True, max_length=None),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_rows_are_balanced_by_their_labels(name):
    model = model_for("sft", attn_implementation="eager").double()
    ours, expected, watch = balancing_parts("sft", model, **PACKED[name])
    assert max(errors(ours, expected)) < 1e-6
    batch = watch.batches[0][0]
    assert name == "wrapped" or ("attention_mask" not in batch and (batch["position_ids"] == 0).sum() > 1)


def test_scope_sequence_sees_packed_sequences():
    """By sequence s with N_s tokens: ``sum_s N_s / N E sum_e f_e^s P_e^s``, f counted in the sequence."""
    strategy, model = "lbl:scope=sequence,coefficient=0.5", model_for("sft", attn_implementation="eager").double()
    start = copy.deepcopy(model)
    ours, _, watch = balancing_parts("sft", model, strategy=strategy, **PACKED["best fit"])
    window, total = watch.batches[0], 0.0
    for batch, weight in zip(window, weights_of("sft", window), strict=True):
        starts = [*(batch["position_ids"].flatten() == 0).nonzero().flatten().tolist(), batch["position_ids"].numel()]
        for probabilities, _ in route(start, batch).values():
            for first, last in itertools.pairwise(starts):
                part = probabilities[first:last]
                share = torch.bincount(part.topk(2).indices.flatten(), minlength=8).double() / (2 * len(part))
                total = total + weight * 0.5 * len(part) / len(probabilities) * 8 * (share * part.mean(0)).sum()
    names, parameters = zip(*start.named_parameters(), strict=True)
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    expected = {name: gradient for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
    assert max(errors(ours[:1], [expected])) < 1e-6


# ---- counts and biases ----


@pytest.mark.parametrize("case", [*KINDS, "grpo, two iterations", "grpo, a reference"])
def test_counts_and_biases_are_those_of_plain_loops_over_what_is_trained(case):
    """The weights move here, and rollouts and references are computed beside what is trained."""
    kind, options = CASES.get(case) or ("grpo", dict(beta=0.1))
    model, callback = model_for(kind), EquipoiseCallback(BIASES, LOSS)
    model = model if "beta" in options else model.double()  # TRL loads its reference anew
    probe, watch = copy.deepcopy(model), Watch(callback)
    train(kind, model, [callback, watch], max_steps=3, **options)
    biases = {name: torch.zeros(8) for name in callback.balance.biases}
    for step in range(3):
        probe.load_state_dict(watch.weights[step], strict=False)
        counts = {name: [0] * 8 for name in biases}
        for batch in watch.batches[step]:
            for name, (_, load) in route(probe, batch, biases).items():
                counts[name] = [one + other for one, other in zip(counts[name], load, strict=True)]
        assert {name: load.tolist() for name, load in watch.load[step].items()} == counts
        expected = by_sign(counts, biases)
        for name, bias in watch.biases[step].items():
            torch.testing.assert_close(bias, torch.tensor(expected[name]), rtol=0, atol=1e-7)
        biases = watch.biases[step]
        tokens = sum(int(batch["attention_mask"].sum()) for batch in watch.batches[step])
        assert [sum(load) for load in counts.values()] == [2 * tokens] * 2  # two experts a token
    uncounted = [call for call in watch.calls if call != (True, True)]
    assert len(watch.calls) - len(uncounted) == 3 * ACCUMULATED
    assert bool(uncounted) == (kind in ("grpo", "kto"))  # rollouts, old log-probabilities, the mismatched pairs of KTO


def test_tokens_are_those_of_the_dataset():
    """Five tokens by five words; nothing of a batch that was captured enters here."""
    callback, watch = EquipoiseCallback(BIASES), Watch()
    watch.callback = callback
    train("sft", model_for("sft"), [callback, watch], number=8, train_sampling_strategy="sequential")
    lengths = [len(row["text"].split()) + 1 for row in rows("sft", 8)]  # TRL appends </s>
    loads = [int(load["model.layers.0.mlp.gate"].sum()) for load in watch.load]
    assert loads == [2 * sum(lengths[:4]), 2 * sum(lengths[4:])]


# ---- adapters: the reference is the model itself, without them ----

LORA = LoraConfig(
    r=2, lora_alpha=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
)
ADAPTED = [("sft", {}), ("dpo", {}), ("kto", {}), ("grpo", dict(beta=0.1, num_iterations=2))]


@pytest.mark.parametrize(("kind", "options"), ADAPTED)
def test_with_adapters_that_the_model_brings_the_gradient_is_that_of_autograd(kind, options):
    """The loss reaches the adapters in front of the routers. TRL copies the adapters for its reference."""
    torch.manual_seed(7)
    ours, expected, _ = balancing_parts(kind, get_peft_model(model_for(kind).double(), LORA).double(), **options)
    assert max(errors(ours, expected)) < 1e-6


@pytest.mark.parametrize(("kind", "options"), ADAPTED)
def test_the_pass_without_adapters_is_not_counted(kind, options):
    callback = EquipoiseCallback(BIASES, LOSS)
    watch = Watch(callback)
    train(kind, model_for(kind), [callback, watch], peft_config=LORA, **options)
    uncounted = [call for call in watch.calls if call != (True, True)]
    assert bool(uncounted) == (kind != "sft")
    for window, load in zip(watch.batches, watch.load, strict=False):
        tokens = sum(int(batch["attention_mask"].sum()) for batch in window)
        assert [int(counts.sum()) for counts in load.values()] == [2 * tokens] * 2
    assert not any(bias.any() for bias in callback.balance.biases.values())  # a frozen base: they stay


# ---- evaluation, checkpoints ----


EVALUATED = dict(eval_strategy="steps", eval_steps=1, eval_on_start=True)


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "reward"])
def test_an_evaluation_inside_the_training_changes_nothing(kind):
    watches = []
    for more in ({}, EVALUATED | dict(eval_dataset=rows(kind, 4))):
        callback = EquipoiseCallback(BIASES, LOSS)
        watches.append(Watch(callback))
        trainer = train(kind, model_for(kind), [callback, watches[-1]], max_steps=3, **more)
    assert sum("eval_loss" in row for row in trainer.state.log_history) == 4
    without, with_evaluation = watches
    for key in ("load", "biases", "gradients"):
        for one, other in zip(getattr(without, key), getattr(with_evaluation, key), strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_rollouts_of_an_evaluation_are_not_counted():
    callback = EquipoiseCallback(BIASES, LOSS)
    watch = Watch(callback)
    options = EVALUATED | dict(eval_dataset=rows("grpo", 4), per_device_eval_batch_size=4)
    train("grpo", model_for("grpo"), [callback, watch], **options)
    assert {(False, False), (True, False), (True, True)} == {*watch.calls}
    for window, load in zip(watch.batches, watch.load, strict=False):
        tokens = sum(int(batch["attention_mask"].sum()) for batch in window)
        assert [int(counts.sum()) for counts in load.values()] == [2 * tokens] * 2


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward"])
def test_resuming_equals_never_having_stopped(kind, tmp_path):
    options = dict(max_steps=4, save_strategy="steps", save_steps=1)
    strategy = ("loss-free:rule=momentum,rate=1e-2", LOSS)
    callback = EquipoiseCallback(*strategy)
    whole = Watch(callback)
    if kind == "dpo":
        options["ref_model"] = model_for(kind).eval()
    train(kind, model_for(kind), [callback, whole], tmp_path / "whole", **options)
    train(kind, model_for(kind), [EquipoiseCallback(*strategy), Stop(2)], tmp_path / "other", **options)
    second = EquipoiseCallback(*strategy)
    rest = Watch(second)
    train(kind, model_for(kind, seed=1), [second, rest], tmp_path / "other", resume=True, **options)
    assert len(rest.load) == 2
    for key in ("load", "biases", "gradients"):
        for one, other in zip(getattr(rest, key), getattr(whole, key)[2:], strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)
    one, other = second.balance.state_dict(), callback.balance.state_dict()
    assert one["num_windows"] == other["num_windows"] == 4
    momenta = one["state"]["momentum"], other["state"]["momentum"]
    assert all(torch.equal(momenta[0][name], momenta[1][name]) and momenta[0][name].any() for name in momenta[0])


# ---- the model's own balancing loss ----


@pytest.mark.parametrize("coefficient", [None, 0.1])
@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "grpo"])
def test_the_balancing_loss_of_trl_is_refused_by_name(kind, coefficient):
    """By default TRL takes the coefficient of the model's config."""
    expected = r"router_aux_loss_coef=0\.(1|001)(?s:.*)TRL: router_aux_loss_coef=0.0"
    with pytest.raises(UsageError, match=r"only one load-balancing loss must act.*" + expected):
        train(kind, model_for(kind), [EquipoiseCallback(LOSS)], router_aux_loss_coef=coefficient)


def test_both_losses_act_if_that_is_asked_for_and_beside_a_bias_there_is_a_warning(caplog):
    caplog.set_level(logging.WARNING, "equipoise")
    callback = EquipoiseCallback(LOSS, with_model_loss=True)
    train("dpo", model_for("dpo"), [callback], router_aux_loss_coef=0.1)
    assert callback.balance.num_windows == 2
    caplog.clear()
    callback = EquipoiseCallback(BIASES)
    train("dpo", model_for("dpo"), [callback], router_aux_loss_coef=0.1)
    assert callback.balance.num_windows == 2
    assert sum("of its own" in record.message for record in caplog.records) == 1


# ---- a training ----


@pytest.mark.slow
def test_maxvio_falls_in_fifty_steps():
    options = dict(number=64, max_steps=50, learning_rate=1e-3, optim="adamw_torch", per_device_train_batch_size=8)
    last = {}
    for strategy in ("none", "lbl:scope=global_batch,coefficient=1e-1", "loss-free:rule=sign,rate=1e-2"):
        model = model_for("sft")
        model.get_input_embeddings().weight.data += 0.03  # all tokens have something in common: the load is uneven
        trainer = train("sft", model, [EquipoiseCallback(strategy)], **options, **OFF)
        figures = [row["equipoise/maxvio_batch"] for row in trainer.state.log_history if "loss" in row]
        first, last[strategy] = figures[0], sum(figures[-5:]) / 5
        assert len(figures) == 50 and first > 2 and (strategy == "none" or last[strategy] < 0.7), (first, last)
    assert last["none"] > 1, last


def test_the_trainer_gets_its_compute_loss_back():
    callback = EquipoiseCallback(LOSS)
    trainer = train("sft", model_for("sft"), [callback])
    assert "compute_loss" not in vars(trainer)
    callback.detach()
    assert not trainer.model._forward_hooks and not trainer.model._forward_pre_hooks

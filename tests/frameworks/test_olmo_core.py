"""OLMo-core 3.0.0: its routers, and ``EquipoiseCallback`` under its own trainer."""

import copy
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from frameworks.olmo_core_models import (
    EXPERTS,
    LENGTH,
    VOCABULARY,
    distances,
    expected,
    make_batches,
    make_model,
    make_parts,
    make_trainer,
    routers_of,
    train,
)
from frameworks.olmo_core_ranks import train_rank
from olmo_core.nn.moe.emo import EmoRouterConfig
from olmo_core.nn.moe.router import MoERouterConfig
from olmo_core.nn.moe.v2.router import MoERouterConfigV2
from olmo_core.nn.transformer.config import TransformerActivationCheckpointingMode as Mode
from olmo_core.optim import SkipStepAdamWConfig
from olmo_core.train.callbacks import Callback, CheckpointerCallback
from olmo_core.train.config import StepSkipRange
from olmo_core.train.train_module import TransformerActivationCheckpointingConfig
from pages import ROOT, blocks
from ranks import run_on_ranks
from torch import nn

import equipoise
from equipoise import EquipoiseError, UsageError
from equipoise.integrations.olmo_core import EquipoiseCallback

RATE = 0.02  # moves choices of these small models
BIAS = f"loss-free:rate={RATE},rule=sign,center=false"
UNEVEN = [[12, 5, 9, 2], [3, 12, 12, 7], [1, 1, 12, 12]]  # tokens of each row that are no padding, by step


def with_loss(scope):
    return f"{BIAS}+lbl:scope={scope},coefficient=10"


def run(strategy, batches, gamma=1e-3, k=2, function="softmax", normalise=None, **options):
    """The recorder, the callback, and a copy of the model with the weights that it began with."""
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(gamma, k, function, normalise=normalise)
        options.setdefault("trainer", {"no_checkpoints": True})
        trainer, recorder = make_trainer(model, batches, Path(folder), strategy, **options)
        start = make_model(gamma, k, function, normalise=normalise)
        weights = {name.replace("_checkpoint_wrapped_module.", ""): v for name, v in model.state_dict().items()}
        start.load_state_dict(copy.deepcopy(weights))
        trainer.fit()
        return recorder, trainer.callbacks["equipoise"], start


def assert_counts_and_biases(recorder, windows):
    assert len(recorder.loads) == len(windows)
    for load, biases, window in zip(recorder.loads, recorder.biases, windows, strict=True):
        for name, counts in window.loads.items():
            assert torch.equal(load[name], counts)
            torch.testing.assert_close(biases[name].double(), window.biases[name], rtol=0, atol=1e-7)


# ---- counts, biases, gradient ----


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
@pytest.mark.parametrize(
    "router",
    [
        {},
        {"gamma": None, "function": "sigmoid", "normalise": 1.0},
        {"gamma": None, "k": 1},  # a maximum chooses
        {"k": 1, "function": "sigmoid"},
    ],
    ids=str,
)
def test_accumulation_with_uneven_padding(router, scope):
    batches = make_batches(3, lengths=UNEVEN)
    recorder, _, start = run(with_loss(scope), batches, **router)
    plain, _, _ = run(BIAS, batches, **router)
    options = {name: router[name] for name in ("k", "function") if name in router}
    windows = expected(start, [batches], RATE, scope=scope, **options)
    assert_counts_and_biases(recorder, windows)
    assert recorder.tokens == [sum(lengths) for lengths in UNEVEN]
    at_routers, everywhere = distances(recorder, plain, windows)
    assert max(at_routers) < 1e-6 and max(everywhere) < 1e-6


@pytest.mark.parametrize(
    "mode",
    [
        (Mode.selected_ops, None),
        (Mode.selected_modules, ["blocks.*.feed_forward_moe.router"]),
        (Mode.selected_modules, ["blocks.*.attention", "blocks.*.feed_forward_moe.experts"]),
    ],
    ids=str,
)
def test_activation_checkpointing_counts_once(mode):
    kind, modules = mode
    checkpointing = TransformerActivationCheckpointingConfig(mode=kind, modules=modules)
    batches = make_batches(3, lengths=UNEVEN)
    recorder, callback, start = run(with_loss("global_batch"), batches, ac_config=checkpointing)
    plain, _, _ = run(BIAS, batches, ac_config=checkpointing)
    windows = expected(start, [batches], RATE, scope="global_batch")
    assert_counts_and_biases(recorder, windows)
    assert max(distances(recorder, plain, windows)[0]) < 1e-6


@pytest.mark.parametrize(("wrapper", "gamma"), [("ddp", None), ("fsdp", 1e-3)])
def test_two_ranks_with_unequal_tokens(wrapper, gamma, tmp_path):
    lengths = [[[12, 5, 9, 2], [3, 12, 12, 7]], [[1, 2, 3, 1], [12, 12, 12, 12]]]
    strategies = [with_loss("global_batch"), with_loss("micro_batch"), BIAS]
    ranks = run_on_ranks(2, train_rank, str(tmp_path), wrapper, strategies, lengths, gamma)
    for rank in ranks:
        assert not isinstance(rank, str), rank
    batches = [make_batches(2, rank=rank, lengths=lengths[rank]) for rank in (0, 1)]
    for scope, strategy in zip(("global_batch", "micro_batch"), strategies, strict=False):
        start = make_model(gamma)
        start.load_state_dict(ranks[0][1])
        windows = expected(start, batches, RATE, scope=scope)
        plain = SimpleNamespace(gradients=ranks[0][0][BIAS][0])
        for results, _ in ranks:
            gradients, loads, biases, tokens, _ = results[strategy]
            recorder = SimpleNamespace(gradients=gradients, loads=loads, biases=biases)
            assert_counts_and_biases(recorder, windows)
            assert tokens == [28 + 7, 34 + 48]
            assert max(distances(recorder, plain, windows)[0]) < 1e-6


# ---- which tokens count, and the weight of the loss ----


def test_all_tokens_count_where_only_labels_are_masked_and_it_is_said(caplog):
    batches = make_batches(2)
    for batch in batches:
        batch["label_mask"] = torch.arange(LENGTH).expand(4, -1) >= torch.tensor([2, 6, 11, 3])[:, None]
    recorder, callback, start = run(with_loss("micro_batch"), batches)
    assert [r.message for r in caplog.records if "all tokens count" in r.message] == [
        "EquipoiseCallback: the batch has a label_mask and no attention_mask, so all tokens count, also those without "
        "a label. If label_mask marks padding, pass mask='label_mask'."
    ]
    plain, _, _ = run(BIAS, batches)
    windows = expected(start, [batches], RATE)
    assert recorder.tokens == [4 * LENGTH] * 2
    assert_counts_and_biases(recorder, windows)
    assert max(distances(recorder, plain, windows)[0]) < 1e-6  # not doubled as the labels are halved

    named = EquipoiseCallback(with_loss("micro_batch"), mask="label_mask")
    recorder, _, start = run("", batches, callback=named)
    windows = expected(start, [batches], RATE, mask_name="label_mask")
    assert recorder.tokens == [int(batch["label_mask"].sum()) for batch in batches]
    assert_counts_and_biases(recorder, windows)
    plain, _, _ = run("", batches, callback=EquipoiseCallback(BIAS, mask="label_mask"))
    assert max(distances(recorder, plain, windows)[0]) < 1e-6


def test_a_mask_that_the_batch_lacks_is_refused():
    with pytest.raises(UsageError, match=r"mask must name a tensor of the batch: got 'padding', .* among input_ids"):
        run("", make_batches(1), callback=EquipoiseCallback(BIAS, mask="padding"))


def test_sequences_are_documents():
    batches = make_batches(2, lengths=UNEVEN[:2])
    for batch in batches:
        batch["doc_lens"] = torch.tensor([[5, 7, 0], [12, 0, 0], [1, 2, 9], [6, 6, 0]])
    recorder, _, start = run(with_loss("sequence"), batches)
    plain, _, _ = run(BIAS, batches)
    windows = expected(start, [batches], RATE, scope="sequence")
    assert_counts_and_biases(recorder, windows)
    assert max(distances(recorder, plain, windows)[0]) < 1e-6
    for batch in batches:
        del batch["doc_lens"]
    as_rows = expected(start, [batches], RATE, scope="sequence")
    assert max(distances(recorder, plain, as_rows)[0]) > 0.05


class Shorten(Callback):
    """As the ``SequenceLengthScheduler``, which changes a batch before its step, after our callback."""

    def pre_step(self, batch):
        for name, value in batch.items():
            batch[name] = value[:, :8]


def test_a_batch_that_another_callback_shortens_is_weighed_by_the_tokens_that_are_left():
    batches = make_batches(2, lengths=UNEVEN[:2])
    results = []
    for strategy in (with_loss("micro_batch"), BIAS):
        trainer = {"no_checkpoints": True, "callbacks": {"shorten": Shorten()}}
        results.append(run(strategy, batches, trainer=trainer))
    (recorder, _, start), (plain, _, _) = results
    short = [{name: value[:, :8] for name, value in batch.items()} for batch in batches]
    windows = expected(start, [short], RATE, rows=3)  # micro-batches have as many tokens as before: 3 rows and 1
    assert recorder.tokens == [8 + 5 + 8 + 2, 3 + 8 + 8 + 7]
    assert_counts_and_biases(recorder, windows)
    assert max(distances(recorder, plain, windows)[0]) < 1e-6


def test_the_logged_cross_entropy_is_that_of_the_model():
    batches = make_batches(2)
    with_balancing, _, _ = run(with_loss("micro_batch"), batches)
    without, _, _ = run(BIAS, batches)
    for step in (1, 2):
        assert with_balancing.logged[step]["train/CE loss"] == without.logged[step]["train/CE loss"]
    names = [name for name in with_balancing.logged[2] if name.startswith("equipoise/")]
    assert {"equipoise/maxvio_batch", "equipoise/tokens", "equipoise/load_balancing_loss"} <= set(names)
    assert with_balancing.logged[2]["equipoise/tokens"] == 4 * LENGTH


# ---- what else the trainer runs ----


@pytest.mark.parametrize("strategy", [BIAS, with_loss("micro_batch")])
def test_the_dry_run_and_evaluations_are_not_counted(strategy):
    batches = make_batches(2, lengths=UNEVEN[:2])
    recorder, callback, _ = run(strategy, batches)
    assert callback.balance.num_windows == 2 and recorder.tokens == [28, 34]
    module = callback.trainer.train_module
    module.eval_batch(dict(batches[0]))
    assert not callback.balance.has_open_window


def test_steps_to_skip_close_no_window():
    batches = make_batches(4)
    skip = {"steps_to_skip": [StepSkipRange(start=2, stop=4)], "no_checkpoints": True}
    recorder, callback, _ = run(BIAS, batches, trainer=skip)
    assert callback.balance.num_windows == 2
    assert torch.equal(*(next(iter(recorder.biases[step].values())) for step in (0, 2)))


def test_a_step_that_its_optimizer_skips_moves_no_bias():
    optimizer = SkipStepAdamWConfig(lr=0.0, rolling_interval_length=4, sigma_factor=0)  # skips above the mean
    recorder, _, _ = run(BIAS, make_batches(8), optim=optimizer)
    skipped = [recorder.logged[step]["optim/step skipped"] == 1 for step in range(1, 9)]
    assert any(skipped) and not all(skipped)
    before = torch.zeros(EXPERTS)
    for was_skipped, biases in zip(skipped, recorder.biases, strict=True):
        bias = next(iter(biases.values()))
        assert torch.equal(bias, before) == was_skipped
        before = bias


# ---- its own balancing ----


def test_its_own_update_moves_nothing_until_detach(caplog):
    recorder, callback, _ = run(BIAS, make_batches(1))
    assert any("bias_gamma=0.001) is off until detach()" in record.message for record in caplog.records)
    model = callback.trainer.train_module.model
    before = {name: router.score_bias.clone() for name, router in routers_of(model).items()}
    assert all(bias.any() for bias in before.values())
    for router in routers_of(model).values():
        router.score_bias_batch_size_per_expert += torch.arange(EXPERTS)
    model.post_batch()
    assert all(torch.equal(router.score_bias, before[name]) for name, router in routers_of(model).items())
    callback.detach()
    for router in routers_of(model).values():
        router.score_bias_batch_size_per_expert += torch.arange(EXPERTS)
    model.post_batch()
    for name, router in routers_of(model).items():
        step = 1e-3 * torch.tensor([1.0, 1, 1, 1, -1, -1, -1, -1])
        torch.testing.assert_close(router.score_bias, before[name] + step)


def test_without_a_bias_of_ours_its_own_update_goes_on():
    recorder, callback, _ = run("lbl:scope=micro_batch", make_batches(2))
    for name, router in routers_of(callback.trainer.train_module.model).items():
        assert router.bias_gamma == 1e-3 and router.score_bias.any()
        assert torch.equal(callback.balance.biases[name], router.score_bias)


def test_its_own_losses_are_refused_beside_the_same_of_ours(tmp_path, caplog):
    batches = make_batches(1)
    with pytest.raises(EquipoiseError, match=r"ai2-olmo-core 3.0.0 adds its own to .* \(lb_loss_weight=0.005\)"):
        make_trainer(make_model(loss=0.01), batches, tmp_path, "lbl")  # it divides by the number of layers
    with pytest.raises(EquipoiseError, match=r"one z-loss must be enough: .* \(z_loss_weight=0.0005\)"):
        make_trainer(make_model(z_loss=0.001), batches, tmp_path, "z")
    make_trainer(make_model(z_loss=0.001), batches, tmp_path, "lbl")
    make_trainer(make_model(loss=0.01), batches, tmp_path, BIAS)
    assert "adds a balancing loss of its own (lb_loss_weight=0.005), beside loss-free" in caplog.text


def test_a_second_strategy_is_not_taken_for_the_mask():
    with pytest.raises(TypeError, match="positional argument"):
        EquipoiseCallback("loss-free", "lbl")


# ---- resume ----


@pytest.mark.parametrize("gamma", [1e-3, None])
def test_resume_goes_on_as_if_nothing_had_happened(gamma, tmp_path):
    strategy = "loss-free:rate=0.02,rule=momentum+lbl:scope=global_batch,pooling=previous"
    batches = make_batches(4, lengths=[*UNEVEN, [12, 12, 12, 1]])
    recorders = []
    for folder, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        saving = {"callbacks": {"checkpointer": CheckpointerCallback(save_interval=2)}}
        options = {"lr": 1e-2, "steps": steps, "trainer": saving}
        trainer, recorder = make_trainer(make_model(gamma), batches, tmp_path / folder, strategy, **options)
        trainer.fit()
        recorders.append(recorder)
    whole_run, first, second = recorders
    assert len(first.loads) == len(second.loads) == 2
    for step, window in enumerate([*first.biases, *second.biases]):
        for name, bias in window.items():
            assert torch.equal(bias, whole_run.biases[step][name])
    for step, gradient in enumerate([*first.gradients, *second.gradients]):
        for name, value in gradient.items():
            assert torch.equal(value, whole_run.gradients[step][name]), (step, name)


def test_a_checkpoint_without_a_state_is_refused(tmp_path):
    batches = make_batches(2)
    trainer, _ = make_trainer(make_model(), batches, tmp_path, None, steps=1)
    trainer.fit()
    trainer, _ = make_trainer(make_model(), batches, tmp_path, BIAS, steps=2)
    with pytest.raises(EquipoiseError, match=r"a checkpoint must hold the state of the balancing: .*fresh=True"):
        trainer.fit()
    trainer.callbacks["equipoise"].detach()
    trainer, recorder = make_trainer(
        make_model(), batches, tmp_path, BIAS, steps=2, callback=EquipoiseCallback(BIAS, fresh=True)
    )
    trainer.fit()
    assert len(recorder.loads) == 1


# ---- what is refused ----


@pytest.mark.parametrize(
    ("attribute", "name"), [("_tp_config", "tensor"), ("_cp_config", "context"), ("_ep_config", "expert")]
)
def test_other_parallelism_is_refused(attribute, name, tmp_path):
    trainer, _ = make_trainer(make_model(), make_batches(1), tmp_path, None)
    setattr(trainer.train_module, attribute, object())
    with pytest.raises(UsageError, match=f"{name} parallelism has not been tested"):
        trainer.add_callback("equipoise", EquipoiseCallback(BIAS))


def test_another_train_module_is_refused():
    callback = EquipoiseCallback(BIAS)
    callback.trainer = SimpleNamespace(train_module=nn.Linear(2, 2))
    with pytest.raises(UsageError, match=r"must have a TransformerTrainModule: got a Linear"):
        callback.post_attach()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("option", ["jitter_eps", "uniform_expert_assignment", "random_expert_assignment"])
def test_routers_that_choose_otherwise_are_refused(version, option):
    value = 0.1 if option == "jitter_eps" else True
    with pytest.raises(EquipoiseError, match=f"its {option} is on"):
        equipoise.attach(nn.Sequential(make_router(version, **{option: value})), BIAS)


def test_a_router_of_document_pools_is_refused():
    pools = EmoRouterConfig(eos_token_id=0, min_document_expert_pool=2, max_document_expert_pool=4)
    router = MoERouterConfigV2(d_model=16, num_experts=EXPERTS, top_k=2, emo=pools).build()
    with pytest.raises(EquipoiseError, match="pool of experts that it draws for each document"):
        equipoise.attach(nn.Sequential(router), BIAS)


@pytest.mark.parametrize(("gamma", "strategy"), [(1e-3, BIAS), (None, "lbl")])
def test_a_router_of_shared_experts_is_refused_when_it_is_called(gamma, strategy):
    router = make_router(2, bias_gamma=gamma).train()
    equipoise.attach(nn.Sequential(router), strategy)
    with pytest.raises(EquipoiseError, match=r"scores_only=True, as one of shared experts is. Leave it out"):
        router(torch.randn(2, 5, 16), True)


# ---- its second kind of router ----


def make_router(version, **options):
    if version == 1:
        return MoERouterConfig(top_k=2, **options).build(16, EXPERTS)
    return MoERouterConfigV2(d_model=16, num_experts=EXPERTS, **{"top_k": 2} | options).build()


@pytest.mark.parametrize("gamma", [None, 1e-3])
@pytest.mark.parametrize("function", ["softmax", "sigmoid", "topk_softmax"])
@pytest.mark.parametrize(
    "option",
    [
        {},
        {"top_k": 1},
        {"normalize_expert_weights": 1.0, "restore_weight_scale": True},
        {"bias": True},
        {"use_recompute_fp32_cast": True},
    ],
    ids=str,
)
def test_routers_of_version_2_are_counted_and_steered(gamma, function, option):
    router = make_router(2, bias_gamma=gamma, gating_function=function, **option).train()
    balance = equipoise.attach(nn.Sequential(router), f"{BIAS}+lbl:scope=micro_batch,coefficient=1")
    generator = torch.Generator().manual_seed(0)
    bias = torch.zeros(EXPERTS)
    for _ in range(3):
        hidden = torch.randn(3, 7, 16, generator=generator)
        weights, ids, _, _ = router(hidden, False)
        router.zero_grad()
        (0 * weights.sum() + balance.loss()).backward()
        balance.step()
        counts = [0] * EXPERTS
        for expert in ids.flatten().tolist():
            counts[expert] += 1
        (load,) = balance.load.values()
        assert load.tolist() == counts
        weight = router.weight.detach().double().view(EXPERTS, 16).requires_grad_()
        logits = hidden.double().flatten(0, 1) @ weight.T
        logits = logits if router.bias is None else logits + router.bias.detach().double()
        scores = logits.sigmoid() if function == "sigmoid" else logits.softmax(-1)
        ranked = (logits if function == "topk_softmax" else scores).detach() + bias
        for row, experts in zip(ranked.tolist(), ids.flatten(0, 1).tolist(), strict=True):
            assert set(experts) == set(sorted(range(EXPERTS), key=lambda e, row=row: -row[e])[: len(experts)])
        share = torch.tensor(counts, dtype=torch.float64) / sum(counts)
        loss = EXPERTS * (share * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum()
        (gradient,) = torch.autograd.grad(loss, weight)
        assert (router.weight.grad.view(EXPERTS, 16) - gradient).norm() < 1e-6 * gradient.norm()
        bias += torch.tensor([RATE * ((sum(counts) / EXPERTS > c) - (sum(counts) / EXPERTS < c)) for c in counts])
        torch.testing.assert_close(next(iter(balance.biases.values())), bias)
        if gamma is not None:
            router.post_batch()
            torch.testing.assert_close(router.score_bias, bias)


# ---- a training ----


def test_balancing_lowers_the_violation_in_50_steps():
    generator = torch.Generator().manual_seed(5)
    shares = torch.arange(1, VOCABULARY + 1).float() ** -0.5  # some tokens are frequent, others rare
    batches = [
        {"input_ids": torch.multinomial(shares.expand(16, -1), LENGTH, True, generator=generator)} for _ in range(50)
    ]
    violation = {}
    for strategy in ("none", "loss-free:rate=0.005", "lbl:scope=global_batch,coefficient=0.1"):
        recorder, _ = train(make_model(gamma=None), batches, strategy, lr=1e-3, rows=16)
        values = [recorder.logged[step]["equipoise/maxvio_batch"] for step in range(1, 51)]
        violation[strategy] = sum(values[-10:]) / 10
    print(violation)
    unbalanced, *balanced = violation.values()
    assert unbalanced > 2.9 and max(balanced) < 0.5 * unbalanced  # at most 3: two experts get every token


def test_the_page_runs(tmp_path):
    names = ("train_module", "trainer_config", "data_loader")
    parts = make_parts(make_model(), make_batches(3), tmp_path, trainer={"no_checkpoints": True})
    namespace = dict(zip(names, parts, strict=True))
    codes = [block.code for block in blocks(ROOT / "docs/how-to/olmo_core.md") if block.language == "py"]
    assert len(codes) == 2
    for code in codes:
        exec(code, namespace)
    assert all(bias.any() for bias in namespace["biases"].values())


def test_the_example_runs():
    command = [sys.executable, ROOT / "examples/olmo_core_loop.py", "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    table = [line.split() for line in done.stdout.split("\nstrategy ")[1].splitlines()]
    assert [row[0] for row in table[1:]][:1] == ["none"] and [len(row) for row in table[1:]] == [4, 4]

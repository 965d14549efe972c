"""Losses of our own: their formulas by hand and against loops, and what they do in a run."""

import pytest
import torch
from models import VOCAB, tiny_lm

from equipoise.balancers import load_balancing_loss
from equipoise.balancers.base import LayerStack
from equipoise.errors import EquipoiseError, UsageError
from equipoise.routing import Routing, route
from equipoise.testing import BALANCER_INVARIANTS, check_balancer
from equipoise_lab.records import Run
from equipoise_lab.train.balancers import attach_strategy, check_strategy
from equipoise_lab.train.candidates import ContrastLoss, GroupLoss, UnbiasedLoss
from equipoise_lab.train.loop import train


def _routing(logits, *, bias=None, mask=None):
    return route(logits, 1, score_function="softmax", bias=bias, mask=mask)


def _prepared(balancer, layers=1, experts=4):
    balancer.prepare(LayerStack("softmax", 1, torch.zeros(layers, experts)))
    return balancer


def _random_logits(tokens, experts=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, experts, generator=generator, dtype=torch.float64).requires_grad_()


# ---- lbl-unbiased ----


def test_unbiased_loss_by_hand():
    """The bias sends three of four tokens to expert 1; by scores three of four prefer expert 0, so f = (3/4, 1/4)."""
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    routing = _routing(logits, bias=torch.tensor([-0.5, 0.0], dtype=torch.float64))
    assert routing.expert_ids.flatten().tolist() == [0, 1, 1, 1]
    balancer = _prepared(UnbiasedLoss(), experts=2)
    assert balancer.statistic(routing, 0) is None
    p = logits.softmax(-1).mean(0)
    assert float(balancer.loss(routing, None)) == pytest.approx(float(2 * (0.75 * p[0] + 0.25 * p[1])), rel=1e-12)


def test_unbiased_loss_pools_the_window_by_layer_and_leaves_out_masked_tokens():
    balancer = _prepared(UnbiasedLoss(), layers=2)
    mask = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0])
    calls = [(_routing(_random_logits(5, seed=seed), mask=mask), seed % 2) for seed in range(4)]
    for routing, row in calls:
        balancer.statistic(routing, row)
    load = [[0] * 4, [0] * 4]
    for routing, row in calls:
        for scores, flag in zip(routing.scores.tolist(), mask.tolist(), strict=True):
            load[row][scores.index(max(scores))] += int(flag)
    assert [sum(counts) for counts in load] == [6, 6]
    for routing, row in calls:
        expected = load_balancing_loss(routing, torch.tensor(load[row]))
        torch.testing.assert_close(balancer.loss(routing, None), expected, rtol=1e-12, atol=0)


def test_counts_of_the_unbiased_loss_end_when_the_window_ends():
    balancer = _prepared(UnbiasedLoss())
    first, second = (_routing(_random_logits(5, seed=seed)) for seed in (1, 2))
    balancer.statistic(first, 0)
    balancer.update(torch.ones(1, 4, dtype=torch.int64))
    with pytest.raises(EquipoiseError, match="the open window has counted"):
        balancer.loss(first, None)
    balancer.statistic(second, 0)
    torch.testing.assert_close(balancer.loss(second, None), load_balancing_loss(second), rtol=1e-12, atol=0)


@pytest.mark.parametrize("strategy", ["lbl-unbiased:coefficient=0.7", "frozen+lbl-unbiased:coefficient=0.7"])
def test_unbiased_loss_is_the_usual_one_without_a_bias(strategy):
    """In a model: gradients of the routers equal those of lbl, as long as all biases are zero."""
    gradients = []
    for text in (strategy, "lbl:coefficient=0.7"):
        model = tiny_lm()
        balance = attach_strategy(model, text)
        losses = []
        for seed in range(3):
            ids = torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(seed))
            losses.append(model(ids) * 0 + balance.loss())
        sum(losses).backward()
        gradients.append([block.gate.weight.grad for block in model.blocks])
    for unbiased, usual in zip(*gradients, strict=True):
        assert usual.abs().max() > 1e-4
        torch.testing.assert_close(unbiased, usual, rtol=1e-4, atol=1e-6)


def test_unbiased_loss_pushes_down_what_the_bias_hides():
    """A bias that makes the load even leaves the usual loss without a gradient, and the unbiased one with its own."""
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    routing = _routing(logits, bias=torch.tensor([-0.4, 0.0], dtype=torch.float64))
    assert routing.expert_ids.flatten().tolist() == [0, 1]
    (usual,) = torch.autograd.grad(load_balancing_loss(routing), logits, retain_graph=True)
    assert usual.abs().max() < 1e-12
    balancer = _prepared(UnbiasedLoss(), experts=2)
    balancer.statistic(routing, 0)
    (gradient,) = torch.autograd.grad(balancer.loss(routing, None), logits)
    assert (gradient[:, 0] > 0.1).all() and (gradient[:, 1] < -0.1).all()


def test_unbiased_loss_needs_the_whole_window_in_one_process(tiny):
    config = tiny(strategy="quantile+lbl-unbiased")
    check_strategy(config, 1)
    with pytest.raises(UsageError, match="lbl-unbiased must run in one process"):
        check_strategy(config, 2)
    with pytest.raises(UsageError, match="lbl-unbiased must know every token of a step before the backward"):
        check_strategy(tiny(strategy="lbl-unbiased", order="interleaved"), 1)


# ---- lbl-groups ----


def test_group_loss_by_hand():
    """Two groups of two experts: F = (0.7, 0.3) of the window, Q = (0.6, 0.4), so 2 (0.42 + 0.12) = 1.08."""
    scores = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.1, 0.3, 0.2, 0.4]], dtype=torch.float64)
    routing = Routing(scores.log(), scores, torch.tensor([[0], [3]]), torch.ones(2, 1))
    balancer = _prepared(GroupLoss(groups=2))
    assert float(balancer.loss(routing, torch.tensor([7, 0, 1, 2]))) == pytest.approx(1.08, rel=1e-12)
    assert float(balancer.loss(routing, torch.tensor([0, 7, 3, 0]))) == pytest.approx(1.08, rel=1e-12), "same groups"


def test_group_loss_with_a_group_for_each_expert_is_the_usual_one():
    routing, load = _routing(_random_logits(9, seed=3), mask=torch.tensor([1.0] * 6 + [0.0] * 3)), [5, 1, 0, 3]
    balancer = _prepared(GroupLoss(groups=4))
    torch.testing.assert_close(
        balancer.loss(routing, torch.tensor(load)), load_balancing_loss(routing, torch.tensor(load)), rtol=1e-12, atol=0
    )


def test_groups_must_divide_the_experts(tiny):
    with pytest.raises(UsageError, match="groups of lbl-groups must divide the 4 experts: got 3"):
        _prepared(GroupLoss(groups=3))
    config = tiny(strategy="quantile+lbl-groups:groups=7")
    with pytest.raises(UsageError, match=f"must divide the {config.experts} experts: got 7"):
        check_strategy(config, 1)  # before anything is written
    with pytest.raises(ValueError, match="groups must be at least 2: got 1"):
        GroupLoss(groups=1)


# ---- lbl-contrast ----


def test_contrast_loss_by_hand():
    """f = (1/2, 1/2) of the window and g = (1/4, 3/4) of the micro-batch; P = (0.45, 0.55)."""
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.3, 0.7]], dtype=torch.float64)
    routing = Routing(p.log(), p, torch.tensor([[0], [1], [1], [1]]), torch.ones(4, 1))
    loss = _prepared(ContrastLoss(within=0.2), experts=2).loss(routing, torch.tensor([8, 8]))
    assert float(loss) == pytest.approx(1 - 0.2 * 2 * (0.45 / 4 + 0.55 * 3 / 4), rel=1e-12)


def test_contrast_loss_raises_the_scores_of_the_experts_that_a_micro_batch_chooses():
    routing = _routing(_random_logits(12, seed=5))
    even, load = torch.full((4,), 3), routing.expert_ids.flatten().bincount(minlength=4)
    (gradient,) = torch.autograd.grad(_prepared(ContrastLoss(within=0.5)).loss(routing, even), routing.logits)
    assert gradient[:, load.argmax()].sum() < 0 < gradient[:, load.argmin()].sum()


@pytest.mark.parametrize("within", [1, -0.1])
def test_contrast_must_weigh_less_than_the_global_term(within):
    with pytest.raises(ValueError, match="within must be"):
        ContrastLoss(within=within)


# ---- all ----


@pytest.mark.parametrize("invariant", [i for i in BALANCER_INVARIANTS if i != "loss permutes"])
def test_group_loss_satisfies_the_balancer_invariants_except_that_groups_are_of_neighbours(invariant):
    check_balancer(lambda: GroupLoss(groups=2), only=invariant)


@pytest.mark.parametrize("invariant", [i for i in BALANCER_INVARIANTS if i != "loss is a mean over tokens"])
def test_contrast_loss_satisfies_the_balancer_invariants_except_that_a_call_is_a_micro_batch(invariant):
    check_balancer(ContrastLoss, only=invariant)


@pytest.mark.parametrize("invariant", ["specification", "copies", "strategy string"])
def test_unbiased_loss_satisfies_the_invariants_of_a_single_call(invariant):
    check_balancer(UnbiasedLoss, only=invariant)


@pytest.mark.parametrize(
    "strategy",
    ["quantile+lbl-unbiased:coefficient=1", "quantile+lbl-groups:coefficient=1,groups=2", "lbl-contrast:coefficient=1"],
)
def test_candidates_train_and_resume_bit_for_bit(tiny, new_watcher, tmp_path, strategy):
    options = {"strategy": strategy, "steps": 8, "checkpoint_every": 3, "save_model": False}
    whole = train(tiny(out=tmp_path / "whole", **options), new_watcher())
    with pytest.raises(KeyboardInterrupt):
        train(tiny(out=tmp_path / "cut", **options), new_watcher(5))
    resumed = train(tiny(out=tmp_path / "cut", **options, resume=True), new_watcher())
    assert resumed["val_nats"] == whole["val_nats"]
    whole_rows, cut_rows = (
        [{key: value for key, value in row.items() if key != "seconds"} for row in Run(tmp_path / name).rows("steps")]
        for name in ("whole", "cut")
    )
    assert whole_rows == cut_rows and len(whole_rows) == 8

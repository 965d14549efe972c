"""Balancers of other papers: their formulas, their state, and where the lab refuses them."""

import json
import math
from pathlib import Path

import pytest
import torch
from models import EXPERTS, VOCAB, K, tiny_lm

import equipoise
from equipoise.balancers import format_strategy
from equipoise.balancers.base import LayerStack
from equipoise.errors import EquipoiseError, UsageError
from equipoise.routing import Routing, route, score
from equipoise.testing import BALANCER_INVARIANTS, check_balancer
from equipoise_lab.records import Run
from equipoise_lab.train.balancers import (
    UNIT,
    PhiBalancing,
    ShinkaLoss,
    ShuffleControl,
    attach_strategy,
    check_strategy,
    parse_lab_strategy,
    shinka_loss,
)
from equipoise_lab.train.compare import compare
from equipoise_lab.train.config import Compare
from equipoise_lab.train.loop import train


def _rows(folder, log="steps", left_out=("seconds",)):
    return [{k: v for k, v in row.items() if k not in left_out} for row in Run(folder).rows(log)]


def _without_times(result):
    return {key: value for key, value in result.items() if key != "tokens_per_second"}


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def _routing(tokens, experts=4, k=1, seed=0, mask=None, score_function="softmax"):
    logits = torch.randn(tokens, experts, generator=_generator(seed), dtype=torch.float64)
    return route(logits.requires_grad_(), k, score_function=score_function, mask=mask)


def _prepared(balancer, layers=1, experts=4):
    balancer.prepare(LayerStack("softmax", 1, torch.zeros(layers, experts)))
    return balancer


def _p(routing):
    """P_e, computed by a loop."""
    rows = routing.scores.tolist()
    flags = [1.0] * len(rows) if routing.mask is None else routing.mask.tolist()
    normalised = [[s / sum(row) for s in row] for row, flag in zip(rows, flags, strict=True) if flag]
    return [sum(column) / len(normalised) for column in zip(*normalised, strict=True)]


# ---- shuffle ----


def test_shuffle_control_of_a_single_micro_batch_equals_the_plain_loss():
    """All tokens of the micro-batch are drawn. f by hand: three of four tokens go to expert 0."""
    balancer = _prepared(ShuffleControl(), experts=2)
    routing = route(torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.5, 0.0], [0.0, 1.0]], dtype=torch.float64), 1)
    assert balancer.statistic(routing, 0) is None
    p = _p(routing)
    assert float(balancer.loss(routing, None).detach()) == pytest.approx(2 * (0.75 * p[0] + 0.25 * p[1]), rel=1e-12)


def _pool(balancer, routings, row=0):
    for routing in routings:
        balancer.statistic(routing, row)


def test_shuffle_control_draws_as_many_tokens_as_the_micro_batch_has_and_none_twice():
    """Every token of the window chooses another expert, so the choices show which tokens were drawn."""
    choices = torch.arange(40)[:, None]
    whole = [
        Routing(torch.randn(10, 40), torch.full((10, 40), 0.5), part, torch.ones(10, 1)) for part in choices.split(10)
    ]
    balancer = _prepared(ShuffleControl(), experts=40)
    _pool(balancer, whole)
    seen = [balancer.draw(routing).flatten().tolist() for routing in whole]
    for drawn in seen:
        assert len(drawn) == len(set(drawn)) == 10
        assert any(token >= 10 for token in drawn) and set(drawn) != set(range(10))
    assert len({tuple(drawn) for drawn in seen}) == 4, "micro-batches draw the same tokens"
    again = _prepared(ShuffleControl(), experts=40)
    torch.manual_seed(99)
    _pool(again, whole)
    assert [again.draw(routing).flatten().tolist() for routing in whole] == seen, "another draw gives other tokens"


def test_masked_tokens_are_neither_drawn_nor_counted():
    mask = torch.tensor([1.0] * 3 + [0.0] * 5)
    masked = _routing(8, seed=1, mask=mask)._replace(expert_ids=torch.tensor([[0]] * 3 + [[3]] * 5))
    other = _routing(8, seed=2)._replace(expert_ids=torch.ones(8, 1, dtype=torch.int64))
    balancer = _prepared(ShuffleControl())
    _pool(balancer, [masked, other])
    assert balancer.draw(masked).shape == (3, 1), "as many as are not masked"
    assert balancer.draw(other).shape == (8, 1)
    for routing in (masked, other):
        assert not (balancer.draw(routing) == 3).any()
    all_masked = _routing(4, seed=3, mask=torch.zeros(4))
    balancer.statistic(all_masked, 0)
    assert float(balancer.loss(all_masked, None).detach()) == 0


def test_drawn_shares_have_the_mean_of_the_window_and_the_variance_without_replacement():
    """n of N tokens are drawn, with one choice each: var f_e = q (1 - q) / n * (N - n) / (N - 1)."""
    size, parts, draws = 20, 4, 2000
    ids = torch.arange(size * parts) % 4
    ids[ids == 3] = 0  # shares 1/2, 1/4, 1/4, 0
    ids = ids[torch.randperm(len(ids), generator=_generator(5))]
    shares = []
    for draw in range(draws):
        balancer = _prepared(ShuffleControl())
        order = torch.randperm(len(ids), generator=_generator(draw))  # the same window, split into other micro-batches
        routings = [
            Routing(
                torch.full((size, 4), float(part)), torch.full((size, 4), 0.25), part_ids[:, None], torch.ones(1, 1)
            )
            for part, part_ids in enumerate(ids[order].split(size))
        ]
        _pool(balancer, routings)
        shares.append(balancer.draw(routings[0]).flatten().bincount(minlength=4) / size)
    drawn = torch.stack(shares).double()
    q = torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.float64)
    n, total = size, size * parts
    variance = q * (1 - q) / n * (total - n) / (total - 1)
    assert (drawn.mean(0) - q).abs().max() < 4 * (variance.max() / draws) ** 0.5
    torch.testing.assert_close(drawn.var(0), variance, rtol=0.15, atol=1e-12)


def test_draws_are_kept_apart_by_layer_and_window():
    balancer = _prepared(ShuffleControl(), layers=2)
    first, second = _routing(6, seed=1), _routing(6, seed=2)
    one, two = torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1, dtype=torch.int64)
    first, second = first._replace(expert_ids=one), second._replace(expert_ids=two)
    balancer.statistic(first, 0)
    balancer.statistic(second, 1)
    assert balancer.draw(first).equal(one) and balancer.draw(second).equal(two)
    balancer.update(torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(EquipoiseError, match="that the open window has counted: this call belongs to another"):
        balancer.loss(first, None)


def test_the_gradient_uses_draws_from_the_whole_window():
    """The expected gradient comes from autograd through explicit losses of the same draws."""
    model = tiny_lm()
    balance = attach_strategy(model, "shuffle:coefficient=0.7")
    calls = [[], []]
    for block, seen in zip(model.blocks, calls, strict=True):
        # Detached inputs: a loss only reaches the gate of its own layer.
        block.gate.register_forward_pre_hook(lambda m, a: (a[0].detach(),))
        block.gate.register_forward_hook(lambda m, a, out, seen=seen: seen.append((a[0], out[0], out[2])))
    inputs = [torch.randint(0, VOCAB, (2, 7), generator=_generator(seed)) for seed in range(3)]
    total = sum((0 * model(ids) + balance.loss()) / 3 for ids in inputs)
    total.backward()
    for layer, score_function in enumerate(("sigmoid", "softmax")):
        balancer = balance._biases.group_of[layer][0].balancers[0]
        weight = model.blocks[layer].gate.weight.detach().clone().requires_grad_()
        expected = torch.zeros(())
        for hidden, logits, expert_ids in calls[layer]:
            logits_again = hidden.detach() @ weight.T
            torch.testing.assert_close(logits_again, logits)
            drawn = balancer.draw(
                Routing(logits.detach(), score(logits.detach(), score_function), expert_ids, expert_ids.float())
            )
            share = drawn.flatten().bincount(minlength=EXPERTS) / (14 * K)
            p = score(logits_again, score_function)
            p = (p / p.sum(-1, keepdim=True)).mean(0)
            expected = expected + 0.7 * EXPERTS * (share * p).sum() / 3
        (gradient,) = torch.autograd.grad(expected, weight)
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(model.blocks[layer].gate.weight.grad, gradient, rtol=1e-4, atol=1e-7)
    balance.step()
    assert balance.metrics()["load_balancing_loss"] > 0


# ---- phi ----


def test_phi_matches_a_hand_calculation():
    """Two tokens, two experts: p = (0.6, 0.4), m = 0.4 * 0.5 + 0.6 * p = (0.56, 0.44)."""
    scores = torch.tensor([[0.8, 0.2], [0.4, 0.6]], dtype=torch.float64)
    routing = Routing(scores.log(), scores, torch.tensor([[0], [1]]), torch.ones(2, 1))
    balancer = _prepared(PhiBalancing(), experts=2)
    statistic = balancer.statistic(routing, 0)
    assert statistic.dtype == torch.int64
    assert statistic.tolist() == [round(0.8 * UNIT) + round(0.4 * UNIT), round(0.2 * UNIT) + round(0.6 * UNIT), 2]
    assert float(balancer.loss(routing, None).detach()) == pytest.approx(1 - math.log(2)), "equal shares at first"
    balancer.update(torch.ones(1, 2, dtype=torch.int64), [statistic])
    m = balancer.state()["excess"][0] + 0.5
    torch.testing.assert_close(m, torch.tensor([0.56, 0.44], dtype=torch.float64), atol=1e-6, rtol=0)
    balancer.statistic(routing, 0)
    expected = (math.log(0.56) + 1) * 0.6 + (math.log(0.44) + 1) * 0.4
    assert float(balancer.loss(routing, None).detach()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("memory", [0.4, 0.0, 0.9])
def test_phi_matches_the_reference_over_windows(memory):
    balancer = _prepared(PhiBalancing(memory=memory), layers=2)
    m = [[0.25] * 4 for _ in range(2)]
    for window in range(4):
        sums = [torch.zeros(5, dtype=torch.int64) for _ in range(2)]
        means, tokens = [[0.0] * 4 for _ in range(2)], 0
        for part in range(3):
            mask = (torch.rand(6, generator=_generator(part)) < 0.6).double() if part else None
            tokens += 6 if mask is None else int(mask.sum())
            for row in range(2):
                routing = _routing(6, seed=100 * window + 10 * part + row, mask=mask, score_function="sigmoid")
                sums[row] += balancer.statistic(routing, row)
                p = _p(routing)
                expected = sum((math.log(m[row][e]) + 1) * p[e] for e in range(4))
                assert float(balancer.loss(routing, None).detach()) == pytest.approx(expected, abs=1e-6)
                count = 6 if mask is None else int(mask.sum())
                means[row] = [a + count * b for a, b in zip(means[row], p, strict=True)]
        balancer.update(torch.ones(2, 4, dtype=torch.int64), sums)
        m = [[memory * m[r][e] + (1 - memory) * means[r][e] / tokens for e in range(4)] for r in range(2)]
        average = balancer.state()["excess"] + 0.25
        torch.testing.assert_close(average, torch.tensor(m, dtype=torch.float64), rtol=0, atol=1e-6)
        torch.testing.assert_close(average.sum(-1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-6)


def test_phi_lowers_scores_of_overloaded_experts_and_ignores_windows_without_tokens():
    balancer = _prepared(PhiBalancing())
    routing = _routing(8, seed=3)
    balancer.update(torch.ones(1, 4, dtype=torch.int64), [balancer.statistic(routing, 0)])
    excess = balancer.state()["excess"].clone()
    balancer.statistic(routing, 0)
    (gradient,) = torch.autograd.grad(balancer.loss(routing, None), routing.logits)
    assert gradient.sum(0)[excess.argmax()] > 0 > gradient.sum(0)[excess.argmin()]
    balancer.update(torch.zeros(1, 4, dtype=torch.int64), [torch.zeros(5, dtype=torch.int64)])
    assert balancer.state()["excess"].equal(excess)
    balancer.state()["excess"].fill_(-0.25)  # m = 0
    balancer.statistic(routing, 0)
    assert float(balancer.loss(routing, None).detach()) == pytest.approx(1 - 24 * math.log(2)), "m is at least 2^-24"


# ---- Shinka ----


def test_shinka_matches_a_hand_calculation():
    """Two tokens, P = (0.6, 0.4), f = (0.99, 0.01), tau = 0.032."""
    scores = torch.tensor([[0.8, 0.2], [0.4, 0.6]], dtype=torch.float64)
    routing = Routing(scores.log(), scores, torch.tensor([[0], [1]]), torch.ones(2, 1))
    entropy = -0.6 * math.log(0.6) - 0.4 * math.log(0.4)
    expected = 2 * (0.99 * 0.6 + 0.01 * 0.4) + 0.1 * (0.5 + 1 - entropy / math.log(2)) * (0.032 - 0.01)
    assert float(shinka_loss(routing, torch.tensor([99, 1]))) == pytest.approx(expected, rel=1e-12)
    even = Routing(scores.log(), torch.full_like(scores, 0.5), torch.tensor([[0], [1]]), torch.ones(2, 1))
    assert float(shinka_loss(even, torch.tensor([5, 5]))) == pytest.approx(1)


def test_shinka_matches_the_reference_with_a_mask():
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    routing, load = _routing(6, seed=4, mask=mask, score_function="sigmoid"), torch.tensor([50, 0, 1, 49])
    p, f = _p(routing), [c / 100 for c in load.tolist()]
    entropy = -sum(x * math.log(x) for x in p)
    deficit = sum(max(0.0, 0.064 / 4 - x) for x in f)
    assert deficit == pytest.approx(0.016 + 0.006)
    expected = 4 * sum(a * b for a, b in zip(f, p, strict=True)) + 0.1 * (1.5 - entropy / math.log(4)) * deficit
    assert float(shinka_loss(routing, load).detach()) == pytest.approx(expected, rel=1e-12)
    plain = equipoise.balancers.load_balancing_loss(routing, load)
    gradients = [
        torch.autograd.grad(x, routing.logits, retain_graph=True)[0] for x in (shinka_loss(routing, load), plain)
    ]
    assert not torch.allclose(*gradients), "the second term has a gradient, through s(P)"
    busy = torch.tensor([25, 25, 25, 25])
    assert float(shinka_loss(routing, busy).detach()) == pytest.approx(
        float(equipoise.balancers.load_balancing_loss(routing, busy).detach()), rel=1e-12
    )


@pytest.mark.parametrize("invariant", [i for i in BALANCER_INVARIANTS if i != "loss is a mean over tokens"])
def test_shinka_satisfies_the_balancer_invariants(invariant):
    check_balancer(ShinkaLoss, only=invariant)


@pytest.mark.parametrize("kind", [ShuffleControl, PhiBalancing])
@pytest.mark.parametrize("invariant", ["specification", "copies", "strategy string"])
def test_shuffle_and_phi_satisfy_the_invariants_of_a_single_call(kind, invariant):
    check_balancer(kind, only=invariant)


def test_phi_satisfies_the_statistic_invariant():
    assert check_balancer(PhiBalancing, only="statistic") == ("statistic",)


# ---- strings, states ----


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("shuffle:coefficient=1e-2", "shuffle"),
        ("phi:coefficient=0.5,memory=0.9+z", "phi:coefficient=0.5,memory=0.9+z"),
        ("loss-free+shinka:coefficient=1", "loss-free+shinka:coefficient=1.0"),
    ],
)
def test_lab_strategy_strings_round_trip(text, written):
    assert format_strategy(parse_lab_strategy(text)) == written
    assert format_strategy(parse_lab_strategy(written)) == written
    balance = attach_strategy(tiny_lm(), text)
    assert balance.state_dict()["strategy"] == written


def test_lab_strategies_are_unknown_to_the_library_and_listed_by_the_lab():
    with pytest.raises(UsageError, match="none, or made of frozen, loss-free, quantile, lbl, z, or a recipe"):
        equipoise.parse_strategy("phi")
    with pytest.raises(
        UsageError, match="none, or made of .* z, shuffle, phi, shinka, lbl-unbiased, .*, or a recipe .* got 'magic'"
    ):
        parse_lab_strategy("magic")
    with pytest.raises(UsageError, match="memory must be below 1: got 1.0"):
        parse_lab_strategy("phi:memory=1")
    with pytest.raises(UsageError, match=r"An option of shuffle must be coefficient=\.\.\.: got 'scope=x'"):
        parse_lab_strategy("shuffle:scope=x")


def _windows(model, balance, seeds):
    for seed in seeds:
        (model(torch.randint(0, VOCAB, (2, 7), generator=_generator(seed))) + balance.loss()).backward()
        balance.step()
        model.zero_grad()


STATES = "loss-free:rule=momentum,rate=0.05+phi+phi:memory=0.9"


def test_states_of_several_balancers_are_saved_and_loaded_apart():
    model = tiny_lm()
    balance = attach_strategy(model, STATES)
    _windows(model, balance, range(3))
    saved = balance.state_dict()
    assert sorted(saved["state"]) == ["momentum", "phi.2.excess", "phi.excess"]
    for part in saved["state"].values():
        assert sorted(part) == ["blocks.0.gate", "blocks.1.gate"]
        assert all(value.any() for value in part.values())
    assert not saved["state"]["phi.excess"]["blocks.0.gate"].equal(saved["state"]["phi.2.excess"]["blocks.0.gate"])
    _windows(model, balance, range(3, 5))
    expected = balance.state_dict()
    other = tiny_lm()
    resumed = attach_strategy(other, STATES)
    resumed.load_state_dict(saved)
    _windows(other, resumed, range(3, 5))
    actual = resumed.state_dict()
    for name, part in expected["state"].items():
        assert all(value.equal(actual["state"][name][layer]) for layer, value in part.items()), name
    old_format = {**saved, "state": {"momentum": saved["state"]["momentum"]}}  # from when only biases had state
    resumed.load_state_dict(old_format)
    state = resumed.state_dict()["state"]
    assert not any(value.any() for name in ("phi.excess", "phi.2.excess") for value in state[name].values())
    broken = {**saved, "state": {**saved["state"], "phi.excess": {"blocks.0.gate": torch.zeros(EXPERTS)}}}
    with pytest.raises(EquipoiseError, match="its phi.excess have"):
        resumed.load_state_dict(broken)


def test_a_skipped_step_changes_no_state():
    excesses = []
    for skipped in (False, torch.tensor(False), None):
        model = tiny_lm()
        balance = attach_strategy(model, "phi")
        _windows(model, balance, range(1))
        if skipped is not None:
            (model(torch.randint(0, VOCAB, (2, 7), generator=_generator(9))) + balance.loss()).backward()
            balance.step(applied=skipped)
        excesses.append(balance.state_dict()["state"]["phi.excess"]["blocks.0.gate"])
    assert excesses[0].any() and excesses[0].equal(excesses[2]) and excesses[1].equal(excesses[2])


# ---- runs ----


@pytest.mark.parametrize("strategy", ["shuffle:coefficient=1", "phi:coefficient=0.1", "shinka:coefficient=1"])
def test_lab_balancers_train_and_resume_bit_for_bit(tiny, new_watcher, tmp_path, strategy):
    options = {"strategy": strategy, "steps": 8, "checkpoint_every": 3, "save_model": False}
    whole = train(tiny(out=tmp_path / "whole", **options), new_watcher())
    plain = train(tiny(out=tmp_path / "plain", **{**options, "strategy": "none"}), new_watcher())
    assert whole["val_nats"] != plain["val_nats"]
    for stop_after in (4, 7):
        cut = tmp_path / str(stop_after)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(out=cut, **options), new_watcher(stop_after))
        resumed = train(tiny(out=cut, **options, resume=True), new_watcher())
        assert _without_times(resumed) == _without_times(whole)
        for log in ("steps", "loads", "evaluations"):
            assert _rows(cut, log) == _rows(tmp_path / "whole", log)


def test_the_average_of_phi_continues_after_a_switch(tiny, new_watcher, tmp_path):
    """A switch that only adds a z-loss with coefficient 0 does not change phi."""
    options = {"steps": 7, "save_model": False}
    train(tiny(out=tmp_path / "one", strategy="phi:coefficient=0.1", **options), new_watcher())
    then = {"then": "phi:coefficient=0.1+z:coefficient=0", "switch_at": 3}
    train(tiny(out=tmp_path / "two", strategy="phi:coefficient=0.1", **then, **options), new_watcher())
    left_out = ("seconds", "strategy", "z_loss")
    assert _rows(tmp_path / "two", left_out=left_out) == _rows(tmp_path / "one", left_out=left_out)
    config = tiny(out=tmp_path / "three", strategy="loss-free:rate=0.01+phi", then="shinka", switch_at=3, **options)
    assert train(config, new_watcher())["strategy"].endswith("after step 3 shinka")


def test_lab_and_library_strategies_can_be_compared(tiny, new_watcher, tmp_path):
    options = {k: v for k, v in vars(tiny(steps=2, save_model=False)).items() if k not in ("strategy", "seed", "out")}
    strategies = ("none", "shuffle", "phi", "shinka", "deepseek-v3")
    results, failure = compare(Compare(out=tmp_path / "c", strategies=strategies, workers=1, **options), new_watcher())
    assert failure is None
    assert [row["strategy"] for row in results] == list(strategies)
    assert json.loads((Path(tmp_path) / "c" / "results.json").read_text()) == results


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "shuffle", "order": "interleaved"}, "before the backward: got --order interleaved"),
        ({"then": "shuffle", "switch_at": 3, "order": "interleaved"}, "shuffle must know every token of a step"),
        ({"strategy": "phi:eta=1"}, r"An option of phi must be coefficient=\.\.\. or memory=\.\.\."),
        ({"strategy": "phi", "selection": "sinkhorn"}, "needs the strategy none or z: got phi"),
    ],
)
def test_invalid_options_are_refused_before_anything_is_written(tiny, new_watcher, options, message):
    with pytest.raises(UsageError, match=message):
        train(tiny(**options), new_watcher())
    assert not tiny().out.exists()


def test_shuffle_control_is_refused_on_several_ranks(tiny):
    check_strategy(tiny(strategy="shuffle"), 1)
    check_strategy(tiny(strategy="phi+shinka"), 2)
    with pytest.raises(UsageError, match="shuffle must run in one process, .* got 2 ranks"):
        check_strategy(tiny(strategy="shuffle"), 2)

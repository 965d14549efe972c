"""Every mechanism through ``attach``, on one rank and on two: counts of a window, moves of the bias, saved state."""

import pytest
import reference
import torch
from dealt_ranks import deal, ids, mask
from models import DIM, EXPERTS, K, family, tiny_lm
from ranks import run_on_ranks
from torch.testing import assert_close

import equipoise
from equipoise import EquipoiseError

NAMES = ["blocks.0.gate", "blocks.1.gate"]
SCORE_FUNCTIONS = ["sigmoid", "softmax"]
MOVING = [
    "loss-free:rate=0.05,rule=sign",
    "loss-free:rate=0.05,rule=sign,scope=micro_batch",
    "loss-free:rate=0.05,rule=proportional",
    "loss-free:rate=0.05,rule=rms",
    "loss-free:rate=0.05,rule=momentum",
    "loss-free:rate=0.05,rule=multiplicative",
    "loss-free:rate=0.05,rule=sign,schedule=linear,zero_from=3",
    "quantile",
    "quantile:bins=0",
    "quantile:bins=256,ema=0.5,fraction=0.5",
]
moving = pytest.mark.parametrize("strategy", MOVING)


def _recorded(model):
    """Logits and choices of every router call, by layer, from the test's own hooks."""
    seen = [[], []]
    for layer, block in enumerate(model.blocks):
        block.gate.register_forward_hook(
            lambda m, a, output, calls=seen[layer]: calls.append((output[0].detach(), output[2]))
        )
    return seen


def _window(model, balance, seeds):
    for seed in seeds:
        loss = model(ids(seed), mask(seed)) + balance.loss()
        (loss / len(seeds)).backward()
    balance.step()
    model.zero_grad()


def _expected(strategy, bias, momentum, calls, masks, score_function, window):
    """One window of a layer in the float64 loops of the reference: the new bias and momentum."""
    options = dict(o.split("=") for o in strategy.partition(":")[2].split(",") if o)
    flags = [m.flatten().tolist() for m in masks]
    logits = [call[0].double().tolist() for call in calls]
    if strategy.startswith("quantile"):
        rows, mask = sum(logits, []), sum(flags, [])
        scores = reference.scores(rows, score_function)
        if options.get("bins") == "0":
            return reference.quantile_rule(scores, K, bias, mask), momentum
        counts = reference.quantile_histogram(scores, K, bias, mask, 128)
        return reference.quantile_from_histogram(counts, K, sum(mask), bias), momentum
    counts = [reference.load(ids.tolist(), EXPERTS, flag) for (_, ids), flag in zip(calls, flags, strict=True)]
    pooled = [sum(column) for column in zip(*counts, strict=True)]
    rate = float(options["rate"])
    if "zero_from" in options:
        rate = reference.rate_at(rate, window, options["schedule"], int(options["zero_from"]))
    if options.get("scope") == "micro_batch":
        return reference.micro_batch_sign_rule(bias, counts, rate, True), momentum
    if options["rule"] == "momentum":
        return reference.momentum_rule(bias, momentum, pooled, rate, 0.5, 2.0, True)
    return getattr(reference, f"{options['rule']}_rule")(bias, pooled, rate, True), momentum


@pytest.mark.parametrize("strategy", MOVING[:-1])
def test_three_windows_move_the_biases_as_in_the_reference(strategy):
    model = tiny_lm()
    balance = equipoise.attach(model, strategy, "lbl:coefficient=0.1", "z")
    seen = _recorded(model)
    biases, momenta = [[0.0] * EXPERTS] * 2, [[0.0] * EXPERTS] * 2
    for window in range(3):
        for calls in seen:
            calls.clear()
        seeds = range(3 * window, 3 * window + 3)
        _window(model, balance, seeds)
        for layer, score_function in enumerate(SCORE_FUNCTIONS):
            bias = balance.biases[NAMES[layer]].double()
            biases[layer], momenta[layer] = _expected(
                strategy, biases[layer], momenta[layer], seen[layer], [mask(s) for s in seeds], score_function, window
            )
            # the histogram's reference bins float32 scores in float64: a margin at an edge may change its bin
            tolerance = 2e-4 if strategy == "quantile" else 1e-6
            assert_close(bias, torch.tensor(biases[layer], dtype=torch.float64), rtol=0, atol=tolerance)
            biases[layer] = bias.tolist()
    # the second router is so even that quantile takes its counts for chance
    assert biases[0] != [0.0] * EXPERTS and (biases[1] != [0.0] * EXPERTS or strategy.startswith("quantile"))


@moving
@pytest.mark.parametrize("checkpointing", ["non_reentrant", "reentrant"])
def test_recomputation_evaluation_and_pauses_are_not_counted(strategy, checkpointing):
    biases = []
    for kind in (None, checkpointing):
        model = tiny_lm(kind)
        balance = equipoise.attach(model, strategy, "lbl:coefficient=0.1")
        for window in range(2):
            if kind is not None:
                with balance.paused():
                    model(ids(99))
                with balance.measuring():
                    model(ids(98))
            _window(model, balance, (2 * window, 2 * window + 1))
        biases.append(balance.biases)
    for name in NAMES:
        assert torch.equal(biases[0][name], biases[1][name])


@moving
def test_a_skipped_step_moves_nothing_whatever_says_so(strategy):
    states = []
    for skipped in (False, torch.tensor(False), None):
        model = tiny_lm()
        balance = equipoise.attach(model, strategy)
        for window, applied in enumerate((True, skipped, True)):
            if applied is None:
                continue
            model(ids(window), mask(window))
            balance.step(applied)
        states.append(balance.state_dict())
    for state in states[1:]:
        for part in ("biases", "state"):
            if part == "biases" and state is states[2] and "schedule" in strategy:
                continue  # a skipped window still counts for the schedule
            values = state[part] if part == "biases" else state[part].get("momentum", {})
            ours = states[0][part] if part == "biases" else states[0][part].get("momentum", {})
            for name, value in values.items():
                assert torch.equal(value, ours[name])


@moving
def test_state_resumes_as_if_never_stopped(strategy, tmp_path):
    model = tiny_lm()
    balance = equipoise.attach(model, strategy)
    _window(model, balance, (0, 1))
    _window(model, balance, (2, 3))
    torch.save(balance.state_dict(), tmp_path / "state.pt")
    again = tiny_lm()
    resumed = equipoise.attach(again, strategy)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for m, b in ((model, balance), (again, resumed)):
        _window(m, b, (4, 5))
    first, second = balance.state_dict(), resumed.state_dict()
    assert first["state"].keys() == second["state"].keys() == ({"momentum"} if "rule=momentum" in strategy else set())
    for name in NAMES:
        assert torch.equal(first["biases"][name], second["biases"][name])
        assert torch.equal(first["load"][name], second["load"][name])
        for values in first["state"]:
            assert torch.equal(first["state"][values][name], second["state"][values][name])


def test_the_momentum_of_another_strategy_is_left_out_or_begins_at_zero():
    models = tiny_lm(), tiny_lm()
    with_momentum, without = (
        equipoise.attach(model, f"loss-free:rate=0.1,rule={rule}")
        for model, rule in zip(models, ("momentum", "sign"), strict=True)
    )
    for seed, (model, balance) in enumerate(zip(models, (with_momentum, without), strict=True)):
        model(ids(seed))
        balance.step()
    state = without.state_dict()
    assert any(value.any() for value in with_momentum.state_dict()["state"]["momentum"].values())
    with_momentum.load_state_dict(state)
    assert not any(value.any() for value in with_momentum.state_dict()["state"]["momentum"].values())
    without.load_state_dict(with_momentum.state_dict())
    torch.testing.assert_close(without.biases, state["biases"])


def test_a_state_of_factors_is_not_taken_for_one_of_sums():
    multiplied, added = (
        equipoise.attach(tiny_lm(), f"loss-free:rate=0.1,rule={rule}") for rule in ("multiplicative", "sign")
    )
    for one, other in ((multiplied, added), (added, multiplied)):
        with pytest.raises(EquipoiseError, match="biases that are added and biases that multiply"):
            one.load_state_dict(other.state_dict())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_is_refused(value):
    balance = equipoise.attach(tiny_lm(), "loss-free:rate=0.1,rule=momentum")
    for part in ("biases", "momentum"):
        state = balance.state_dict()
        values = state["biases"] if part == "biases" else state["state"]["momentum"]
        values[NAMES[1]][2] = value
        with pytest.raises(EquipoiseError, match=f"finite numbers: its {part} of blocks.1.gate"):
            balance.load_state_dict(state)
    state = balance.state_dict() | {"load": {name: torch.zeros(EXPERTS) for name in NAMES}}
    with pytest.raises(EquipoiseError, match="int64 counts"):
        balance.load_state_dict(state)


# ---- factors ----


@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3", "qwen3_moe", "olmoe", "mixtral"])
def test_factors_choose_by_the_product_and_leave_the_weights(name):
    model = family(name)
    tokens = torch.randint(0, 64, (2, 9))
    plain = model(tokens, use_cache=False).logits
    balance = equipoise.attach(model, "loss-free:rate=0.3,rule=multiplicative")
    assert torch.equal(model(tokens, use_cache=False).logits, plain), "factors of 1 change nothing"
    balance.step()
    names = list(balance.biases)
    assert all(bias.any() for bias in balance.biases.values())
    routers = dict(model.named_modules())
    for layer in names:
        router = routers[layer]
        slot = router._buffers.get("e_score_correction_bias")
        assert slot is None or not slot.any(), "the family's own slot is a sum: it stays as it was"
        hidden = torch.randn(20, 32)
        logits, weights, expert_ids = router(hidden)
        score_function = "sigmoid" if slot is not None else "softmax"
        chosen, plain_weights = reference.route_multiplied(
            logits.double().tolist(), 2, score_function, balance.biases[layer].tolist()
        )
        assert [sorted(row) for row in expert_ids.tolist()] == [sorted(row) for row in chosen]
        share = weights / weights.sum(-1, keepdim=True)
        expected = torch.tensor(plain_weights)
        expected = expected / expected.sum(-1, keepdim=True)
        assert_close(share.sort().values.float(), expected.sort().values, rtol=1e-4, atol=1e-5)
    before = balance.biases
    detached = balance.detach()
    for layer in names:
        assert torch.equal(before[layer], detached[layer])
        assert "_equipoise_bias" not in routers[layer]._buffers


def test_factors_are_refused_where_there_are_groups():
    model = family("deepseek_v3", n_group=4, topk_group=2)
    with pytest.raises(EquipoiseError, match="there are groups"):
        equipoise.attach(model, "loss-free:rule=multiplicative")


def test_factors_begin_at_one_on_a_copy_that_was_steered_by_sums():
    import copy

    model = tiny_lm()
    balance = equipoise.attach(model, "loss-free:rate=0.1,rule=sign")
    model(ids(0))
    balance.step()
    other = copy.deepcopy(model)
    other.blocks[0].gate.e_score_correction_bias.zero_()
    copied = equipoise.attach(other, "loss-free:rule=multiplicative")
    assert not any(bias.any() for bias in copied.biases.values())
    again = equipoise.attach(copy.deepcopy(model), "loss-free")
    torch.testing.assert_close(again.biases, balance.biases)


def test_factors_follow_a_cast():
    model = tiny_lm()
    balance = equipoise.attach(model, "loss-free:rate=0.1,rule=multiplicative")
    model(ids(0))
    balance.step()
    before = balance.biases
    model.to(torch.bfloat16)
    for block, name in zip(model.blocks, NAMES, strict=True):
        assert block.gate._equipoise_bias.dtype == torch.float32
        assert torch.equal(block.gate._equipoise_bias, before[name])


# ---- composition ----


def test_losses_are_logged_by_name_and_each_has_its_own_coefficient():
    strategy = "loss-free:rate=1e-3+lbl:coefficient=0.5+lbl:scope=sequence,coefficient=0.25+z:coefficient=0.125"
    model = tiny_lm()
    balance = equipoise.attach(model, strategy)
    model(ids(0))
    value = balance.loss().detach()
    balance.step()
    metrics = balance.metrics()
    parts = [metrics[name] for name in ("load_balancing_loss", "load_balancing_loss_sequence", "z_loss")]
    assert_close(float(value), 2 * (0.5 * parts[0] + 0.25 * parts[1] + 0.125 * parts[2]), rtol=1e-6, atol=0)
    assert len(set(parts)) == 3


@pytest.mark.parametrize("strategy", ["z:coefficient=0.5", "z:coefficient=0.5+quantile"])
def test_the_gradient_of_the_z_loss_is_that_of_the_reference(strategy):
    from torch import nn

    model = tiny_lm()
    balance = equipoise.attach(model, strategy)
    seen = _recorded(model)
    loss = model(ids(0), mask(3)) * 0 + 8 * balance.loss()
    hidden = []
    model.blocks[1].gate.register_forward_pre_hook(lambda m, args: hidden.append(args[0].detach()))
    with balance.paused():
        model(ids(0), mask(3))
    loss.backward()
    flags = mask(3).flatten().tolist()
    gradient = reference.z_loss_gradient(seen[1][0][0].double().tolist(), flags)
    expected = 8 * 0.5 * torch.tensor(gradient, dtype=torch.float64).T @ hidden[0].double()
    assert isinstance(model.blocks[1].gate.weight, nn.Parameter) and hidden[0].shape[-1] == DIM
    assert_close(model.blocks[1].gate.weight.grad.double(), expected, rtol=1e-5, atol=1e-7)


# ---- two ranks ----

DEALT = ["loss-free:rate=0.05,rule=sign,scope=micro_batch", "loss-free:rate=0.05,rule=momentum"]
DEALT += ["quantile:fraction=0.7", "quantile:bins=0"]


@pytest.mark.xdist_group("two ranks of mechanisms")
def test_two_ranks_move_the_biases_as_one():
    torch.manual_seed(0)
    alone = deal(0, DEALT, 1)
    for results in run_on_ranks(2, deal, DEALT, 2):
        assert not isinstance(results, str), results
        for ours, theirs in zip(results, alone, strict=True):
            for name in NAMES:
                assert torch.equal(ours[name], theirs[name])
                assert theirs[name].any()


@moving
def test_a_training_forward_under_inference_mode_is_counted_with_the_others(strategy):
    biases = []
    for inference in (False, True):
        model = tiny_lm()
        balance = equipoise.attach(model, strategy)
        for seed in range(2):
            with torch.inference_mode(inference), balance.counting():
                model(ids(seed))
                balance.loss()
            model(ids(seed + 2)).backward()
            balance.loss()
            balance.step()
        biases.append(balance.biases)
    for name in NAMES:
        assert torch.equal(biases[0][name], biases[1][name])


def test_a_factor_on_a_slot_that_is_not_zero_is_refused():
    """Top-k does not see a bias that all experts share, but a factor on the sum would make the busiest busier."""
    model = family("glm4_moe")
    for name, slot in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            slot.fill_(-1.0)
    with pytest.raises(EquipoiseError, match="the slot of model.layers.0.mlp.gate must be zero for a multiplicative"):
        equipoise.attach(model, "loss-free:rule=multiplicative")
    equipoise.attach(model, "loss-free:rule=sign")


class _Counts(equipoise.Balancer):
    """Counts calls, and records the pooled statistics. Returns what ``form`` makes of its tensor."""

    name = "counts"

    def __init__(self, amount=1, form=torch.clone, **others):
        self.value, self.form = amount, form

    def prepare(self, layers):
        self.one, self.seen = torch.ones(1, dtype=torch.int64), []

    def statistic(self, routing, row):
        return self.form(self.one)

    def update(self, load, statistic=None, window=0):
        self.seen.append(torch.stack(list(statistic)).tolist())


@pytest.mark.parametrize("form", [torch.clone, lambda one: one.expand(2)])  # an expanded tensor cannot be added to
def test_statistics_are_summed_and_the_balancers_tensor_stays(form):
    model = tiny_lm()
    balance = equipoise.attach(model, _Counts(form=form))
    for window in range(3):
        for seed in range(2):
            model(ids(2 * window + seed))
        balance.step()
    for group in balance._biases.groups:
        assert group.balancers[0].seen == [[[2] * len(form(torch.ones(1)))]] * 3
        assert group.balancers[0].one.tolist() == [1]


class _Empties(equipoise.Balancer):
    """Writes into the load that it is given."""

    def update(self, load, statistic=None, window=0):
        load.zero_()


def test_a_balancer_that_writes_into_its_load_changes_no_count():
    model = tiny_lm()
    balance = equipoise.attach(model, _Empties())
    model(ids(0))
    balance.step()
    assert all(int(load.sum()) == K * ids(0).numel() for load in balance.load.values())


@pytest.mark.parametrize("form", [lambda one: one, lambda one: one.view(1, 1)])
@pytest.mark.parametrize("closes", [False, True])
def test_a_statistic_that_was_returned_before_is_refused(form, closes):
    """It would be added to itself: also in the next micro-batch of a window."""
    model = tiny_lm()
    balance = equipoise.attach(model, _Counts(form=form), "lbl")
    model(ids(0))
    if closes:
        balance.loss()
    with pytest.raises(equipoise.EquipoiseError, match=r"statistic\(\) must return a new tensor each time"):
        model(ids(1))
        balance.loss()


def test_a_balancer_with_arguments_under_other_names_still_has_a_strategy_string():
    assert str(_Counts(amount=3)) == "counts"


def test_adopting_a_bias_resets_its_momentum():
    model = tiny_lm()
    balance = equipoise.attach(model, "loss-free:rate=0.1,rule=momentum")
    model(ids(0))
    balance.step()
    state = model.state_dict()
    state["blocks.0.gate.e_score_correction_bias"] = torch.linspace(-0.5, 0.5, EXPERTS)
    model.load_state_dict(state)
    momentum = balance.state_dict()["state"]["momentum"]
    assert not momentum[NAMES[0]].any() and momentum[NAMES[1]].any()
    state["blocks.0.gate.e_score_correction_bias"] = torch.full((EXPERTS,), float("nan"))
    with pytest.raises(EquipoiseError, match="must hold finite numbers"):
        model.load_state_dict(state)
    assert torch.equal(model.blocks[0].gate.e_score_correction_bias, balance.biases[NAMES[0]])


def test_a_whole_state_may_be_given_as_biases(caplog):
    model = tiny_lm()
    balance = equipoise.attach(model, "loss-free:rate=0.1")
    model(ids(0))
    balance.step()
    again = equipoise.attach(tiny_lm(), "frozen", biases=balance.state_dict())
    torch.testing.assert_close(again.biases, balance.biases)
    with pytest.raises(EquipoiseError, match="biases must be tensors by layer name"):
        equipoise.attach(tiny_lm(), "frozen", biases={NAMES[0]: 1})
    with pytest.raises(TypeError, match="or the path of saved ones: got list"):
        equipoise.attach(tiny_lm(), "frozen", biases=[1])
    for wrong in (None, {"biases": 1}):
        with pytest.raises(EquipoiseError, match="the state must be what state_dict"):
            balance.load_state_dict(wrong)
    assert not caplog.records
    equipoise.attach(tiny_lm(), "kimi-k3")
    assert "kimi-k3 was published with sigmoid scores, this model has sigmoid and softmax" in caplog.text


def test_a_mask_that_is_no_mask_is_refused():
    balance = equipoise.attach(tiny_lm(), "lbl")
    for wrong in (torch.full((2, 16), -1e9), torch.full((2, 16), 0.5), torch.full((2, 16), -100)):
        with pytest.raises(ValueError, match="mask must hold 1 for a token that counts and 0 for padding"):
            balance.token_mask(wrong)


def test_factors_reach_a_peaked_softmax():
    model = family("mixtral")
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            parameter.data.mul_(8)
    equipoise.attach(model, "loss-free:rule=multiplicative")


def test_losses_that_have_a_gradient_in_closed_form_and_those_that_have_none_add_up():
    def gradient(strategy):
        torch.manual_seed(0)
        routers = torch.nn.ModuleList([equipoise.nn.Router(8, 6, 2)]).train()
        balance = equipoise.attach(routers, strategy)
        loss = routers[0](torch.randn(20, 8))[1].sum() * 0
        (loss + balance.loss()).backward()
        return routers[0].weight.grad

    first, second = gradient("lbl:coefficient=0.3"), gradient("z:coefficient=0.2")
    assert min(first.abs().max(), second.abs().max()) > 1e-4
    assert_close(gradient("lbl:coefficient=0.3+z:coefficient=0.2"), first + second, rtol=1e-5, atol=1e-8)

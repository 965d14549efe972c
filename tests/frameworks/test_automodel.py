"""NeMo Automodel 0.7.0: its ``Gate``, and its DeepSeek-V3 in the order of its recipe's step."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from frameworks.automodel_models import (
    EXPERTS,
    LENGTH,
    VOCABULARY,
    K,
    expected,
    gates_of,
    make_gate,
    make_model,
    make_steps,
    moe_config,
    train,
)
from frameworks.automodel_ranks import train_rank
from frameworks.float64 import MicroBatch, errors
from nemo_automodel.components.checkpoint.stateful_wrappers import ModelState
from nemo_automodel.components.moe.layers import FakeBalancedGate
from nemo_automodel.components.moe.parallelizer import apply_ac
from pages import ROOT
from ranks import run_on_ranks
from torch import nn

import equipoise
from equipoise import EquipoiseError

RATE = 0.02  # moves choices of these small models
BIAS = f"loss-free:rate={RATE},rule=sign,center=false"
UNEVEN = [[[12, 5], [9, 2]], [[3, 12], [12, 7]], [[1, 1], [12, 12]]]  # tokens of each row, by micro-batch and step


def with_loss(scope):
    return f"{BIAS}+lbl:scope={scope},coefficient=10"


def is_router(name):
    return name.endswith("gate.weight")


def assert_counts_and_biases(result, windows):
    assert len(result["loads"]) == len(windows)
    for load, biases, window in zip(result["loads"], result["biases"], windows, strict=True):
        for name, counts in window.loads.items():
            assert torch.equal(load[name], counts)
            torch.testing.assert_close(biases[name].double(), window.biases[name], rtol=0, atol=1e-7)


# ---- a gate by itself ----


def chosen(ranked, k=K):
    return [set(sorted(range(EXPERTS), key=lambda e, row=row: -row[e])[:k]) for row in ranked.tolist()]


def scores_of(gate, logits):
    function = gate.score_func
    if function == "sqrtsoftplus":
        return (1 + logits.exp()).log().sqrt()
    return logits.softmax(-1) if function.startswith("softmax") else 1 / (1 + (-logits).exp())


@pytest.mark.parametrize("factor", [0.0, 1e-3])
@pytest.mark.parametrize(
    "option",
    [
        {},
        {"score_func": "sigmoid_with_bias"},
        {"score_func": "softmax_with_bias"},
        {"score_func": "sqrtsoftplus"},
        {"score_func": "softmax"},  # after the top-k
        {"score_func": "softmax", "softmax_before_topk": True},
        {"norm_topk_prob": False, "route_scale": 2.5},
        {"router_bias": True},
    ],
    ids=str,
)
def test_a_gate_is_counted_and_steered(factor, option):
    gate = make_gate(gate_bias_update_factor=factor, **option)
    balance = equipoise.attach(nn.Sequential(gate), f"{BIAS}+lbl:scope=micro_batch,coefficient=1")
    generator = torch.Generator().manual_seed(1)
    bias = torch.zeros(EXPERTS, dtype=torch.float64)
    ranks_logits = gate.score_func == "softmax" and not gate.softmax_before_topk
    for _ in range(3):
        hidden, mask = torch.randn(30, 16, generator=generator), torch.rand(30, generator=generator) > 0.4
        weights, ids, _ = gate(hidden, mask, None)
        gate.zero_grad()
        (0 * weights.sum() + balance.loss()).backward()
        balance.step()
        counts = [0] * EXPERTS
        for is_token, experts in zip(mask.tolist(), ids.tolist(), strict=True):
            for expert in experts:
                counts[expert] += is_token
        (load,) = balance.load.values()
        assert load.tolist() == counts and sum(counts) == K * int(mask.sum())
        weight = gate.weight.detach().double().requires_grad_()
        logits = hidden.double() @ weight.T + (0 if gate.bias is None else gate.bias.detach().double())
        scores = scores_of(gate, logits)
        assert [set(row) for row in ids.tolist()] == chosen((logits if ranks_logits else scores).detach() + bias)
        share = torch.tensor(counts, dtype=torch.float64) / sum(counts)
        loss = EXPERTS * (share * (scores / scores.sum(-1, keepdim=True))[mask].mean(0)).sum()
        (gradient,) = torch.autograd.grad(loss, weight)
        assert (gate.weight.grad - gradient).norm() < 1e-6 * gradient.norm()
        mean = sum(counts) / EXPERTS
        bias += torch.tensor([RATE * ((mean > count) - (mean < count)) for count in counts], dtype=torch.float64)
        torch.testing.assert_close(next(iter(balance.biases.values())).double(), bias, rtol=0, atol=1e-7)
        if factor:
            gate.update_bias()
            torch.testing.assert_close(next(iter(balance.biases.values())).double(), bias, rtol=0, atol=1e-7)


@pytest.mark.parametrize("function", ["sigmoid", "softmax_with_bias"])
def test_groups_that_a_negative_bias_leaves_are_not_steered_by_a_bias(function):
    """In these two, experts outside the chosen groups have the score 0, and win against negative ones."""
    options = {"score_func": function, "n_expert_groups": 4, "n_limited_groups": 2}
    gate = make_gate(**options)
    gate.e_score_correction_bias -= 2
    hidden, mask = torch.randn(40, 16, generator=torch.Generator().manual_seed(1)), torch.ones(40, dtype=torch.bool)
    shifted = gate(hidden, mask, None)[1]
    gate.e_score_correction_bias += 2
    assert not torch.equal(shifted.sort().values, gate(hidden, mask, None)[1].sort().values)  # their defect
    with pytest.raises(EquipoiseError, match=r"cannot be steered: an expert outside the chosen expert groups .* lbl"):
        equipoise.attach(nn.Sequential(gate), "loss-free")
    balance = equipoise.attach(nn.Sequential(gate), "lbl:scope=micro_batch")
    ids = gate(hidden, mask, None)[1]
    balance.step()
    assert next(iter(balance.load.values())).tolist() == torch.bincount(ids.flatten(), minlength=EXPERTS).tolist()


def test_groups_at_minus_infinity_are_steered():
    gate = make_gate(score_func="sigmoid_with_bias", n_expert_groups=4, n_limited_groups=2)
    bias = torch.linspace(-3, -2, EXPERTS)
    balance = equipoise.attach(nn.Sequential(gate), "loss-free", biases={"0": bias})
    hidden, mask = torch.randn(40, 16, generator=torch.Generator().manual_seed(1)), torch.ones(40, dtype=torch.bool)
    ids = gate(hidden, mask, None)[1]
    balance.step()
    assert next(iter(balance.load.values())).tolist() == torch.bincount(ids.flatten(), minlength=EXPERTS).tolist()
    ranked = scores_of(gate, hidden.double() @ gate.weight.double().T) + bias.double()
    for row, experts in zip(ranked.tolist(), ids.tolist(), strict=True):
        pairs = [row[first : first + 2] for first in range(0, EXPERTS, 2)]  # of an expert group; its score is the sum
        groups = sorted(range(4), key=lambda group, pairs=pairs: -sum(pairs[group]))[:2]
        inside = [expert for expert in range(EXPERTS) if expert // 2 in groups]
        assert set(experts) == set(sorted(inside, key=lambda e, row=row: -row[e])[:K])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: make_gate(enable_routing_replay=True), "enable_routing_replay is on"),
        (lambda: make_gate(router_weight_uses_score_correction_bias=True), "its weights contain the bias"),
        (lambda: FakeBalancedGate(moe_config()), "it ignores its scores: fake_balanced_gate is on"),
    ],
)
def test_gates_that_are_refused(make, reason):
    with pytest.raises(EquipoiseError, match=reason):
        equipoise.attach(nn.Sequential(make()), "loss-free")


def test_a_gate_in_a_cuda_graph_is_refused():
    gate = make_gate()
    gate.use_routing_core = True
    with pytest.raises(EquipoiseError, match="moe_router is in backend.cuda_graph"):
        equipoise.attach(nn.Sequential(gate), "loss-free")


def test_its_own_loss_is_refused_beside_ours():
    with pytest.raises(EquipoiseError, match=r"nemo-automodel 0.7.0 adds its own .* \(aux_loss_coeff=0.01\)"):
        equipoise.attach(make_model(aux_loss_coeff=0.01), "lbl")


# ---- its own update ----


def test_its_own_update_moves_nothing_until_detach_and_then_starts_from_our_bias():
    model = make_model()
    steps = make_steps(UNEVEN)
    model(steps[0][0].ids)
    model.update_moe_gate_bias()  # before attach: it makes its own copy of the bias, in float32
    balance = equipoise.attach(model, BIAS)
    for gate in gates_of(model).values():
        gate.update_bias()  # as models that do not look at the factor
    model(steps[1][0].ids)
    balance.step()
    before = {name: bias.clone() for name, bias in balance.biases.items()}
    model.update_moe_gate_bias()
    assert all(torch.equal(before[name], gate.e_score_correction_bias) for name, gate in gates_of(model).items())
    balance.detach()
    for name, gate in gates_of(model).items():
        assert gate.bias_update_factor == 1e-3 and "update_bias" not in vars(gate)
        gate._cumulative_expert_load = torch.arange(EXPERTS)
        gate.update_bias()
        step = 1e-3 * torch.tensor([1.0, 1, 1, 1, -1, -1, -1, -1])
        torch.testing.assert_close(gate.e_score_correction_bias, before[name] + step)


def test_an_attached_model_can_be_pickled_and_copied():
    model = make_model()
    equipoise.attach(model, BIAS)
    for other in (pickle.loads(pickle.dumps(gates_of(model))), gates_of(copy.deepcopy(model))):
        for gate in other.values():
            gate.update_bias()


def test_the_bias_stays_float32_in_a_model_in_bfloat16():
    model = make_model()
    balance = equipoise.attach(model, BIAS)
    model.bfloat16()
    part = make_steps(UNEVEN)[0][0]
    for count in range(1, 4):
        model(part.ids, padding_mask=~part.mask)
        balance.step()
        for name, bias in balance.biases.items():
            assert bias.dtype == torch.float32
            multiples = bias / RATE
            torch.testing.assert_close(multiples, multiples.round(), rtol=0, atol=1e-5)
            assert multiples.abs().max() <= count + 1e-5
            assert torch.equal(gates_of(model)[name].e_score_correction_bias, bias)
    assert balance.metrics()["tokens"] == int(part.mask.sum())


# ---- the whole model ----


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
@pytest.mark.parametrize("option", [{}, {"gate_bias_update_factor": 0.0}, {"score_func": "softmax_with_bias"}], ids=str)
def test_accumulation_with_uneven_padding(option, scope):
    steps = make_steps(UNEVEN)
    result, _ = train(make_model(**option), steps, with_loss(scope))
    plain, _ = train(make_model(**option), steps, BIAS)
    function = "softmax" if "score_func" in option else "sigmoid"
    windows = expected(make_model(**option), [steps], RATE, scope=scope, function=function)
    assert_counts_and_biases(result, windows)
    assert result["tokens"] == [28, 34, 26]
    for distances in errors(result["gradients"], plain["gradients"], windows, is_router):
        assert max(distances) < 1e-6


@pytest.mark.parametrize("mode", [{}, {"ignore_router": False}, {"selective": True}], ids=str)
def test_activation_checkpointing_counts_once(mode):
    results = []
    for strategy in (with_loss("global_batch"), BIAS):
        model = make_model()
        apply_ac(model, **mode)
        results.append(train(model, make_steps(UNEVEN), strategy)[0])
    windows = expected(make_model(), [make_steps(UNEVEN)], RATE, scope="global_batch", function="sigmoid")
    assert_counts_and_biases(results[0], windows)
    gradients = (result["gradients"] for result in results)
    assert max(errors(*gradients, windows, is_router)[0]) < 1e-6


def test_two_ranks_with_unequal_tokens():
    lengths = [[[[12, 5], [9, 2]], [[3, 12], [12, 7]]], [[[1, 2], [3, 1]], [[12, 12], [12, 12]]]]
    strategies = [with_loss("global_batch"), BIAS]
    ranks = run_on_ranks(2, train_rank, strategies, lengths, (1e-3, 0.0))
    steps = [make_steps(lengths[rank], rank) for rank in (0, 1)]
    windows = expected(make_model(), steps, RATE, scope="global_batch", function="sigmoid")
    for rank in ranks:
        assert not isinstance(rank, str), rank
        results, kinds = rank
        assert kinds == {1e-3: {"DTensor"}, 0.0: {"NoneType"}}
        for factor in kinds:
            result, plain = (results[factor, strategy] for strategy in strategies)
            assert_counts_and_biases(result, windows)
            assert result["tokens"] == [28 + 7, 34 + 48]
            assert max(errors(result["gradients"], plain["gradients"], windows, is_router)[0]) < 1e-6


@pytest.mark.parametrize("factor", [1e-3, 0.0])
def test_resume_goes_on_as_if_nothing_had_happened(factor, tmp_path):
    strategy = "loss-free:rate=0.02,rule=momentum+lbl:scope=global_batch,pooling=previous"
    steps = make_steps([*UNEVEN, UNEVEN[0]])
    whole_run, _ = train(make_model(gate_bias_update_factor=factor), steps, strategy)
    model = make_model(gate_bias_update_factor=factor)
    _, balance = train(model, steps[:2], strategy)
    dcp.save({"model": ModelState(model).state_dict(), "balance": balance.state_dict()}, checkpoint_id=tmp_path)

    model = make_model(gate_bias_update_factor=factor)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()

    def load(balance):
        state = {"model": ModelState(model).state_dict(), "balance": balance.state_dict()}
        dcp.load(state, checkpoint_id=tmp_path)
        ModelState(model).load_state_dict(state["model"])
        balance.load_state_dict(state["balance"])

    rest, _ = train(model, steps[2:], strategy, after_attach=load)
    for number, biases in enumerate(rest["biases"], start=2):
        for name, bias in biases.items():
            assert torch.equal(bias, whole_run["biases"][number][name])
        for name, gradient in rest["gradients"][number - 2].items():
            assert torch.equal(gradient, whole_run["gradients"][number][name])


def test_balancing_lowers_the_violation_in_50_steps():
    generator = torch.Generator().manual_seed(5)
    shares = (1 / torch.arange(1, VOCABULARY + 1)).expand(16, -1)  # some tokens are frequent, others rare
    ids = [torch.multinomial(shares, LENGTH, True, generator=generator) for _ in range(50)]
    rows = torch.arange(16)[:, None].expand(-1, LENGTH)
    steps = [[MicroBatch(step_ids, torch.ones(16, LENGTH, dtype=torch.bool), rows)] for step_ids in ids]
    violation = {}
    for strategy in ("none", "loss-free:rate=0.02", "lbl:scope=global_batch,coefficient=0.1"):
        result, _ = train(make_model(spread=5, gate_bias_update_factor=0.0), steps, strategy, lr=3e-3)
        violation[strategy] = sum(result["maxvio"][-10:]) / 10
        assert result["loss"][-1] < 0.8 * result["loss"][0]
    print(violation)
    unbalanced, *balanced = violation.values()
    assert max(balanced) < 0.6 * unbalanced


def test_the_example_runs():
    command = [sys.executable, ROOT / "examples/automodel_loop.py", "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    table = [line.split() for line in done.stdout.split("\nstrategy ")[1].splitlines()]
    assert [row[0] for row in table[1:]][:1] == ["none"] and [len(row) for row in table[1:]] == [4, 4]

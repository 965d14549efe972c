"""DeepSpeed's own MoE layers, in one process and in an engine on two ranks, give what float64 gives."""

import tempfile
from functools import cache

import pytest
import torch
from frameworks import deepspeed_moe_ranks
from frameworks.deepspeed_moe_models import GATES, Kind, MoENet, Reference, assert_gradient, batches
from frameworks.deepspeed_moe_ranks import CASES, EVENED, data_of
from frameworks.deepspeed_ranks import LR
from plain_model import BOTH, EXPERTS, WIDTH, assert_biases, assert_counts
from ranks import distance, run_on_ranks

import equipoise


@cache
def results():
    with tempfile.TemporaryDirectory() as folder:
        by_rank = run_on_ranks(2, deepspeed_moe_ranks.everything, folder)
    for result in by_rank:
        assert not isinstance(result, str), result
    return by_rank


def label(kind):
    return f"k={kind.k}{', drops' * kind.drops}"


# ---- one process ----

KINDS = [Kind(1, False), Kind(2, True), Kind(2, False), Kind(3, True), Kind(4, True)]


@pytest.mark.parametrize("mode", [None, "reentrant", "not reentrant", "compiled"])
@pytest.mark.parametrize("kind", KINDS, ids=label)
def test_one_process_gives_what_float64_gives(kind, mode):
    """Two micro-batches a step, uneven padding; what is dropped counts too."""
    net = MoENet(kind, recomputes=None if mode == "compiled" else mode).train()
    reference, balance = Reference(net, LR), equipoise.attach(net, BOTH)
    run = torch.compile(net, backend="eager") if mode == "compiled" else net
    optimizer = torch.optim.SGD(net.parameters(), LR)
    for window in zip(batches(6)[::2], batches(6)[1::2], strict=True):
        for batch in window:
            ((run(**batch) + balance.loss()) / 2).backward()
        named = net.named_parameters()
        gradient = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}
        assert_gradient(gradient, reference.step([[batch] for batch in window], 1 / 2))
        optimizer.step()
        optimizer.zero_grad()
        balance.step()
        assert_counts(balance.load, reference.counts)
        assert_biases(balance.biases, reference.biases)


def test_a_choice_counts_before_random_token_selection_drops_it():
    """With k = 1 and a capacity DeepSpeed drops by chance; the loss of the first layer does not depend on it."""
    net = MoENet(Kind(1, True, use_rts=True)).train()
    strategy = "loss-free:rate=0.05,rule=sign,center=false+lbl:coefficient=0.5"
    balance = equipoise.attach(net, strategy, where=lambda name, router: name == GATES[0])
    gate, bias = net.get_submodule(GATES[0]), [0.0] * EXPERTS
    for number, batch in enumerate(batches(3)):
        net.zero_grad()
        torch.manual_seed(number)
        with balance.paused():
            net(**batch).backward()
        plain = gate.wg.weight.grad.clone().double()
        net.zero_grad()
        torch.manual_seed(number)
        (net(**batch) + balance.loss()).backward()
        balance.step()
        weight = gate.wg.weight.detach().double().requires_grad_()
        mask = batch["attention_mask"].flatten().bool()
        scores = (net.embed.weight.detach().double()[batch["input_ids"].flatten()] @ weight.T).softmax(-1)
        chosen = (scores + torch.tensor(bias, dtype=torch.float64)).argmax(-1)
        counts = [int((chosen[mask] == expert).sum()) for expert in range(EXPERTS)]
        assert chosen.bincount().max() > 3  # places of an expert: some are dropped
        share = torch.tensor(counts, dtype=torch.float64) / sum(counts)
        expected = torch.autograd.grad(0.5 * EXPERTS * (share * scores[mask].mean(0)).sum(), weight)[0]
        assert (gate.wg.weight.grad.double() - plain - expected).norm() <= 1e-6 * expected.norm()
        mean = sum(counts) / EXPERTS
        bias = [b + 0.05 * ((mean > count) - (mean < count)) for b, count in zip(bias, counts, strict=True)]
        torch.testing.assert_close(balance.biases[GATES[0]], torch.tensor(bias), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS, ids=label)
@pytest.mark.parametrize("scale", [1, 100])
def test_at_bias_zero_a_model_is_the_same_bit_for_bit(kind, scale):
    """Also where all scores but one are rounded to 0, and only the logits order the experts."""
    net = MoENet(kind).train()
    with torch.no_grad():
        for name in GATES:
            net.get_submodule(name).wg.weight.mul_(scale)
    (batch,) = batches(1)
    expected, classes = net(**batch), [type(module) for module in net.modules()]
    balance = equipoise.attach(net, "frozen")
    assert torch.equal(net(**batch), expected)
    balance.detach()
    assert [type(module) for module in net.modules()] == classes


@pytest.mark.parametrize("kind", KINDS, ids=label)
def test_a_recorded_choice_is_replayed(kind):
    net = MoENet(kind).train()
    balance = equipoise.attach(net, "frozen+lbl")
    (batch,) = batches(1)
    keep = batch["attention_mask"].bool()
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(*keep.shape, len(GATES), EXPERTS, generator=generator)
    record = noise.topk(kind.k).indices
    with balance.replay(record, mask=batch["attention_mask"]), balance.recording() as recording:
        (net(**batch) + balance.loss()).backward()
    balance.step()
    assert torch.equal(recording.by_token(rows=2)[keep].sort(-1).values, record[keep].sort(-1).values)
    for number, name in enumerate(GATES):
        expected = torch.bincount(record[:, :, number][keep].flatten(), minlength=EXPERTS)
        assert torch.equal(balance.load[name], expected)


@pytest.mark.parametrize("k", [1, 2])
def test_tokens_that_are_not_used_do_not_count(k):
    from deepspeed.moe.layer import MoE

    moe = MoE(WIDTH, torch.nn.Linear(WIDTH, WIDTH), **Kind(k, False).options())
    balance = equipoise.attach(moe)
    x, used = torch.randn(2, 9, WIDTH), (torch.rand(18) < 0.6).long()
    chosen = (x.view(18, WIDTH) @ moe.deepspeed_moe.gate.wg.weight.T).topk(k).indices
    moe(x, used_token=used)[0].sum().backward()
    balance.step()
    expected = torch.bincount(chosen[used > 0].flatten(), minlength=EXPERTS)
    assert torch.equal(balance.load["deepspeed_moe.gate"], expected)


@pytest.mark.parametrize("strategy", ["quantile", "frozen+z:coefficient=1e-3", "none", "loss-free:rule=multiplicative"])
@pytest.mark.parametrize("kind", KINDS, ids=label)
def test_other_strategies_run(kind, strategy):
    net = MoENet(kind).train()
    balance = equipoise.attach(net, strategy)
    for batch in batches(3):
        (net(**batch) + balance.loss()).backward()
        balance.step()
        assert all(load.sum() == kind.k * batch["attention_mask"].sum() for load in balance.load.values())
    if strategy.startswith("loss-free"):
        assert all(bool(bias.any()) for bias in balance.biases.values())


# ---- its own loss, and what is refused ----


@pytest.mark.parametrize(("weight", "warns"), [(0.01, True), (0.0, False), (None, False)])
def test_a_loss_of_its_own_that_is_added_is_named_once(weight, warns, caplog):
    net = MoENet(Kind(2, True)).train()
    balance = equipoise.attach(net, "lbl")
    for batch in batches(2):
        loss = net(**batch) + balance.loss()
        if weight is not None:
            loss = loss + weight * sum(block.deepspeed_moe.l_aux for block in net.blocks)
        loss.backward()
        balance.step()
    said = [r.message for r in caplog.records if "the routers of deepspeed 0.19.8 return" in r.message]
    assert len(said) == warns
    assert all("acts beside what was attached. To have only one, leave it out of the loss." in text for text in said)


REFUSALS = {
    "sampling": (dict(k=2, top2_2nd_expert_sampling=True), "top2_2nd_expert_sampling=True draws the second expert by"),
    "RSample": (dict(k=1, noisy_gate_policy="RSample"), "noisy_gate_policy='RSample' adds noise to the choice"),
    "Jitter": (dict(k=3, noisy_gate_policy="Jitter"), "noisy_gate_policy='Jitter' adds noise to the choice"),
}


@pytest.mark.parametrize(("options", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_a_choice_by_chance_is_refused_with_what_to_do(options, reason):
    from deepspeed.moe.layer import MoE

    net = torch.nn.Sequential(torch.nn.Embedding(8, 8), MoE(8, torch.nn.Linear(8, 8), num_experts=4, **options))
    with pytest.raises(equipoise.EquipoiseError, match=f"TopKGate.*{reason}.*where deepspeed.moe.layer.MoE is built"):
        equipoise.attach(net, "loss-free")


def test_a_trial_needs_no_other_rank_and_no_capacity_and_starts_no_timer():
    from deepspeed.moe.layer import MoE

    moe = MoE(8, torch.nn.Linear(8, 8), num_experts=4, k=1, min_capacity=100, drop_tokens=False)
    gate = moe.deepspeed_moe.gate
    gate.ep_group, gate.wall_clock_breakdown = "a group of other ranks", True
    assert equipoise.attach(moe, "loss-free").layers[0].obstacle is None
    assert not gate.timers.timers


def test_noise_that_deepspeed_ignores_is_not_refused():
    from deepspeed.moe.layer import MoE

    moe = MoE(8, torch.nn.Linear(8, 8), num_experts=4, k=3, noisy_gate_policy="RSample")
    assert equipoise.attach(moe, "loss-free").layers[0].obstacle is None


def test_a_gate_that_is_called_in_another_way_than_the_layer_does_is_refused():
    net = MoENet(Kind(2, True)).train()
    equipoise.attach(net, "lbl")
    with pytest.raises(equipoise.EquipoiseError, match="must be called with sparse_routes=True.*got 4 outputs"):
        net.get_submodule(GATES[0])(torch.randn(12, WIDTH))


# ---- an engine on two ranks ----


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_engine_on_two_ranks_gives_what_one_process_gives_in_float64(case):
    kind, accumulated = case.kind, case.accumulated
    data = data_of(kind, 12)
    for result in results():
        reference = Reference(MoENet(kind._replace(ep_size=1)), LR)
        steps = result[case]
        assert len(steps) == 6 // accumulated
        for number, step in enumerate(steps):
            first = number * accumulated
            window = [data[2 * m : 2 * m + 2] for m in range(first, first + accumulated)]
            expected = reference.step(window, 1 / accumulated / 2)
            assert_gradient(step["gradient"], expected)
            assert_counts(step["load"], reference.counts)
            assert_biases(step["biases"], reference.biases)


def test_in_bf16_every_choice_counts_and_biases_stay_float32():
    data = data_of(CASES[6].kind, 12)
    for result in results():
        for number, step in enumerate(result["bf16"]):
            tokens = sum(int(batch["attention_mask"].sum()) for batch in data[4 * number : 4 * number + 4])
            assert all(load.sum() == 2 * tokens for load in step["load"].values())
            assert all(bias.dtype == torch.float32 and bias.any() for bias in step["biases"].values())


@pytest.mark.parametrize("ep_size", [1, 2])
def test_resuming_from_a_checkpoint_of_the_engine_equals_never_having_stopped(ep_size):
    for result in results():
        whole, after, num_windows = result["resumed", ep_size]
        assert num_windows == 3
        assert distance(after["gradient"], whole["gradient"]) < 1e-6
        for name, bias in whole["biases"].items():
            assert torch.equal(after["biases"][name], bias) and bias.any()


@pytest.mark.parametrize("kind", EVENED, ids=label)
def test_a_training_of_fifty_steps_evens_the_load(kind):
    for result in results():
        unbalanced, balanced = result["evened", kind, True], result["evened", kind, False]
        print(unbalanced, balanced)
        assert balanced < unbalanced / 2

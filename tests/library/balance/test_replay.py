"""Recorded routing takes the place of the routers' own choice: weights, gradients, counts and biases are exact."""

import logging
from contextlib import nullcontext
from copy import deepcopy

import pytest
import reference
import torch
from models import DIM, EXPERTS, K, family
from torch.nn import functional as F
from torch.testing import assert_close
from windows import (
    LAYERS,
    PADDING_MASK,
    SCORE_FUNCTIONS,
    assert_gradients_close,
    attach_tiny,
    clone_gradients,
    random_ids,
    record_calls,
)

from equipoise import EquipoiseError, attach

ROWS, LENGTH = 2, 7
TOKENS = ROWS * LENGTH
LOSS = "lbl:scope=global_batch,coefficient=0.5"


def random_record(seed=0, rows=ROWS, length=LENGTH, layers=2, experts=EXPERTS, k=K):
    """[batch, sequence, layers, k], k different experts each."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, length, layers, experts, generator=generator).topk(k).indices


def flat(record, layer):
    return record[:, :, layer].reshape(-1, record.shape[-1])


def expected_gradients(model, ids, record, mask=None, coefficient=0.5):
    """Of the model's loss and of the balancing loss, by float64 autograd on the whole model, written again."""
    values = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    keep = torch.ones(ids.numel(), dtype=torch.bool) if mask is None else mask.flatten().bool()
    hidden = values["embed.weight"][ids.flatten()]
    total = torch.zeros((), dtype=torch.float64)
    for layer, score_function in enumerate(SCORE_FUNCTIONS.values()):
        prefix, chosen = f"blocks.{layer}.", flat(record, layer)
        logits = hidden @ values[f"{prefix}gate.weight"].T
        scores = logits.sigmoid() if score_function == "sigmoid" else logits.softmax(-1)
        weights = torch.stack([scores[t, ids] for t, ids in enumerate(chosen)])
        weights = weights / weights.sum(-1, keepdim=True)
        mixed = sum(values[f"{prefix}experts"][chosen[:, c]] * weights[:, c, None] for c in range(chosen.shape[1]))
        hidden = hidden + (hidden * mixed) @ values[f"{prefix}out.weight"].T + values[f"{prefix}out.bias"]
        counts = torch.tensor(reference.load(chosen.tolist(), EXPERTS, keep.tolist()), dtype=torch.float64)
        shares = (scores / scores.sum(-1, keepdim=True))[keep].mean(0)
        total = total + coefficient * EXPERTS * (counts / counts.sum() * shares).sum()
    error = hidden.square().mean(-1)
    loss = (error * keep).sum() / keep.sum()
    (loss + total).backward()
    return loss, total, {name: value.grad for name, value in values.items() if value.grad is not None}


def counts_of(record, mask=None):
    mask = None if mask is None else mask.flatten().tolist()
    return {name: reference.load(flat(record, n).tolist(), EXPERTS, mask) for n, name in enumerate(LAYERS)}


def loads_of(balance):
    return {name: load.tolist() for name, load in balance.load.items()}


# ---- choice, weights, gradients, counts ----


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non_reentrant"])
@pytest.mark.parametrize("strategy", [LOSS, f"loss-free:rate=0.1+{LOSS}"], ids=str)
@pytest.mark.parametrize("mask", [None, PADDING_MASK], ids=["whole", "padded"])
def test_a_replayed_forward_and_backward_are_those_of_the_record(mask, strategy, checkpointing):
    model, balance = attach_tiny(strategy, checkpointing=checkpointing)
    ids, record = random_ids(), random_record()
    calls = record_calls(model)
    expected_loss, expected_balancing, expected = expected_gradients(model, ids, record, mask)
    with balance.replay(record):
        loss = model(ids, mask)
        balancing = balance.loss()
        (loss + balancing).backward()
    assert_close(loss.double(), expected_loss, rtol=1e-6, atol=0)
    assert_close(balancing.double(), expected_balancing, rtol=1e-6, atol=0)
    assert_gradients_close(clone_gradients(model), expected, rtol=1e-6)
    balance.step()
    assert loads_of(balance) == counts_of(record, mask)
    for layer, name in enumerate(LAYERS):
        assert all(torch.equal(chosen, flat(record, layer)) for _, chosen in calls[name])
        assert len(calls[name]) == (1 if checkpointing is None else 2)


def test_weights_are_the_live_scores_whatever_the_bias():
    """Also where the bias would move every choice, in a slot (layer 0) and beside the router (layer 1)."""
    model, balance = attach_tiny("loss-free")
    huge = {name: torch.arange(EXPERTS).float() * 100 for name in LAYERS}
    balance.load_state_dict({"num_windows": 1, "biases": huge})
    record, outputs = random_record(), {}
    for name in LAYERS:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda m, a, output, name=name: outputs.update({name: output}))
    with balance.replay(record):
        model(random_ids())
    for layer, name in enumerate(LAYERS):
        logits, weights, chosen = outputs[name]
        scores = reference.scores(logits.double().tolist(), SCORE_FUNCTIONS[name])
        for t, experts in enumerate(flat(record, layer).tolist()):
            assert chosen[t].tolist() == experts
            exact = torch.tensor([scores[t][e] for e in experts], dtype=torch.float64)
            assert_close(weights[t].double(), exact / exact.sum(), rtol=1e-6, atol=0)
    model(random_ids())
    assert all((outputs[name][2].sort().values == torch.tensor([EXPERTS - 2, EXPERTS - 1])).all() for name in LAYERS)


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "mixtral", "olmoe", "qwen3_moe"])
def test_families_of_transformers_replay_what_they_recorded_bit_by_bit(name):
    model = family(name)
    balance = attach(model, "loss-free:rate=1e-2+lbl:coefficient=0.1")
    ids = torch.randint(3, 64, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    gradients, losses = [], []
    with balance.recording() as recording:
        for _ in range(2):
            model.zero_grad()
            if not losses:
                loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
                (loss + balance.loss()).backward()
            else:
                for layer in balance.layers:  # the record must make the choice, not these
                    if layer.slot is not None:
                        layer.slot.tensor.copy_(torch.randn(layer.num_experts))
                with balance.replay([calls[0] for calls in recording.values()]):
                    loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
                    (loss + balance.loss()).backward()
            losses.append(loss.detach())
            gradients.append(clone_gradients(model))
            balance.step(applied=False)
    assert torch.equal(*losses)
    assert all(torch.equal(gradients[0][key], gradients[1][key]) for key in gradients[0])
    assert all(torch.equal(*calls) for calls in recording.values())


FORMS = {
    "batch, sequence, layers, k": lambda record: record,
    "tokens, layers, k": lambda record: record.flatten(0, 1),
    "a list of [tokens, k]": lambda record: [flat(record, n) for n in range(len(LAYERS))],
    "a list of [batch, sequence, k]": lambda record: list(record.unbind(2)),
    "a mapping": lambda record: dict(zip(LAYERS, record.unbind(2), strict=True)),
    "int32": lambda record: record.int(),
    "uint8": lambda record: record.to(torch.uint8),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_record_may_have_any_form(form):
    model, balance = attach_tiny(LOSS)
    record = random_record()
    with balance.replay(FORMS[form](record)):
        (model(random_ids()) + balance.loss()).backward()
    balance.step()
    assert loads_of(balance) == counts_of(record)


def test_a_token_that_was_not_recorded_is_routed_live():
    model, balance = attach_tiny(f"loss-free:rate=0.2+{LOSS}")
    balance.load_state_dict({"num_windows": 1, "biases": {n: torch.linspace(-1, 1, EXPERTS) for n in LAYERS}})
    record = random_record()
    record[:, -1] = -1  # the last token of a rollout
    calls = record_calls(model)
    with balance.replay(record):
        model(random_ids())
    for layer, name in enumerate(LAYERS):
        (logits, chosen), is_live = calls[name][0], flat(record, layer)[:, 0] == -1
        live, _ = reference.route(logits.double().tolist(), K, SCORE_FUNCTIONS[name], balance.biases[name].tolist())
        for t in range(TOKENS):
            expected = live[t] if is_live[t] else flat(record, layer)[t].tolist()
            assert sorted(chosen[t].tolist()) == sorted(expected)
        assert int(is_live.sum()) == ROWS


def test_layers_without_a_record_are_routed_live():
    model, balance = attach_tiny(LOSS)
    record, calls = random_record(), record_calls(model)
    with balance.replay({LAYERS[0]: record[:, :, 0], LAYERS[1]: None}):
        model(random_ids())
    (logits, chosen) = calls[LAYERS[1]][0]
    assert torch.equal(calls[LAYERS[0]][0][1], flat(record, 0))
    assert chosen.tolist() == reference.route(logits.double().tolist(), K, "softmax")[0]


# ---- padding ----


def test_padding_counts_nowhere_whatever_its_ids():
    """128 tokens count, 67 of which have expert 0. Padding of 128 with k times expert 0 would make 323 of it."""
    model, balance = attach_tiny(LOSS)
    rows, length = 4, 64
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[:, 32:] = 0
    generator = torch.Generator().manual_seed(0)
    others = 1 + torch.rand(rows, 32, len(LAYERS), EXPERTS - 1, generator=generator).topk(K).indices
    others.view(128, len(LAYERS), K)[:67, :, 0] = 0
    record = torch.zeros(rows, length, len(LAYERS), K, dtype=torch.long)  # padding: [0, 0]
    record[:, :32] = others
    naive = torch.bincount(record[:, :, 0].flatten(), minlength=EXPERTS)
    assert naive[0] == 67 + 128 * K == 323
    with balance.replay(record, mask=mask):
        (model(random_ids(rows, length), mask) + balance.loss()).backward()
    assert int(balance.num_tokens) == 128
    balance.step()
    assert loads_of(balance) == counts_of(record, mask)
    assert all(load[0] == 67 and sum(load) == 128 * K for load in loads_of(balance).values())


@pytest.mark.parametrize("form", [form for form in FORMS if form != "uint8"])
@pytest.mark.parametrize("shape", ["rows", "flat"])
def test_a_mask_fits_every_form(shape, form):
    model, balance = attach_tiny(LOSS)
    record = random_record()
    broken = record.masked_fill(PADDING_MASK[:, :, None, None] == 0, EXPERTS + 3)
    mask = PADDING_MASK if shape == "rows" else PADDING_MASK.flatten()
    with balance.replay(FORMS[form](broken), mask=mask):
        loss = model(random_ids(), PADDING_MASK) + balance.loss()
        loss.backward()
    _, _, expected = expected_gradients(model, random_ids(), record, PADDING_MASK)
    assert_gradients_close(clone_gradients(model), expected, rtol=1e-6)
    balance.step()
    assert loads_of(balance) == counts_of(record, PADDING_MASK)


def test_ids_of_uint8_may_have_padding():
    model, balance = attach_tiny(LOSS)
    record = random_record()
    broken = record.masked_fill(PADDING_MASK[:, :, None, None] == 0, 255).to(torch.uint8)
    with balance.replay(broken, mask=PADDING_MASK):
        model(random_ids())
    balance.loss()
    balance.step()
    assert loads_of(balance) == counts_of(record, PADDING_MASK)


def test_the_mask_ends_with_the_replay_if_nothing_was_counted():
    model, balance = attach_tiny()
    with balance.replay(random_record(), mask=PADDING_MASK), torch.no_grad():
        model.eval()(random_ids())
    model.train()(random_ids())
    balance.step()
    assert {sum(load) for load in loads_of(balance).values()} == {TOKENS * K}


def test_the_mask_stays_for_a_loss_after_the_replay():
    model, balance = attach_tiny(LOSS)
    record = random_record()
    with balance.replay(record, mask=PADDING_MASK):
        loss = model(random_ids())
    (loss + balance.loss()).backward()
    (model(random_ids(seed=1)) + balance.loss()).backward()  # which has no mask
    balance.step()
    assert {sum(load) for load in loads_of(balance).values()} == {(10 + 14) * K}


# ---- biases ----


def _step(model, balance, record=None, length=LENGTH, **options):
    ids = random_ids(ROWS, length, seed=3)
    with nullcontext() if record is None else balance.replay(record, **options):
        (model(ids) + balance.loss()).backward()
    balance.step()


@pytest.mark.parametrize("strategy", ["loss-free:rate=0.1,rule=sign,center=false", f"quantile+{LOSS}"])
def test_no_bias_moves_by_default(strategy):
    model, balance = attach_tiny(strategy)
    record, length = random_record(length=64), 64  # as many tokens as quantiles need
    _step(model, balance, length=length)
    before = balance.state_dict()
    _step(model, balance, record, length=length)
    assert all(torch.equal(before["biases"][name], bias) for name, bias in balance.biases.items())
    assert any(bias.any() for bias in balance.biases.values())
    assert balance.num_windows == 2
    assert loads_of(balance) == counts_of(record)
    assert balance.metrics()["tokens"] == ROWS * length
    _step(model, balance, length=length)
    assert not all(torch.equal(before["biases"][name], bias) for name, bias in balance.biases.items())


def test_one_replayed_micro_batch_holds_the_bias_of_its_window():
    model, balance = attach_tiny("loss-free:rate=0.1,rule=sign")
    with balance.replay(random_record()):
        model(random_ids())
    model(random_ids(seed=1))
    balance.step()
    assert not any(bias.any() for bias in balance.biases.values())
    assert {sum(load) for load in loads_of(balance).values()} == {2 * TOKENS * K}


def test_a_bias_moves_by_the_record_if_asked_for():
    model, balance = attach_tiny("loss-free:rate=0.1,rule=sign,center=false")
    record = random_record()
    _step(model, balance, record, moves_bias=True)
    for name, counts in counts_of(record).items():
        expected = torch.tensor(reference.sign_rule([0.0] * EXPERTS, counts, 0.1, False))
        assert_close(balance.biases[name], expected, atol=1e-7, rtol=0)


def test_a_forward_that_was_not_counted_holds_no_bias():
    model, balance = attach_tiny("loss-free:rate=0.1,rule=sign")
    with balance.replay(random_record()), torch.no_grad():
        model(random_ids())
    with balance.replay(random_record()), balance.paused():
        model(random_ids())
    model(random_ids())
    balance.step()
    assert any(bias.any() for bias in balance.biases.values())


def test_a_failed_forward_holds_no_bias():
    model, balance = attach_tiny("loss-free:rate=0.1,rule=sign")
    hook = model.blocks[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), balance.replay(random_record()):
        model(random_ids())
    hook.remove()
    model(random_ids())
    balance.step()
    assert any(bias.any() for bias in balance.biases.values())
    assert {sum(load) for load in loads_of(balance).values()} == {TOKENS * K}


def test_a_schedule_goes_on_and_a_momentum_stays():
    model, balance = attach_tiny("loss-free:rule=momentum,rate=0.1,schedule=linear,zero_from=4")
    assert balance.rate == 0.1, "of the first window, before it is closed"
    _step(model, balance)
    before = balance.state_dict()
    _step(model, balance, random_record())
    after = balance.state_dict()
    assert balance.rate == pytest.approx(0.1 * 3 / 4)
    assert_close(after["state"], before["state"], rtol=0, atol=0)
    assert_close(after["biases"], before["biases"], rtol=0, atol=0)
    _step(model, balance)
    assert balance.rate == pytest.approx(0.1 * 2 / 4)
    assert any(not torch.equal(after["biases"][name], bias) for name, bias in balance.biases.items())


# ---- recomputation ----


@pytest.mark.parametrize("checkpointing", ["reentrant", "non_reentrant"])
def test_accumulated_micro_batches_have_a_record_each(checkpointing):
    model, balance = attach_tiny("lbl:scope=micro_batch,coefficient=0.5", checkpointing=checkpointing)
    records = random_record(seed=1), random_record(seed=2)
    for seed, record in enumerate(records):
        with balance.replay(record):
            ((model(random_ids(seed=seed)) + balance.loss()) / 2).backward()
    expected = {}
    for seed, record in enumerate(records):
        for name, gradient in expected_gradients(model, random_ids(seed=seed), record)[2].items():
            expected[name] = expected.get(name, 0) + gradient / 2
    assert_gradients_close(clone_gradients(model), expected, rtol=1e-6)
    balance.step()
    loads = [counts_of(record) for record in records]
    assert loads_of(balance) == {n: [a + b for a, b in zip(loads[0][n], loads[1][n], strict=True)] for n in LAYERS}


@pytest.mark.parametrize("strategy", [None, LOSS, "loss-free"])
@pytest.mark.parametrize("checkpointing", ["reentrant", "non_reentrant"])
def test_a_recomputation_outside_is_refused(checkpointing, strategy):
    model, balance = attach_tiny(*([] if strategy is None else [strategy]), checkpointing=checkpointing)
    with balance.replay(random_record()):
        loss = model(random_ids()) + balance.loss()
    with pytest.raises(EquipoiseError, match=r"must run inside its replay\(\): blocks.1.gate is recomputed outside"):
        loss.backward()


@pytest.mark.parametrize("strategy", [None, LOSS])
def test_a_recomputation_with_another_record_is_refused(strategy):
    model, balance = attach_tiny(*([] if strategy is None else [strategy]), checkpointing="non_reentrant")
    with balance.replay(random_record(1)):
        first = model(random_ids(seed=1)) + balance.loss()
    with balance.replay(random_record(2)):
        second = model(random_ids(seed=2)) + balance.loss()
        with pytest.raises(EquipoiseError, match=r"must run inside its replay\(\)"):
            (first + second).backward()


def test_the_recomputation_of_a_live_forward_inside_is_refused():
    model, balance = attach_tiny(checkpointing="non_reentrant")
    loss = model(random_ids())
    with balance.replay(random_record()), pytest.raises(EquipoiseError, match="must be that of the forward inside"):
        loss.backward()


def test_a_second_backward_outside_is_refused():
    model, balance = attach_tiny(checkpointing="non_reentrant")
    with balance.replay(random_record()):
        loss = model(random_ids())
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
    with pytest.raises(EquipoiseError, match=r"must run inside its replay\(\)"):
        loss.backward()


def test_live_micro_batches_beside_replayed_ones_are_recomputed_live():
    model, balance = attach_tiny("lbl:scope=micro_batch,coefficient=0.5", checkpointing="non_reentrant")
    calls = record_calls(model)
    with balance.replay(random_record(1)):
        (model(random_ids(seed=1)) + balance.loss()).backward()
    (model(random_ids(seed=2)) + balance.loss()).backward()
    for name in LAYERS:
        (_, replayed), (_, replayed_again), (_, live), (_, live_again) = calls[name]
        assert torch.equal(replayed, replayed_again) and torch.equal(live, live_again)
        assert not torch.equal(replayed, live)
    balance.step()
    (model(random_ids(seed=2)) + balance.loss()).backward()  # the next window knows nothing of the replay
    balance.step()


def test_checkpoints_may_be_switched_on_in_a_later_window():
    model, balance = attach_tiny(LOSS)
    _step(model, balance, random_record())
    model.checkpointing = "non_reentrant"
    _step(model, balance)
    assert {sum(load) for load in loads_of(balance).values()} == {TOKENS * K}


def test_without_checkpoints_the_backward_may_run_outside():
    model, balance = attach_tiny(LOSS)
    record = random_record()
    with balance.replay(record):
        loss = model(random_ids())
    (loss + balance.loss()).backward()
    assert_gradients_close(clone_gradients(model), expected_gradients(model, random_ids(), record)[2], rtol=1e-6)


# ---- the context ----


def test_a_record_is_for_one_forward():
    model, balance = attach_tiny(LOSS)
    with balance.replay(random_record()):
        model(random_ids())
        with pytest.raises(EquipoiseError, match="entered once for each forward: blocks.0.gate was called twice"):
            model(random_ids())


def test_evaluation_is_replayed_and_not_counted():
    model, balance = attach_tiny(LOSS)
    record, calls = random_record(), record_calls(model)
    with balance.replay(record), torch.no_grad():
        model.eval()(random_ids())
    assert all(torch.equal(calls[name][0][1], flat(record, n)) for n, name in enumerate(LAYERS))
    assert not balance.has_open_window
    with balance.measuring() as load, balance.replay(record), torch.inference_mode():
        model(random_ids())
    assert {name: counts.tolist() for name, counts in load.items()} == counts_of(record)


def test_contexts_are_nested_and_errors_end_them():
    model, balance = attach_tiny()
    outer, inner, calls = random_record(1), random_record(2), record_calls(model)
    with pytest.raises(ZeroDivisionError), balance.replay(outer):
        with balance.replay(inner):
            model(random_ids())
        model(random_ids())
        with pytest.raises(EquipoiseError, match="was called twice with one record"):  # the outer one has been used
            model(random_ids())
        raise ZeroDivisionError
    model(random_ids())
    for layer, name in enumerate(LAYERS):
        first, second, *_, live = (chosen for _, chosen in calls[name])
        assert torch.equal(first, flat(inner, layer)) and torch.equal(second, flat(outer, layer))
        assert not torch.equal(live, first) and not torch.equal(live, second)


def test_detach_inside_ends_the_replay():
    model, balance = attach_tiny(LOSS)
    plain = model.eval()(random_ids()).item()
    with balance.replay(random_record()):
        assert model(random_ids()).item() != plain
        balance.detach()
        assert model(random_ids()).item() == plain
    assert model(random_ids()).item() == plain
    with pytest.raises(EquipoiseError, match=r"must be called before detach\(\)"):
        balance.replay(random_record())


def test_a_copy_is_not_replayed():
    model, balance = attach_tiny(LOSS)
    plain = deepcopy(model)(random_ids()).item()
    with balance.replay(random_record()):
        assert deepcopy(model)(random_ids()).item() == plain


# ---- errors ----

WRONG = {
    "another number of layers": (lambda r: r[:, :, :1], "the 2 layers of balance.layers: got shape"),
    "two dimensions": (lambda r: r[0, 0], r"\[batch, sequence, layers, k\] or \[tokens, layers, k\]"),
    "a short list": (lambda r: [r[:, :, 0]], "a tensor for each of 2 layers: got a list of 1"),
    "an array": (lambda r: r.numpy(), r"Write torch.as_tensor\(expert_ids\)"),
    "an array in a list": (lambda r: [r.numpy()[:, :, 0], r[:, :, 1]], "must be a tensor"),
    "another k": (lambda r: r[..., :1], r"\[tokens, 2\] or \[batch, sequence, 2\]: got shape"),
    "floats": (lambda r: r.float(), "must be integers: got torch.float32"),
    "an unknown layer": (
        lambda r: {LAYERS[0]: r[:, :, 0], LAYERS[1]: r[:, :, 1], "x": r[:, :, 1]},
        "x unknown, none missing",
    ),
    "a missing layer": (lambda r: {LAYERS[0]: r[:, :, 0]}, "none unknown, blocks.1.gate missing"),
    "out of range": (lambda r: r + 1, r"from 0 to 5, or all -1 .* got \d to 6"),
    "below -1": (lambda r: r - 2, "from 0 to 5"),
    "half recorded": (lambda r: r.clone().index_fill_(-1, torch.tensor([1]), -1), "from 0 to 5"),
    "a duplicate": (
        lambda r: r.clone().index_fill_(1, torch.tensor([3]), 4),
        r"2 different experts for each token: got \[4, 4\] for token 3, and 2 such tokens",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_record_is_refused(case):
    model, balance = attach_tiny(LOSS)
    change, message = WRONG[case]
    with pytest.raises(ValueError, match=message), balance.replay(change(random_record())):
        raise AssertionError("it was entered")
    assert model(random_ids()).isfinite()


def test_a_record_of_other_tokens_is_refused():
    model, balance = attach_tiny(LOSS)
    for rows, length in ((2, 6), (3, 7)):
        with (
            pytest.raises(EquipoiseError, match=rf"other tokens than the {rows * length} of the record"),
            balance.replay(random_record(rows=rows, length=length)),
        ):
            model(random_ids())


def test_a_mask_of_other_values_is_refused():
    _, balance = attach_tiny(LOSS)
    with pytest.raises(ValueError, match="mask must hold 1"), balance.replay(random_record(), mask=random_ids()):
        raise AssertionError("it was entered")


def test_a_router_without_a_top_k_is_refused():
    model, balance = attach_tiny()
    router = model.blocks[1].gate
    forward = type(router).__mro__[1].forward

    def sorts(self, hidden):
        logits = F.linear(hidden.view(-1, DIM), self.weight)
        values, chosen = logits.softmax(-1).sort(descending=True)
        return logits, values[:, :K], chosen[:, :K]

    type(router).__mro__[1].forward = sorts
    try:
        with (
            pytest.raises(EquipoiseError, match="took 0 over its experts. A fused kernel is none"),
            balance.replay(random_record()),
        ):
            model(random_ids())
    finally:
        type(router).__mro__[1].forward = forward


# ---- compiled ----


@pytest.mark.parametrize("strategy", [LOSS, f"loss-free:rate=0.1+{LOSS}"])
@pytest.mark.parametrize("checkpointing", [None, "non_reentrant"])
def test_a_compiled_model_replays_each_record(checkpointing, strategy):
    torch._dynamo.reset()
    model, balance = attach_tiny(strategy, checkpointing=checkpointing)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    plain = [model(random_ids(seed=seed)).item() for seed in range(4)]
    balance.loss(), balance.step(applied=False)
    for seed in range(4):
        record = random_record(seed)
        model.zero_grad()
        _, _, expected = expected_gradients(model, random_ids(seed=seed), record)
        with balance.replay(record):
            (compiled(random_ids(seed=seed)) + balance.loss()).backward()
        assert_gradients_close(clone_gradients(model), expected, rtol=2e-6)
        balance.step()
        assert loads_of(balance) == counts_of(record)
        assert_close(compiled(random_ids(seed=seed)).item(), plain[seed])
        (compiled(random_ids(seed=seed)) + balance.loss()).backward()
        balance.step(applied=False)


def test_a_compiled_model_refuses_a_second_forward():
    torch._dynamo.reset()
    model, balance = attach_tiny(LOSS)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with balance.replay(random_record()):
        compiled(random_ids())
        with pytest.raises(EquipoiseError, match="was called twice with one record"):
            compiled(random_ids())


def test_graphs_are_not_made_again_for_each_record():
    torch._dynamo.reset()
    model, balance = attach_tiny(LOSS)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    for seed in range(6):
        with balance.replay(random_record(seed)):
            (compiled(random_ids(seed=seed)) + balance.loss()).backward()
        (compiled(random_ids(seed=seed)) + balance.loss()).backward()
        balance.step()
    assert len(graphs) == 2  # with a record, and without


def test_a_step_that_holds_the_bias_says_nothing(caplog):
    model, balance = attach_tiny(f"loss-free+{LOSS}")
    with caplog.at_level(logging.WARNING):
        _step(model, balance, random_record())
    assert not caplog.records

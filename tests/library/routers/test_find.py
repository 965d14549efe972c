"""A tap leaves a model as it is, bit for bit, until its bias moves; then it moves the choice and nothing else."""

import io
from copy import deepcopy

import models
import pytest
import torch
import torch.nn.functional as F
from models import FAMILIES
from torch import nn
from torch.testing import assert_close

import equipoise
from equipoise import EquipoiseError, LossFree, RouterKind, attach
from equipoise.load import expert_load
from equipoise.routers.find import find_routers
from equipoise.routers.kind import ADDED_SLOT
from equipoise.routers.prove import prove
from equipoise.routing import route

families = pytest.mark.parametrize("name", sorted(FAMILIES))
SLOT = "e_score_correction_bias"
SLOTTED = [name for name, kind in FAMILIES.items() if kind.slot]
SLOTLESS = [name for name, kind in FAMILIES.items() if not kind.slot]
OPTIONS = {"glm4_moe": {"routed_scaling_factor": 2.5}, "olmoe": {"norm_topk_prob": False}}


def _family(name, **options):
    return models.family(name, **({"experts_implementation": "eager"} | OPTIONS.get(name, {}) | options))


def _batch(rows=2, length=9, seed=0):
    ids = torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def _routers(model):
    return [module for _, module, _, *_ in find_routers(model)]


def _record(model):
    """(logits, weights, expert_ids) of every router call, in order."""
    seen = []
    for router in _routers(model):
        router.register_forward_hook(lambda module, args, output: seen.append(output))
    return seen


def _everything(model, balance=None):
    seen = _record(model)
    output = model(**_batch(), output_router_logits=True)
    loss = output.loss if balance is None else output.loss + balance.loss()
    loss.backward()
    router_logits = output.router_logits if getattr(output, "router_logits", None) is not None else ()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return [output.loss, output.logits, *router_logits, *(x for call in seen for x in call)], gradients


def _bias(experts=8, seed=5, size=0.2):
    return torch.randn(experts, generator=torch.Generator().manual_seed(seed)) * size


@families
@pytest.mark.parametrize(
    "strategy", [(), ("none",), ("loss-free",), ("loss-free+lbl:coefficient=0",), ("frozen",)], ids=str
)
def test_an_attached_model_at_bias_zero_is_the_same_bit_for_bit(name, strategy):
    plain, attached = _family(name), _family(name)
    keys = list(attached.state_dict())
    balance = attach(attached, *strategy)
    assert list(attached.state_dict()) == keys
    assert [n for n, _ in attached.named_parameters()] == [n for n, _ in plain.named_parameters()]
    (ours, our_gradients), (theirs, their_gradients) = _everything(attached, balance), _everything(plain)
    assert len(ours) == len(theirs) >= 8
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    assert our_gradients.keys() == their_gradients.keys()
    assert any(name.endswith("gate.weight") for name in our_gradients)
    for parameter in our_gradients:
        assert torch.equal(our_gradients[parameter], their_gradients[parameter]), parameter


@families
@pytest.mark.parametrize("training", [True, False])
def test_a_nonzero_bias_steers_exactly_and_leaves_the_weights(name, training):
    score_function = FAMILIES[name].score_function
    model = _family(name)
    biases = {n: _bias(seed=i) for i, (n, _, _, *_) in enumerate(find_routers(model))}
    plain_seen = _record(deepcopy(model))
    attach(model, "frozen", biases=biases)
    model.train(training)
    seen = _record(model)
    model(**_batch())
    assert plain_seen == [] and len(seen) == 2
    normalised = name != "olmoe"
    for (logits, weights, ids), bias in zip(seen, biases.values(), strict=True):
        steered = route(
            logits,
            2,
            score_function=score_function,
            bias=bias,
            renormalise=normalised,
            scale=2.5 if name != "deepseek_v3" and score_function == "sigmoid" else 1.0,
        )
        order, our_order = ids.argsort(-1), steered.expert_ids.argsort(-1)
        assert torch.equal(ids.gather(1, order), steered.expert_ids.gather(1, our_order))
        scale = weights.sum() / steered.weights.sum()  # deepseek's routed scaling factor
        assert_close(weights.gather(1, order), steered.weights.gather(1, our_order) * scale, rtol=1e-6, atol=1e-7)
        unsteered = route(logits, 2, score_function=score_function).expert_ids
        moved = (ids.sort().values != unsteered.sort().values).any(1)
        assert moved.any(), "the bias moved nothing: the test proves nothing"


@families
def test_steered_gradients_are_those_of_the_plain_scores(name):
    """Finite differences would not see a bias: the weights' gradient is compared with autograd through ``route``."""
    kind = FAMILIES[name]
    model = _family(name)
    first = find_routers(model)[0][0]
    biases = {n: _bias(seed=i) for i, (n, _, _, *_) in enumerate(find_routers(model))}
    attach(model, "frozen", biases=biases)
    router = _routers(model)[0]
    hidden = torch.randn(20, router.weight.shape[1], generator=torch.Generator().manual_seed(1))
    logits, weights, ids = router(hidden)
    probe = torch.randn(weights.shape, generator=torch.Generator().manual_seed(2))
    (ours,) = torch.autograd.grad((weights * probe).sum(), router.weight)
    weight = router.weight.detach().clone().requires_grad_()
    plain = route(F.linear(hidden, weight), 2, score_function=kind.score_function, bias=biases[first])
    chosen = plain.scores.gather(1, ids)
    if name != "olmoe":
        chosen = chosen / chosen.sum(-1, keepdim=True)
    chosen = chosen * (weights.sum() / chosen.sum()).detach()
    (theirs,) = torch.autograd.grad((chosen * probe).sum(), weight)
    assert_close(ours, theirs, rtol=1e-4, atol=1e-6)  # float32 sums over 20 tokens


@pytest.mark.parametrize("name", SLOTTED)
def test_group_limited_routing_follows_the_family(name):
    model = _family(name, n_group=4, topk_group=2)
    bias = _bias(size=0.05)
    names = [n for n, _, _, *_ in find_routers(model)]
    attach(model, "frozen", biases=dict.fromkeys(names, bias))
    seen = _record(model)
    model(**_batch())
    for logits, _, ids in seen:
        expected = route(logits, 2, score_function="sigmoid", bias=bias, num_groups=4, top_groups=2).expert_ids
        assert torch.equal(ids.sort().values, expected.sort().values)


@families
def test_gradient_checkpointing_gives_the_same_counts_and_gradients(name):
    found = []
    for checkpointing in (False, True):
        model = _family(name)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        balance = attach(model, "loss-free+lbl:coefficient=0.1+lbl:scope=sequence,coefficient=0.1")
        batch = _batch()
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, :4] = 0
        (model(**batch).loss + balance.loss()).backward()
        balance.step()
        found.append((balance.load, [p.grad for p in model.parameters() if p.grad is not None]))
    for a, b in zip(found[0][0].values(), found[1][0].values(), strict=True):
        assert torch.equal(a, b) and a.sum() == 2 * 14
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert_close(a, b, rtol=0, atol=1e-6)


# ---- copies ----


def _logits(model):
    return model(_batch()["input_ids"]).logits.detach()


def _round_trip(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@families
@pytest.mark.parametrize("copy_of", [deepcopy, _round_trip], ids=["deepcopy", "torch.save"])
def test_a_copy_has_its_own_weights_and_biases_and_is_not_counted(name, copy_of):
    model = _family(name)
    names = [n for n, _, _, *_ in find_routers(model)]
    balance = attach(model, "loss-free:rate=0.5,rule=sign+lbl:coefficient=0.1", biases={n: _bias() for n in names})
    before = _logits(model)
    balance.loss()
    balance.step()
    stepped = _logits(model)
    assert not torch.equal(before, stepped), "the step moved nothing: the test proves nothing"
    balance.loss()
    balance.step()
    after = _logits(model)
    balance.loss()
    balance.step()
    held = _logits(model)
    balance.loss()
    copy = copy_of(model)
    assert list(copy.state_dict()) == list(model.state_dict())
    assert torch.equal(_logits(copy), held), "a copy routes as the original did"
    copy(**_batch()).loss.backward()  # no ticket needed: a copy has no losses
    balance.step()
    assert balance.load[names[0]].sum() == 2 * 18, "the copy was counted"
    moved = _logits(model)
    balance.loss()
    balance.step()
    assert torch.equal(_logits(copy), held), "the biases of the original reached the copy"
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.zero_()
    assert torch.equal(_logits(copy), torch.zeros_like(held)), "the copy runs with the original's weights"
    with balance.paused():
        assert _logits(model).any() and after.shape == moved.shape


@families
def test_a_copy_can_be_attached_and_starts_from_its_biases(name):
    model = _family(name)
    names = [n for n, _, _, *_ in find_routers(model)]
    first = attach(model, "loss-free:rate=0.1", biases={n: _bias() for n in names})
    copy = deepcopy(model)
    second = attach(copy, "loss-free:rate=0.1,rule=sign")
    for n in names:
        assert torch.equal(second.biases[n], _bias())
    copy(**_batch())
    second.step()
    assert second.load[names[0]].sum() == 2 * 18
    assert not torch.equal(second.biases[names[0]], _bias())
    assert torch.equal(first.biases[names[0]], _bias())
    second.detach()
    assert type(_routers(copy)[0]) is type(_routers(_family(name))[0])


# ---- the slot ----


def _slots(model):
    return [router._buffers[SLOT if SLOT in router._buffers else ADDED_SLOT] for router in _routers(model)]


def _holds(model, balance):
    for slot, bias in zip(_slots(model), balance.biases.values(), strict=True):
        assert slot.dtype == torch.float32 and torch.equal(slot, bias)


@families
def test_the_slot_holds_the_float32_bias_after_a_cast(name):
    model = _family(name)
    names = [n for n, _, _, *_ in find_routers(model)]
    balance = attach(model, "loss-free:rate=1e-3,rule=sign", biases={n: _bias() for n in names})
    model.to(torch.bfloat16)
    assert _routers(model)[0].weight.dtype == torch.bfloat16
    _holds(model, balance)
    model(**_batch())
    balance.step()
    _holds(model, balance)
    assert not torch.equal(balance.biases[names[0]], _bias())
    model.float().half().double()
    _holds(model, balance)


@families
def test_a_model_may_be_cast_in_the_middle_of_a_window(name):
    model = _family(name)
    balance = attach(model, "loss-free:rate=1e-3,rule=sign+lbl")
    loss = model(**_batch()).loss + balance.loss()
    loss.backward()
    model.zero_grad()
    model.to(torch.bfloat16)
    (model(**_batch()).loss + balance.loss()).backward()
    balance.step()
    _holds(model, balance)
    assert all(load.sum() == 2 * 36 for load in balance.load.values())


@families
def test_attach_on_meta_then_to_empty(name):
    with torch.device("meta"):
        model = _family(name)
    assert all(parameter.is_meta for parameter in model.parameters())
    names = [n for n, _, _, *_ in find_routers(model)]
    balance = attach(model, "loss-free:rate=0.1,rule=sign", biases={n: _bias() for n in names})
    model.to_empty(device="cpu")
    _holds(model, balance)
    source = _family(name)
    model.load_state_dict({k: v for k, v in source.state_dict().items() if SLOT not in k}, strict=False)
    for ours, theirs in zip(model.modules(), source.modules(), strict=True):  # what no state dict holds, rotary tables
        for key, buffer in theirs._buffers.items():
            if key != SLOT:
                ours._buffers[key] = buffer.clone()
    _holds(model, balance)
    model(**_batch())
    balance.step()
    _holds(model, balance)
    assert balance.load[names[0]].sum() == 36


@pytest.mark.parametrize("name", SLOTTED)
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_checkpoint_is_adopted(name, assign, dtype):
    model = _family(name)
    balance = attach(model, "loss-free:rate=0.1")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    keys = [k for k in state if k.endswith(SLOT)]
    assert len(keys) == 2
    for k in keys:
        state[k] = _bias(seed=len(k)).to(dtype)
    model.load_state_dict(state, assign=assign)
    for bias, k in zip(balance.biases.values(), keys, strict=True):
        assert torch.equal(bias, state[k].float())
    _holds(model, balance)


@pytest.mark.parametrize("name", SLOTTED)
def test_a_checkpoint_that_rounded_our_biases_does_not_round_them(name):
    model = _family(name)
    names = [n for n, _, _, *_ in find_routers(model)]
    balance = attach(model, "loss-free:rate=0.1", biases={n: _bias() for n in names})
    model.load_state_dict({k: v.bfloat16() for k, v in model.state_dict().items()}, assign=True)
    _holds(model, balance)
    assert torch.equal(balance.biases[names[0]], _bias())


@pytest.mark.parametrize("name", SLOTTED)
def test_attach_starts_from_what_the_slot_holds_and_saves_it_back(name):
    model = _family(name)
    for slot in _slots(model):
        slot.copy_(_bias())
    balance = attach(model, "loss-free:rate=0.25,rule=sign")
    assert all(torch.equal(bias, _bias()) for bias in balance.biases.values())
    model(**_batch())
    balance.step()
    saved = [v for k, v in model.state_dict().items() if k.endswith(SLOT)]
    for slot, bias in zip(saved, balance.biases.values(), strict=True):
        assert torch.equal(slot, bias) and not torch.equal(slot, _bias())


@pytest.mark.parametrize("name", SLOTTED)
def test_a_bfloat16_slot_becomes_float32(name):
    model = _family(name).to(torch.bfloat16)
    assert _slots(model)[0].dtype == torch.bfloat16
    _holds(model, attach(model, "loss-free:rate=0.1"))


# ---- detach and refusals ----


@families
def test_detach_restores_classes_keys_hooks_and_routes(name):
    plain, model = _family(name), _family(name)
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    buffers = [n for n, _ in model.named_buffers()]
    balance = attach(model, "loss-free:rate=0.5,rule=sign+lbl")
    steered = _logits(model)
    balance.loss()
    balance.step()
    biases = balance.detach()
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == keys and [n for n, _ in model.named_buffers()] == buffers
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert all("_equipoise" not in vars(m) for m in model.modules())
    assert all(bias.any() for bias in biases.values())
    if name in SLOTLESS:
        assert torch.equal(_logits(model), _logits(plain)) and torch.equal(_logits(model), steered)
    else:
        for slot, bias in zip(_slots(model), biases.values(), strict=True):
            assert torch.equal(slot, bias)
        assert not torch.equal(_logits(model), _logits(plain))
    again = attach(model, "frozen", biases=biases)
    assert all(torch.equal(again.biases[n], biases[n]) for n in biases)


def test_a_router_whose_forward_was_replaced_on_the_instance_is_refused_and_later_ones_are_not():
    """As by accelerate's hooks: it hides the forward of the class, so it would neither be steered nor counted."""
    from accelerate import dispatch_model

    model = _family("qwen3_moe")
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    with pytest.raises(
        EquipoiseError, match=r"its forward was replaced on the instance.*offload\) \(1 more.*\. Attach before that\.$"
    ):
        attach(model, "loss-free")
    later = _family("qwen3_moe")  # of the same class: nothing of the other one was kept
    balance = attach(later, "loss-free")
    dispatch_model(later, {"": "cpu"}, force_hooks=True)
    later(**_batch())
    balance.step()
    assert all(load.sum() == 2 * 18 for load in balance.load.values()) and len(balance.load) == 2


def test_what_is_inside_a_router_may_have_a_forward_of_its_own():
    class InsideRouter(nn.Module):
        router_kind = RouterKind("softmax", None)

        def __init__(self):
            super().__init__()
            self.top_k, self.linear = 2, nn.Linear(8, 6, bias=False)

        @property
        def weight(self):
            return self.linear.weight

        def forward(self, x):
            logits = self.linear(x)
            weights, expert_ids = logits.softmax(-1).topk(2, -1)
            return logits, weights, expert_ids

    torch.manual_seed(0)
    router = InsideRouter()
    called, plain = [], router.linear.forward
    router.linear.forward = lambda x: called.append(len(x)) or plain(x)
    balance = attach(nn.Sequential(router), "loss-free")
    assert called == []  # the proof runs on weights of its own
    router(torch.randn(5, 8))
    balance.step()
    assert called == [5] and [int(load.sum()) for load in balance.load.values()] == [10]


def test_attach_twice_is_refused_and_leaves_the_first():
    model = models.tiny_lm()
    balance = attach(model, "loss-free:rate=0.1")
    with pytest.raises(EquipoiseError, match=r"blocks\.0\.gate is attached already\. Call detach\(\)"):
        attach(model, "loss-free:rate=0.1")
    model(torch.zeros(1, 4, dtype=torch.int64))
    balance.step()
    assert balance.load["blocks.0.gate"].sum() == 8
    balance.detach()
    attach(model)


class StrangeRouter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 8))


def test_an_unknown_model_is_refused_naming_what_it_saw():
    with pytest.raises(
        EquipoiseError,
        match=r"1 \(StrangeRouter\) cannot be: its forward raised NotImplementedError: .*gate and the top-k",
    ):
        attach(nn.Sequential(nn.Linear(2, 2), StrangeRouter()))
    with pytest.raises(EquipoiseError, match="Linear holds none, and nothing that is called a mixture of experts"):
        attach(nn.Linear(2, 2))
    with pytest.raises(EquipoiseError, match="allow_empty=True.*`equipoise families` lists the model families"):
        attach(nn.Linear(2, 2))


def _topk_of_logits(self, hidden):
    logits = F.linear(hidden.reshape(-1, self.hidden_dim), self.weight)
    ids = torch.topk(logits, self.top_k, dim=-1).indices
    return logits, logits.softmax(-1, dtype=torch.float).gather(1, ids), ids


def _two_topks(self, hidden):
    logits = F.linear(hidden.reshape(-1, self.hidden_dim), self.weight)
    probabilities = logits.softmax(-1, dtype=torch.float)
    probabilities.topk(1)
    values, ids = torch.topk(probabilities, self.top_k, dim=-1)
    return logits, values, ids


def _no_topk(self, hidden):
    logits = F.linear(hidden.reshape(-1, self.hidden_dim), self.weight)
    probabilities = logits.softmax(-1, dtype=torch.float)
    values, ids = probabilities.sort(descending=True)
    return logits, values[:, : self.top_k], ids[:, : self.top_k]


def _sigmoid(self, hidden):
    logits = F.linear(hidden.reshape(-1, self.hidden_dim), self.weight)
    values, ids = torch.topk(logits.sigmoid(), self.top_k, dim=-1)
    return logits, values / values.sum(-1, keepdim=True), ids


def _argument_by_name(self, hidden):
    logits = F.linear(hidden.reshape(-1, self.hidden_dim), self.weight)
    values, ids = torch.topk(input=logits.softmax(-1, dtype=torch.float), k=self.top_k, dim=-1)
    return logits, values, ids


def _two_outputs(self, hidden):
    return _two_topks(self, hidden)[1:]


def _biased_weights(self, hidden):
    logits = F.linear(hidden.reshape(-1, self.hidden_dim).float(), self.weight.float())
    values, ids = torch.topk(logits.sigmoid() + self.e_score_correction_bias, self.top_k, dim=-1)
    return logits, values, ids


def _bias_on_logits(self, hidden):
    logits = F.linear(hidden.reshape(-1, self.hidden_dim).float(), self.weight.float())
    ids = torch.topk(logits + self.e_score_correction_bias, self.top_k, dim=-1).indices
    return logits, logits.sigmoid().gather(1, ids), ids


def _bias_ignored(self, hidden):
    logits = F.linear(hidden.reshape(-1, self.hidden_dim).float(), self.weight.float())
    values, ids = torch.topk(logits.sigmoid(), self.top_k, dim=-1)
    return logits, values, ids


def _bias_subtracted(self, hidden):
    logits = F.linear(hidden.reshape(-1, self.hidden_dim).float(), self.weight.float())
    ids = torch.topk(logits.sigmoid() - self.e_score_correction_bias, self.top_k, dim=-1).indices
    return logits, logits.sigmoid().gather(1, ids), ids


OTHERWISE = {
    "qwen3_moe": [_two_topks, _no_topk, _two_outputs],
    "glm4_moe": [_biased_weights, _bias_subtracted, _two_outputs],
}
COUNTED_ONLY = (_two_topks, _no_topk)  # no bias can steer them
ANOTHER_WAY = {
    _topk_of_logits: ("qwen3_moe", RouterKind("softmax", None, "logits")),
    _sigmoid: ("qwen3_moe", RouterKind("sigmoid", None)),
    _bias_on_logits: ("glm4_moe", RouterKind("sigmoid", SLOT, "logits")),
    _bias_ignored: ("glm4_moe", RouterKind("sigmoid", None)),  # a slot that does nothing is none
    _argument_by_name: ("qwen3_moe", RouterKind("softmax", None)),
}


@pytest.mark.parametrize("k", [2, 1])
@pytest.mark.parametrize(("name", "forward"), [(n, f) for n, fs in OTHERWISE.items() for f in fs])
def test_a_router_that_behaves_otherwise_is_refused_by_the_proof(monkeypatch, name, forward, k):
    model = _family(name, k=k)
    router = _routers(model)[0]
    monkeypatch.setattr(type(router), "forward", forward)
    before = type(router)
    with pytest.raises(EquipoiseError, match=r"must.*: model.layers.0.mlp.gate \(\w+\) cannot be"):
        attach(model, "loss-free:rate=0.1")
    assert type(router) is before and not model._forward_hooks
    if forward in COUNTED_ONLY:
        balance = attach(model, "lbl")
        seen = _record(model)
        (model(**_batch()).loss + balance.loss()).backward()
        balance.step()
        for load, (_, _, ids) in zip(balance.load.values(), seen, strict=True):
            assert torch.equal(load, torch.bincount(ids.flatten(), minlength=8)) and load.sum() == k * 18
    else:
        with pytest.raises(EquipoiseError):
            attach(model)


@pytest.mark.parametrize("k", [2, 1])
@pytest.mark.parametrize("forward", ANOTHER_WAY)
def test_how_a_router_selects_is_found_out_by_what_it_does(monkeypatch, forward, k):
    name, kind = ANOTHER_WAY[forward]
    model = _family(name, k=k)
    monkeypatch.setattr(type(_routers(model)[0]), "forward", forward)
    found = find_routers(model)
    assert [(router.kind, router.k) for router in found] == [(kind, k)] * 2
    biases = {router.name: _bias(size=0.5, seed=i) for i, router in enumerate(found)}
    attach(model, "frozen", biases=biases)
    seen = _record(model)
    model(**_batch())
    for (logits, _, ids), bias in zip(seen, biases.values(), strict=True):
        expected = (kind.ranked(logits) + bias).topk(k).indices
        assert torch.equal(ids.sort().values, expected.sort().values)


@families
@pytest.mark.parametrize("k", [1, 2, 8])
def test_the_proof_finds_k_and_touches_nothing(name, k):
    model = _family(name, k=k)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    for _, router, kind, *_ in find_routers(model):
        assert prove(router, kind) == (kind, 8, k, (2, 3), None, False, None, False)
    assert torch.equal(torch.rand(1), expected), "the global generator was used"
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@families
@pytest.mark.parametrize("where", ["default_dtype", "meta_device", "autocast", "inference_mode", "no_grad"])
def test_attach_works_in_any_surrounding(name, where):
    model = _family(name)
    surroundings = {
        "meta_device": torch.device("meta"),
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "inference_mode": torch.inference_mode(),
        "no_grad": torch.no_grad(),
    }
    if where == "default_dtype":
        torch.set_default_dtype(torch.bfloat16)
        try:
            balance = attach(model, "loss-free:rate=0.1")
        finally:
            torch.set_default_dtype(torch.float32)
    else:
        with surroundings[where]:
            balance = attach(model, "loss-free:rate=0.1")
    (model(**_batch()).loss + balance.loss()).backward()
    balance.step()
    _holds(model, balance)
    assert all(bias.any() for bias in balance.biases.values())


@pytest.mark.parametrize(
    ("name", "options"), [("glm4_moe", {"first_k_dense_replace": 1}), ("qwen3_moe", {"mlp_only_layers": [0]})]
)
def test_dense_layers_between_are_left_out(name, options):
    model = _family(name, layers=3, **options)
    balance = attach(model, "loss-free:rate=0.1")
    assert list(balance.load) == [f"model.layers.{i}.mlp.gate" for i in (1, 2)]
    model(**_batch())
    balance.step()
    assert all(load.sum() == 36 for load in balance.load.values())


def test_the_counts_are_those_of_the_recorded_choice():
    model = _family("mixtral")
    balance = attach(model, LossFree(rate=0.1))
    seen = _record(model)
    model(**_batch())
    balance.step()
    for (_, _, ids), load in zip(seen, balance.load.values(), strict=True):
        assert torch.equal(load, expert_load(ids, 8))
    assert equipoise.metrics.max_violation(balance.load) > 0


@pytest.mark.parametrize("strategy", ["loss-free", "lbl"])
def test_a_slot_that_comes_rounded_is_said(strategy, caplog):
    """from_pretrained(dtype=bfloat16) rounds it in families that do not keep it in float32."""
    model = _family("deepseek_v3").to(torch.bfloat16)
    attach(model, strategy).detach()
    assert not caplog.records, "zeros are not rounded"
    model = _family("deepseek_v3")
    for router in _routers(model):
        router.e_score_correction_bias.fill_(0.1)
    attach(model.to(torch.bfloat16), strategy)
    steers = strategy == "loss-free"
    assert [record.message.partition(" [")[0] for record in caplog.records] == (
        ["attach: the slots hold rounded biases: model.layers.0.mlp.gate"] if steers else []
    )

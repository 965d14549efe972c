"""Every family and layer of ours conforms, and each known way to get a model or a tap wrong is found by name."""

from copy import deepcopy
from types import SimpleNamespace

import models
import pytest
import torch
import torch.nn.functional as F
from models import FAMILIES
from torch import nn

import equipoise.attachment
import equipoise.counting.recorder
from equipoise.balance import Balance
from equipoise.counting.recorder import Recorder
from equipoise.errors import EquipoiseError
from equipoise.nn import MoE
from equipoise.routers.tap import OWN_SLOT, BiasedTopK, RouterKind, Tap
from equipoise.testing import TAP_INVARIANTS, ConformanceError, check_tap
from equipoise.testing.taps import Subject

ALL = set(TAP_INVARIANTS)
GROUPS, PADDING = {"factor moves the choice only"}, {"padding is not counted"}
DIM, EXPERTS, VOCAB = 12, 6, 32
IDS = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))

families = pytest.mark.parametrize("name", sorted(FAMILIES))


# ---- what is ours ----


@families
def test_families_conform(name):
    assert set(check_tap(models.family(name))) == ALL


def test_a_family_with_groups_and_a_bias_conforms():
    model = models.family("glm4_moe", n_group=4, topk_group=2)
    for key, slot in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            slot.copy_(0.02 * torch.randn(8, generator=torch.Generator().manual_seed(0)))
    assert set(check_tap(model)) == ALL - GROUPS


def test_a_model_in_16_bits_conforms():
    assert set(check_tap(models.family("qwen3_moe").bfloat16())) == ALL


def test_a_model_that_uses_every_expert_conforms_and_has_no_gradient_of_the_loss():
    assert set(check_tap(models.family("glm4_moe", k=8, layers=1))) == ALL - {"loss gradient"}


@pytest.mark.parametrize("checkpointing", [None, "non_reentrant"])
def test_a_model_with_padding_in_float64_conforms(checkpointing):
    batch = {"input_ids": IDS, "attention_mask": (torch.arange(32).view(2, 16) % 5 > 0).long()}
    assert set(check_tap(models.tiny_lm(checkpointing).double(), batch)) == ALL


def test_a_model_of_two_families_conforms():
    assert set(check_tap(models.tiny_lm(), {"input_ids": IDS})) == ALL


def test_some_layers_of_a_model_conform():
    batch = {"input_ids": IDS}
    for chosen in ("blocks.0.gate", "blocks.1.gate"):
        assert set(check_tap(models.tiny_lm(), batch, where=lambda name, _, chosen=chosen: name == chosen)) == ALL


class Layer(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.moe = MoE(16, hidden=16, num_experts=8, k=2, num_shared=1, **options)
        nn.init.normal_(self.moe.router.weight, std=0.5)

    def forward(self, x):
        return x + self.moe(F.rms_norm(x, x.shape[-1:]))


@pytest.mark.parametrize(
    ("options", "checked"),
    [
        ({}, ALL - PADDING),
        ({"score_function": "softmax", "renormalise": False}, ALL - PADDING),
        ({"score_function": "sqrt_softplus", "capacity_factor": 1.0, "scale": 2.0}, ALL - PADDING),
        ({"num_groups": 4, "top_groups": 2}, ALL - PADDING - GROUPS),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,  # a set has another order in every process
)
def test_our_layer_conforms(options, checked):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCAB, 16), Layer(**options), Layer(**options))
    assert set(check_tap(model, {"input": IDS})) == checked


def test_the_model_and_the_global_generator_are_left_as_they_were():
    model = models.tiny_lm()
    model(IDS).backward()
    modules, state = [type(m) for m in model.modules()], deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    check_tap(model, {"input_ids": IDS})
    assert torch.equal(torch.get_rng_state(), before)
    assert [type(m) for m in model.modules()] == modules and model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


# ---- a model of somebody else's ----


class SlotRouter(nn.Module):
    """Sigmoid scores and a slot; its own code, not ours."""

    router_kind = RouterKind("sigmoid", "bias")

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, DIM) * 0.4)
        self.register_buffer("bias", torch.zeros(EXPERTS))

    def forward(self, hidden):
        logits = F.linear(hidden.reshape(-1, DIM).float(), self.weight.float())
        return self.strange(logits) if len(logits) != 64 else self.sound(logits)  # attach proves with 64 tokens

    def sound(self, logits):
        scores = logits.sigmoid()
        ids = torch.topk(scores + self.bias, 2, dim=-1).indices
        weights = scores.gather(1, ids)
        return logits, weights / weights.sum(-1, keepdim=True), ids

    def strange(self, logits):
        return self.sound(logits)


class SlotlessRouter(SlotRouter):
    """Softmax scores, no slot."""

    router_kind = RouterKind("softmax", None)

    def __init__(self):
        super().__init__()
        del self.bias

    def sound(self, logits):
        weights, ids = torch.topk(logits.softmax(-1), 2, dim=-1)
        return logits, weights, ids


class Experts(nn.Module):
    def __init__(self, router):
        super().__init__()
        self.gate, self.scale = router(), nn.Parameter(torch.randn(EXPERTS, DIM))

    def forward(self, x):
        _, weights, ids = self.choose(x)
        return x + (self.scale[ids] * weights.to(x.dtype)[..., None]).sum(-2).view_as(x) * x

    def choose(self, x):
        return self.gate(x)


class Model(nn.Module):
    def __init__(self, router=SlotlessRouter, block=Experts):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks = nn.Embedding(VOCAB, DIM), nn.ModuleList(block(router) for _ in range(2))
        self.head = nn.Linear(DIM, VOCAB)
        self.config = SimpleNamespace(vocab_size=VOCAB)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(F.rms_norm(x, x.shape[-1:]))
        return SimpleNamespace(logits=self.head(x))


class Looped(Experts):
    def forward(self, x):
        return super().forward(super().forward(x))


@pytest.mark.parametrize(("router", "block"), [(SlotRouter, Experts), (SlotlessRouter, Experts), (SlotRouter, Looped)])
def test_a_model_of_somebody_else_conforms(router, block):
    assert set(check_tap(Model(router, block))) == ALL


class ChoosesAgain(Experts):
    def choose(self, x):
        logits, _, _ = self.gate(x)
        weights, ids = torch.topk(logits.softmax(-1), 2, dim=-1)
        return logits, weights, ids


class WeighsAgain(Experts):
    def choose(self, x):
        logits, _, ids = self.gate(x)
        return logits, logits.softmax(-1).gather(1, ids), ids


class WeighsByLogitsOfItsOwn(Experts):
    def choose(self, x):
        logits, _, ids = self.gate(x)
        own = F.linear(x.reshape(-1, DIM), self.gate.weight.detach())
        return logits, own.softmax(-1).gather(1, ids), ids


class BiasInTheWeights(SlotRouter):
    def strange(self, logits):
        scores = logits.sigmoid() + self.bias
        weights, ids = torch.topk(scores, 2, dim=-1)
        return logits, weights / weights.sum(-1, keepdim=True), ids


class BiasOnTheLogits(SlotRouter):
    def strange(self, logits):
        _, weights, ids = self.sound(logits + self.bias)
        return logits, weights, ids


class NoBiasInEvaluation(SlotRouter):
    def strange(self, logits):
        if self.training:
            return self.sound(logits)
        ids = torch.topk(logits.sigmoid(), 2, dim=-1).indices
        return logits, logits.sigmoid().gather(1, ids), ids


class BiasIn16Bits(SlotRouter):
    def strange(self, logits):
        scores = logits.sigmoid()
        ids = torch.topk(scores + self.bias.to(self.weight.dtype).float(), 2, dim=-1).indices
        return logits, scores.gather(1, ids), ids


class TwoTopKs(SlotlessRouter):
    def strange(self, logits):
        weights, ids = torch.topk(logits.softmax(-1), 2, dim=-1)
        return logits, weights, torch.topk(torch.zeros_like(logits).scatter(1, ids, 1.0), 2, dim=-1).indices


class TwoTopKsAlways(SlotlessRouter):
    def sound(self, logits):
        torch.topk(logits.softmax(-1), 1)
        return super().sound(logits)


class SortsInsteadOfTopK(SlotlessRouter):
    def strange(self, logits):
        weights, ids = logits.softmax(-1).sort(-1, descending=True)
        return logits, weights[:, :2], ids[:, :2]


class TheSameExpertTwice(SlotRouter):
    def strange(self, logits):
        logits, weights, ids = self.sound(logits)
        return logits, weights, ids[:, :1].expand(-1, 2).contiguous()


class LogitsWithoutGradient(SlotRouter):
    def strange(self, logits):
        logits, weights, ids = self.sound(logits)
        return logits.detach(), weights, ids


class OtherLogits(SlotlessRouter):
    def strange(self, logits):
        _, weights, ids = self.sound(logits)
        return logits * 2, weights, ids


class OtherWeights(SlotlessRouter):
    def strange(self, logits):
        logits, weights, ids = self.sound(logits)
        return logits, weights.square(), ids


class NoiseOfItsOwn(SlotlessRouter):
    generator = torch.Generator()

    def strange(self, logits):
        return self.sound(logits + torch.rand(logits.shape, generator=self.generator))


class RemembersTheCallBefore(SlotlessRouter):
    def strange(self, logits):
        before = getattr(self, "before", torch.zeros(())).detach()
        self.before = logits.mean().detach()
        return self.sound(logits + before * torch.arange(EXPERTS))


class NeverInTraining(SlotlessRouter):
    def train(self, mode=True):
        return super().train(False)


class AlwaysInTraining(SlotlessRouter):
    def train(self, mode=True):
        return super().train(True)


class SharedByCopies(SlotlessRouter):
    def __deepcopy__(self, memo):
        return self


class KeyOfItsOwn(SlotlessRouter):
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, buffer in self._buffers.items():
            destination[prefix + name] = buffer


class AddsABuffer(SlotlessRouter):
    def strange(self, logits):
        if "_equipoise" in vars(self):
            self.noticed = True
        return self.sound(logits)


class DropsPadding(Model):
    def forward(self, input_ids, attention_mask=None):
        if attention_mask is not None:
            input_ids = input_ids[attention_mask != 0][None]
        return super().forward(input_ids)


class TakesTheMaskOff(Model):
    def forward(self, input_ids, attention_mask=None):
        if attention_mask is not None:
            return Model.__call__(self, input_ids)
        return super().forward(input_ids)


class NothingComesOut(Model):
    def forward(self, input_ids):
        super().forward(input_ids)


BROKEN = [
    (Model(block=ChoosesAgain), "bias moves the choice only", "the experts do not follow the choice"),
    (Model(block=WeighsAgain), "loss gradient", "a gradient that is"),
    (Model(block=WeighsByLogitsOfItsOwn), "loss gradient", "a gradient that is"),
    (Model(BiasInTheWeights), "bias moves the choice only", "weights of the same choice of other bits"),
    (Model(BiasOnTheLogits), "bias moves the choice only", "the best by score and bias are"),
    (Model(NoBiasInEvaluation), "bias moves the choice only", "training False"),
    (Model(BiasIn16Bits), "cast keeps float32 biases", "the best by score and bias are"),
    (Model(TwoTopKs), "bias moves the choice only", "layer blocks.0.gate"),
    (Model(TwoTopKsAlways), "bias moves the choice only", "it calls torch.topk 2 times over the experts"),
    (Model(SortsInsteadOfTopK), "bias moves the choice only", "the best by score and bias are"),
    (Model(SortsInsteadOfTopK), "factor moves the choice only", "the best by score and bias are"),
    (Model(SortsInsteadOfTopK), "step reaches the router", "the best by score and bias are"),
    (Model(TheSameExpertTwice), "bias moves the choice only", "the same expert twice"),
    (Model(LogitsWithoutGradient), "loss gradient", "logits without a gradient"),
    (Model(OtherLogits), "bias moves the choice only", "the best by score and bias are"),
    (Model(OtherWeights), "bias moves the choice only", "weights that are not the scores of the chosen"),
    (Model(NoiseOfItsOwn), "unchanged at bias zero", "the model itself is not reproducible"),
    (Model(RemembersTheCallBefore), "copies", "output of the copy of other bits"),
    (Model(RemembersTheCallBefore), "detach restores", "attributes ['before']"),
    (Model(NeverInTraining), "counts each token once", "num_tokens 0"),
    (Model(AlwaysInTraining), "counts each token once", "counted by hand"),
    (Model(SharedByCopies), "attached once", "is attached already"),
    (Model(KeyOfItsOwn), "state dict", OWN_SLOT),
    (Model(AddsABuffer), "detach restores", "attributes ['noticed']"),
    (DropsPadding(), "padding is not counted", "which token belongs to which sequence"),
    (NothingComesOut(), "unchanged at bias zero", "got NoneType"),
]


def _name(value):
    if not isinstance(value, nn.Module):
        return value.replace(" ", "_")
    block = value.blocks[0]
    return "-".join(type(part).__name__ for part in (value, block, block.gate))


@pytest.mark.parametrize(("model", "invariant", "came"), BROKEN, ids=_name)
def test_a_broken_model_is_found_under_the_name_of_the_invariant(model, invariant, came):
    _fails(model, invariant, came)


def _fails(model, invariant, came):
    with pytest.raises(ConformanceError) as error:
        check_tap(model, only=invariant)
    message = str(error.value)
    assert message.startswith(f"{invariant}: ") and message.endswith(".")
    assert " must " in message.partition(" Got: ")[0]
    assert came in message.partition(" Got: ")[2], message
    assert f"model {type(model).__name__}, batch {{'input_ids': (2, 16)}}" in message


# ---- a tap that goes wrong ----


def _counts_recomputation(patch):
    patch.setattr(equipoise.counting.recorder.torch._C, "_current_graph_task_id", lambda: -1)


def _counts_evaluation(patch):
    observe = Recorder.observe
    patch.setattr(Recorder, "observe", lambda self, *args: observe(self, *args[:-1], True))


def _counts_what_is_paused(patch):
    patch.setattr(Recorder, "paused", property(lambda self: False, lambda self, value: None), raising=False)


def _measures_into_the_window(patch):
    patch.setattr(Recorder, "measuring", property(lambda self: False, lambda self, value: None), raising=False)


def _counts_padding(patch):
    patch.setattr(equipoise.counting.recorder, "fit_mask", lambda *args: None)


def _twice_the_gradient(patch):
    gradient = Recorder.gradient
    patch.setattr(Recorder, "gradient", lambda self, *args: 2 * gradient(self, *args))


def _ignores_the_factor(patch):
    serve = Recorder._serve
    patch.setattr(Recorder, "_serve", lambda self, *args: (serve(self, *args)[0], 1.0))


def _forgets_the_slot(patch):
    restore, seen = Recorder.restore_bias, set()

    def once(self, layer):
        if (id(self), layer) not in seen:
            seen.add((id(self), layer))
            restore(self, layer)

    patch.setattr(Recorder, "restore_bias", once)
    patch.setattr(Recorder, "restore_biases", lambda self, group, slots: [once(self, i) for i in group.layers])


def _casts_the_bias(patch):
    restore = Recorder.restore_bias

    def rounded(self, layer):
        bias = self.group_of[layer][0].steering.bias()
        bias.copy_(bias.bfloat16())
        restore(self, layer)

    patch.setattr(Recorder, "restore_bias", rounded)


def _copies_share_the_tap(patch):
    patch.setattr(Tap, "__deepcopy__", lambda self, memo: self, raising=False)


def _cannot_be_pickled(patch):
    def refuse(self, protocol):
        raise TypeError("cannot pickle a tap")

    patch.setattr(Tap, "__reduce_ex__", refuse)


def _saves_the_slot(patch):
    register = nn.Module.register_buffer
    patch.setattr(nn.Module, "register_buffer", lambda self, name, value, persistent=True: register(self, name, value))


def _leaves_hooks(patch):
    detach = Balance.detach

    def kept(self):
        self._hooks = []
        return detach(self)

    patch.setattr(Balance, "detach", kept)


def _leaves_the_slot(patch):
    untap = equipoise.balance.untap_router

    def kept(router, slot_of_family):
        slot = router._buffers.get(OWN_SLOT)
        untap(router, slot_of_family)
        router._buffers[OWN_SLOT] = slot

    patch.setattr(equipoise.balance, "untap_router", kept)


def _attaches_twice(patch):
    patch.setattr(equipoise.attachment, "is_tapped", lambda router: False)


def _biased_weights(patch):
    sound = BiasedTopK.__torch_function__

    def steer(self, func, types, args=(), kwargs=None):
        if type(self) is not BiasedTopK:  # the proof is not fooled
            return sound(self, func, types, args, kwargs)
        if func is torch.topk:
            choice = args[0] * (1 + self.bias) if self.multiplies else args[0] + self.bias
            return torch.topk(choice, *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    patch.setattr(BiasedTopK, "__torch_function__", steer)


def _adds_instead_of_multiplying(patch):
    init = BiasedTopK.__init__

    def adds(self, bias, multiplies=False):
        init(self, bias, multiplies and type(self) is not BiasedTopK)  # the proof is not fooled

    patch.setattr(BiasedTopK, "__init__", adds)


def _moves_when_skipped(patch):
    step = Balance.step
    patch.setattr(Balance, "step", lambda self, applied=True: step(self))


WRONG = [
    (_counts_recomputation, "recomputation is not counted", ""),
    (_counts_evaluation, "counts each token once", "counted by hand"),
    (_counts_what_is_paused, "counts each token once", "counted by hand"),
    (_measures_into_the_window, "measuring counts evaluation", "a load of [0, 0, 0, 0, 0, 0]"),
    (_counts_padding, "padding is not counted", "num_tokens 32, not 23"),
    (_twice_the_gradient, "loss gradient", "a gradient that is 1 of its norm away"),
    (_ignores_the_factor, "loss gradient", "a gradient that is"),
    (_forgets_the_slot, "step reaches the router", "the best by score and bias are"),
    (_casts_the_bias, "cast keeps float32 biases", "Balance.biases of other bits"),
    (_copies_share_the_tap, "copies", ""),
    (_cannot_be_pickled, "pickle", "cannot pickle a tap"),
    (_saves_the_slot, "state dict", OWN_SLOT),
    (_leaves_hooks, "detach restores", "hooks that were left"),
    (_leaves_the_slot, "detach restores", "buffers"),
    (_attaches_twice, "attached once", ""),
    (_biased_weights, "bias moves the choice only", "weights of the same choice of other bits"),
    (_biased_weights, "factor moves the choice only", "weights of the same choice of other bits"),
    (_adds_instead_of_multiplying, "factor moves the choice only", "the best by score and bias are"),
    (_moves_when_skipped, "step reaches the router", "applied False"),
]


@pytest.mark.parametrize(("breaks", "invariant", "came"), WRONG)
def test_a_broken_tap_is_found_under_the_name_of_the_invariant(monkeypatch, breaks, invariant, came):
    breaks(monkeypatch)
    _fails(Model(), invariant, came)


def test_every_invariant_has_something_that_breaks_it():
    assert {invariant for _, invariant, _ in BROKEN + WRONG} == ALL


# ---- how it is used ----


@pytest.mark.parametrize("invariant", TAP_INVARIANTS)
def test_one_invariant_at_a_time(invariant):
    assert check_tap(Model(), only=invariant) == (invariant,)


def test_the_first_that_does_not_hold_is_raised():
    with pytest.raises(ConformanceError, match="^bias moves the choice only: "):
        check_tap(Model(BiasOnTheLogits))


def test_a_model_that_cannot_be_attached_says_why():
    with pytest.raises(ConformanceError, match="Linear holds none and no other") as error:
        check_tap(nn.Linear(2, 2), {"input": torch.zeros(2, 2)})
    assert isinstance(error.value.__cause__, EquipoiseError)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="only must be one of unchanged at bias zero, .*: got 'speed'"):
        check_tap(Model(), only="speed")
    with pytest.raises(TypeError, match="model must be a torch.nn.Module: got str"):
        check_tap("mixtral")
    with pytest.raises(ValueError, match=r"batch must be given for a model without config\.vocab_size"):
        check_tap(models.tiny_lm())


def test_checkpointing_of_the_model_and_of_the_call_are_both_tried(monkeypatch):
    seen = []
    for name in ("_checkpointed_layers", "_checkpointed_call"):
        way = getattr(equipoise.testing.taps, name)

        def spied(model, batch, reentrant, name=name, way=way):
            loss = way(model, batch, reentrant)
            seen.append((name, reentrant, any("_equipoise" in vars(m) for m in model.modules())))
            return loss

        spied.__name__ = name
        monkeypatch.setattr(equipoise.testing.taps, name, spied)
    check_tap(models.family("qwen3_moe"), only="recomputation is not counted")
    assert {(name, reentrant) for name, reentrant, attached in seen if attached} == {
        (name, reentrant) for name in ("_checkpointed_layers", "_checkpointed_call") for reentrant in (True, False)
    }


def test_the_second_batch_is_another():
    subject = Subject(Model(), {"input_ids": IDS, "flag": True}, None)
    assert not torch.equal(subject.flipped["input_ids"], IDS) and subject.flipped["flag"] is True


def test_a_model_that_is_attached_is_refused():
    model = models.tiny_lm()
    balance = equipoise.attachment.attach(model, "loss-free")
    for given in (model, deepcopy(model)):
        with pytest.raises(ValueError, match="model must be as it is before attach"):
            check_tap(given, {"input_ids": IDS})
    balance.detach()
    assert check_tap(model, {"input_ids": IDS}, only="detach restores") == ("detach restores",)

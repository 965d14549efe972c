"""Balance counts every token once, gives the reference's gradient whatever the loop, and says what went wrong.

The table of compilers, checkpoints and ranks is in ``test_grid.py``; here is one process, eagerly, in every order.
"""

import gc
import logging
import math
from copy import deepcopy

import models
import pytest
import reference
import torch
from models import DIM, EXPERTS, VOCAB, K, tiny_lm
from torch import nn
from torch.testing import assert_close

import equipoise
from equipoise import EquipoiseError, LoadBalancingLoss, LossFree, attach
from equipoise.metrics import max_violation
from equipoise.nn import MoE

NAMES = ["blocks.0.gate", "blocks.1.gate"]
SCORE_FUNCTIONS = dict(zip(NAMES, ("sigmoid", "softmax"), strict=True))
SCOPES = ("sequence", "micro_batch", "global_batch")


def _ids(rows=2, length=7, seed=0):
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def _attached(*balancers, seed=0, checkpointing=None, **options):
    model = tiny_lm(checkpointing, seed)
    return model, attach(model, *balancers, **options)


def _recorder(model):
    """By layer, the (logits, expert_ids) of every call."""
    seen = {name: [] for name in NAMES}
    for name in NAMES:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen[name].append((output[0].detach(), output[2]))
        )
    return seen


def _counts(calls, masks=None):
    masks = masks or [None] * len(calls)
    loads = [reference.load(ids.tolist(), EXPERTS, mask) for (_, ids), mask in zip(calls, masks, strict=True)]
    return [sum(column) for column in zip(*loads, strict=True)]


def _gate_gradients(model):
    return {name: model.get_submodule(name).weight.grad.clone() for name in NAMES}


def _gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _close(found, expected, rtol=2e-6):
    """By norm over all parameters: float32 rounds to 6e-8, a few dozen roundings."""
    assert found.keys() == expected.keys()
    distance = sum(float((found[k].double() - expected[k].double()).square().sum()) for k in found) ** 0.5
    size = sum(float(expected[k].double().square().sum()) for k in expected) ** 0.5
    assert size > 0 and distance <= rtol * size, distance / size


def _total(balance):
    return {name: int(load.sum()) for name, load in balance.load.items()}


def _window_total(balance, tokens):
    assert _total(balance) == dict.fromkeys(NAMES, K * tokens)


# ---- what counts ----


def test_a_window_counts_every_training_token_once():
    model, balance = _attached("loss-free:rate=0.1")
    seen = _recorder(model)
    assert _total(balance) == dict.fromkeys(NAMES, 0)
    for seed in range(3):
        model(_ids(seed=seed)).backward()
    assert _total(balance) == dict.fromkeys(NAMES, 0), "load is of the last closed window"
    balance.step()
    _window_total(balance, 3 * 14)
    for name in NAMES:
        assert balance.load[name].dtype == torch.int64
        assert balance.load[name].tolist() == _counts(seen[name])
    model(_ids(rows=1)).backward()
    balance.step()
    _window_total(balance, 7)


@pytest.mark.parametrize("strategy", ["none", "loss-free", "lbl", "loss-free+lbl:scope=sequence"])
def test_evaluation_and_pauses_do_not_count_in_the_middle_of_a_window(strategy):
    model, balance = _attached(strategy)
    first = model(_ids())
    model.eval()
    model(_ids(seed=1))
    with torch.inference_mode():
        model(_ids(seed=2))
    model.train()
    with balance.paused():
        model(_ids(seed=3))
        with balance.paused():
            model(_ids(seed=4))
        model(_ids(seed=5))
    (first + balance.loss()).backward()
    balance.step()
    _window_total(balance, 14)


def test_a_paused_or_evaluated_forward_has_a_plain_gradient():
    plain = tiny_lm()
    plain(_ids()).backward()
    for mode in ("paused", "eval"):
        for checkpointing in (None, "non_reentrant", "reentrant"):
            model, balance = _attached("loss-free+lbl:coefficient=5", checkpointing=checkpointing)
            if mode == "eval":
                model.eval()
                model(_ids()).backward()
            else:
                with balance.paused():
                    loss = model(_ids())
                    if checkpointing is not None:  # a recomputation belongs inside, as its forward does
                        loss.backward()
                if checkpointing is None:
                    loss.backward()
            assert all(torch.equal(g, _gradients(plain)[n]) for n, g in _gradients(model).items()), (
                mode,
                checkpointing,
            )
            with pytest.raises(EquipoiseError, match="none was"):
                balance.step()


def test_gradient_mode_does_not_matter():
    model, balance = _attached("loss-free:rate=0.1")
    with torch.no_grad():
        model(_ids())
    balance.step()
    _window_total(balance, 14)


def test_a_training_forward_under_inference_mode_counts_and_does_no_harm():
    for strategy in ("loss-free:rate=0.1", "loss-free:rate=0.1+lbl"):
        model, balance = _attached(strategy)
        with torch.inference_mode():
            model(_ids())
        (model(_ids(seed=1)) + balance.loss()).backward()
        balance.step()
        _window_total(balance, 28)
        model(_ids())
        balance.loss()
        balance.step()
        assert balance.metrics()["tokens"] == 14


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inference", [True, False])
def test_measuring_counts_any_mode_and_leaves_the_window(training, inference):
    model, balance = _attached("loss-free:rate=0.1+lbl:coefficient=0.5")
    other, other_balance = _attached("loss-free:rate=0.1+lbl:coefficient=0.5")
    loss = model(_ids())
    model.train(training)
    with torch.inference_mode(inference), balance.measuring() as load:
        assert load == {}
        model(_ids(seed=1))
        model(_ids(seed=2, rows=3))
    model.train()
    assert {name: int(counts.sum()) for name, counts in load.items()} == dict.fromkeys(NAMES, K * 35)
    (loss + balance.loss()).backward()
    (other(_ids()) + other_balance.loss()).backward()
    for b in (balance, other_balance):
        b.step()
    for name in NAMES:
        assert torch.equal(balance.load[name], other_balance.load[name])
        assert torch.equal(balance.biases[name], other_balance.biases[name])
    _close(_gradients(model), _gradients(other), 0)
    assert equipoise.metrics.max_violation(load) >= 0
    load[NAMES[0]].add_(1)  # an ordinary tensor, also after inference mode


def test_measuring_is_empty_without_a_forward_and_ends_with_an_error():
    model, balance = _attached("loss-free:rate=0.1")
    with balance.measuring() as load:
        pass
    assert {name: int(counts.sum()) for name, counts in load.items()} == dict.fromkeys(NAMES, 0)
    with pytest.raises(ZeroDivisionError), balance.measuring() as load:
        model(_ids())
        raise ZeroDivisionError
    assert load == {}
    with balance.measuring(), pytest.raises(EquipoiseError, match="must not be nested"), balance.measuring():
        pass
    model(_ids())
    balance.step()
    _window_total(balance, 14)


def test_what_is_paused_is_not_measured_either():
    model, balance = _attached("none")
    with balance.measuring() as load:
        model(_ids())
        with balance.paused():
            model(_ids())
    assert int(load[NAMES[0]].sum()) == K * 14


@pytest.mark.parametrize("checkpointing", ["reentrant", "non_reentrant"])
def test_measuring_a_forward_and_backward_counts_once(checkpointing):
    model, balance = _attached("loss-free:rate=0.1+lbl", checkpointing=checkpointing)
    with balance.measuring() as load:
        model(_ids()).backward()
    assert int(load[NAMES[0]].sum()) == K * 14


# ---- padding ----

MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])


@pytest.mark.parametrize("strategy", ["loss-free:rate=0.1", "lbl:scope=sequence", "none"])
@pytest.mark.parametrize("how", ["keyword", "position", "bool", "token_mask", "flat_token_mask", "outranks"])
def test_padding_does_not_count(strategy, how):
    model, balance = _attached(strategy)
    seen = _recorder(model)
    if how == "keyword":
        loss = model(_ids(), attention_mask=MASK)
    elif how == "position":
        loss = model(_ids(), MASK)
    elif how == "bool":
        loss = model(input_ids=_ids(), attention_mask=MASK.bool())
    elif how == "outranks":
        balance.token_mask(MASK)
        loss = model(_ids(), attention_mask=torch.ones_like(MASK))
    else:
        balance.token_mask(MASK.reshape(-1) if how == "flat_token_mask" else MASK)
        loss = model(_ids())
    assert balance.num_tokens == 10
    (loss + balance.loss()).backward()
    assert balance.num_tokens == 10
    model(_ids(seed=1))
    assert balance.num_tokens == 14, "the mask of the micro-batch before is still there"
    balance.loss()
    balance.step()
    _window_total(balance, 24)
    for name in NAMES:
        assert balance.load[name].tolist() == _counts(seen[name], [MASK.reshape(-1).tolist(), None])


@pytest.mark.parametrize("strategy", ["loss-free:rate=0.1", "lbl"])
def test_a_token_mask_ends_with_step(strategy):
    model, balance = _attached(strategy)
    balance.token_mask(MASK)
    model(_ids())
    balance.step()  # without loss()
    model(_ids())
    balance.step()
    _window_total(balance, 14)


def test_a_token_mask_after_its_forward_is_an_error_and_one_of_an_evaluation_is_none(caplog):
    model, balance = _attached("loss-free+lbl")
    model(_ids())
    balance.token_mask(MASK)
    with pytest.raises(EquipoiseError, match="token_mask.. must be called before the forward of its micro-batch"):
        balance.loss()
    balance.token_mask(MASK)
    with pytest.raises(EquipoiseError, match="token_mask.. must be called before the forward"):  # this one before too
        (balance.loss() + model(_ids())).backward()
    balance.step()
    balance.token_mask(MASK)
    (model(_ids()) + balance.loss()).backward()
    balance.token_mask(MASK)
    with caplog.at_level(logging.WARNING, "equipoise"):
        balance.step()
    assert "token_mask() must be called before" in caplog.text
    model.eval()
    balance.token_mask(MASK)
    model(_ids())
    assert balance.loss() == 0  # a loop of training with the model in eval mode


def test_a_token_mask_of_none_counts_all():
    model, balance = _attached("lbl")
    balance.token_mask(None)
    model(_ids(), attention_mask=MASK)
    assert balance.num_tokens == 14


def test_padding_of_a_real_family_is_found():
    for strategy in ("none", "loss-free+lbl:scope=sequence"):
        model = models.family("qwen3_moe")
        balance = attach(model, strategy)
        ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))
        output = model(input_ids=ids, attention_mask=MASK, labels=ids)
        (output.loss + balance.loss()).backward()
        balance.step()
        assert all(load.sum() == 2 * 10 for load in balance.load.values())


def test_a_mask_with_a_cached_prefix_counts_its_end():
    model = models.family("mixtral")
    balance = attach(model, "none")
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])  # its end and its start count differently
    with torch.no_grad():
        cache = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True).past_key_values
        model(ids[:, 4:], attention_mask=mask, past_key_values=cache)
    balance.step()
    assert all(load.sum() == 2 * 10 for load in balance.load.values())


def test_a_mask_that_is_given_for_a_cached_prefix_too_counts_its_end():
    model, balance = _attached("none")
    balance.token_mask(torch.tensor([[0, 0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]))
    model(_ids(length=3))
    balance.step()
    _window_total(balance, 6)


def test_a_four_dimensional_mask_is_ignored_and_a_wrong_one_refused():
    model = models.family("mixtral")
    balance = attach(model, "none")
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    model(ids, attention_mask=torch.zeros(2, 1, 7, 7))
    balance.step()
    assert all(load.sum() == 2 * 14 for load in balance.load.values())
    balance.token_mask(torch.ones(3, 5))
    with pytest.raises(
        EquipoiseError, match=r"one number per token that model.layers.0.mlp.gate routes: got shape \(3, 5\)"
    ):
        model(ids)
    for wrong in (torch.ones(1, 1, 7), torch.tensor(1.0), [1, 0]):
        with pytest.raises(ValueError, match=r"mask must be a tensor \[batch, sequence\] or \[tokens\]"):
            balance.token_mask(wrong)
    with pytest.raises(ValueError, match="sequence_ids must be a tensor"):
        balance.token_mask(None, torch.zeros(1, 1, 1))


def test_a_square_mask_of_who_may_attend_to_whom_is_no_padding():
    model, balance = _attached("none")
    model(_ids(rows=1), torch.ones(7, 7).tril())
    balance.step()
    _window_total(balance, 7)
    with pytest.raises(EquipoiseError, match="it is that of causal attention.*token_mask"):
        model(_ids(rows=2)[:, :2], torch.ones(2, 2).tril())
    model(_ids(rows=2)[:, :2], torch.tensor([[1, 1], [1, 0]]))
    balance.step()
    _window_total(balance, 3)
    balance.token_mask(torch.ones(7, 7).tril())
    with pytest.raises(EquipoiseError, match=r"one number per token.*got shape \(7, 7\) for 7 tokens"):
        model(_ids(rows=1))


@pytest.mark.parametrize("low", [float("-inf"), -1e9, -1])
def test_a_mask_that_is_added_to_attention_scores_is_refused(low):
    model, balance = _attached("none")
    mask = torch.where(MASK == 0, low, 0.0)
    with pytest.raises(EquipoiseError, match=r"called with, it holds other numbers.*token_mask\(None\) where all do"):
        model(_ids(), mask)
    with pytest.raises(EquipoiseError, match="it holds other numbers"):
        model(_ids(), mask.clamp(-1, 0).long())
    with balance.paused():
        model(_ids(), mask)
    model.eval()
    model(_ids(), mask)
    model.train()
    balance.token_mask(MASK)
    model(_ids(), mask)
    balance.step()
    _window_total(balance, 10)
    model(_ids(), torch.where(MASK == 0, 0, 5))  # numbers of packed sequences
    balance.step()
    _window_total(balance, 10)


class _Towers(nn.Module):
    """Two kinds of tokens through one model: the attention_mask is that of the text."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(64, 16)
        self.text, self.image = (MoE(16, 8, 6, 2) for _ in range(2))

    def forward(self, input_ids, pixels, attention_mask=None):
        text, image = self.text(self.embedding(input_ids)), self.image(pixels)
        return text.float().sum() + image.float().sum()


@pytest.mark.parametrize("strategy", ["loss-free:rate=0.1", "lbl:coefficient=1"])
@pytest.mark.parametrize("patches", [2, 9])
def test_the_mask_of_a_text_is_not_that_of_images(strategy, patches, caplog):
    model = _Towers()
    balance = attach(model, strategy)
    pixels = torch.randn(2, patches, 16, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING, "equipoise"):
        for _ in range(2):
            (model(_ids(), pixels, attention_mask=MASK) + balance.loss()).backward()
            balance.step()
            assert {name: int(load.sum()) for name, load in balance.load.items()} == {
                "text.router": 2 * 10,
                "image.router": 2 * 2 * patches,
            }
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and said[0].startswith(
        "step: image.router routes other tokens than those of the attention_mask"
    )


def test_each_kind_of_tokens_can_have_a_mask_of_its_own():
    model = _Towers()
    balance = attach(model, "loss-free:rate=0.1")
    pixels, of_images = torch.randn(2, 7, 16), torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0]])
    balance.token_mask(of_images, where=lambda name: name.startswith("image"))
    model(_ids(), pixels, attention_mask=MASK)
    with balance.paused():
        model(_ids(), pixels)
    balance.loss()
    model(_ids(), pixels)
    balance.step()
    sums = {name: int(load.sum()) for name, load in balance.load.items()}
    assert sums == {"text.router": 2 * (10 + 14), "image.router": 2 * (6 + 14)}, "the mask ends with its micro-batch"
    balance.token_mask(MASK)
    balance.token_mask(None, where=lambda name: name == "image.router")
    model(_ids(), pixels)
    balance.step()
    sums = {name: int(load.sum()) for name, load in balance.load.items()}
    assert sums == {"text.router": 2 * 10, "image.router": 2 * 14}
    with pytest.raises(ValueError, match=r"where must choose a layer: it chooses none of text.router, image.router"):
        balance.token_mask(MASK, where=lambda name: False)
    balance.token_mask(MASK, where=lambda name: True)
    with pytest.raises(EquipoiseError, match="no forward came after it"):
        balance.loss()


def test_a_decoder_with_a_mask_of_its_own_is_not_masked_by_the_encoders():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = _Towers(), _Towers()

        def forward(self, input_ids, attention_mask=None, decoder_input_ids=None, decoder_attention_mask=None):
            pixels = torch.zeros(1, 1, 16)
            encoded = self.encoder(input_ids, pixels, attention_mask)
            return encoded + self.decoder(decoder_input_ids, pixels, decoder_attention_mask)

    model = Both()
    balance = attach(model, "loss-free", where=lambda name, router: "text" in name)
    model(_ids(), MASK, _ids(), torch.ones(2, 7))  # halves that take their ids and their mask are told them themselves
    balance.step()
    assert [int(load.sum()) for load in balance.load.values()] == [2 * 10, 2 * 14]
    balance.detach()

    class Bare(Both):
        def forward(self, input_ids, attention_mask=None, decoder_input_ids=None, decoder_attention_mask=None):
            halves = ((self.encoder, input_ids), (self.decoder, decoder_input_ids))
            return sum(half.text(half.embedding(ids)).sum() for half, ids in halves)

    model = Bare()
    for half in (model.encoder, model.decoder):
        half.forward = lambda hidden: hidden  # takes no mask
    balance = attach(model, "loss-free", where=lambda name, router: "text" in name)
    with pytest.raises(EquipoiseError, match="there is a decoder_attention_mask beside it.*token_mask"):
        model(_ids(), MASK, _ids(), torch.ones(2, 7))
    balance.token_mask(MASK, where=lambda name: name.startswith("encoder"))
    balance.token_mask(None, where=lambda name: name.startswith("decoder"))
    model(_ids(), None, _ids())
    balance.step()
    assert [int(load.sum()) for load in balance.load.values()] == [2 * 10, 2 * 14]


def test_a_wrapper_that_takes_no_mask_is_told_it_by_what_it_wraps():
    """As modules of training frameworks do, whose training_step calls the network."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.moe = nn.Embedding(64, 16), MoE(16, 8, 6, 2)

        def forward(self, tokens, attention_mask=None):
            hidden = self.moe(self.embedding(tokens))
            if self.fails:
                raise RuntimeError("no memory")
            return hidden.sum()

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x):
            return self.net(x)

        def training_step(self, tokens, mask):
            return self.net(tokens, attention_mask=mask)

    model = Wrapper()
    balance = attach(model, "loss-free+lbl:scope=sequence")
    model.net.fails = True
    with pytest.raises(RuntimeError, match="no memory"):
        model.training_step(_ids(), MASK)
    model.net.fails = False
    (model.training_step(_ids(), MASK) + balance.loss()).backward()
    balance.step()
    assert _total(balance) == {"net.moe.router": 2 * 10}


def test_a_micro_batch_of_padding_has_no_loss_and_no_gradient():
    model, balance = _attached("+".join(f"lbl:scope={s},coefficient=1" for s in SCOPES))
    loss = balance.loss() + model(_ids(), torch.zeros_like(MASK)) * 0
    loss = balance.loss() + loss
    assert loss == 0 and balance.num_tokens == 0
    loss.backward()
    for name, gradient in _gradients(model).items():
        assert not gradient.any(), name
    balance.step()
    found = balance.metrics()
    assert found["tokens"] == 0 and found["load_balancing_loss"] == 0 and math.isnan(found["maxvio_batch"])
    assert not any(bias.isnan().any() for bias in balance.biases.values())


# ---- the loss: values and gradients ----


def _expected_loss(seen, coefficients, call=-1, mask=None, sequences=None):
    total = 0.0
    for name in NAMES:
        logits, ids = seen[name][call]
        scores, ids = reference.scores(logits.double().tolist(), SCORE_FUNCTIONS[name]), ids.tolist()
        counts = reference.load(ids, EXPERTS, mask)
        for scope, coefficient in coefficients.items():
            if scope == "sequence":
                total += coefficient * reference.sequence_loss(scores, ids, sequences, mask)
            else:
                total += coefficient * reference.load_balancing_loss(scores, counts, K, mask)
    return total


@pytest.mark.parametrize("masked", [False, True])
def test_loss_is_the_value_of_the_reference(masked):
    coefficients = {"sequence": 0.3, "micro_batch": 0.2, "global_batch": 0.5}
    model, balance = _attached(*(LoadBalancingLoss(c, s) for s, c in coefficients.items()))
    seen = _recorder(model)
    model(_ids(), MASK if masked else None)
    mask = MASK.reshape(-1).tolist() if masked else None
    expected = _expected_loss(seen, coefficients, mask=mask, sequences=[0] * 7 + [1] * 7)
    assert float(balance.loss().detach()) == pytest.approx(expected, rel=1e-6)
    assert balance.loss() == 0, "a second loss() without a forward is 0"


def test_loss_is_zero_before_a_forward_and_where_nothing_has_a_loss():
    model, balance = _attached("lbl")
    assert balance.loss() == 0
    model, balance = _attached("loss-free")
    loss = model(_ids())
    assert balance.loss() == 0 and balance.loss().dtype == torch.float32
    (loss + balance.loss()).backward()
    assert not any(b for b in [balance.metrics()])


def test_a_loss_taken_before_its_forward_raises():
    model, balance = _attached("lbl")
    loss = balance.loss() + model(_ids())
    with pytest.raises(EquipoiseError, match="between its forward and its backward"):
        loss.backward()


def _one_gradient(strategy, factor=1.0, **options):
    """The gradient of one micro-batch of 4 rows, and the biases after."""
    model, balance = _attached(strategy, **options)
    ((model(_ids(rows=4)) + balance.loss()) * factor).backward()
    balance.step()
    return _gradients(model)


@pytest.mark.parametrize("factor", [1 / 3, 1024.0, 65536.0 * 1.0, 0.0])
def test_the_factor_of_the_loss_reaches_the_router(factor):
    plain = _one_gradient("lbl:coefficient=0.5")
    scaled = _one_gradient("lbl:coefficient=0.5", factor)
    for name in plain:
        assert_close(scaled[name], plain[name] * factor, rtol=1e-5, atol=1e-6 * factor)


def test_an_own_loss_that_autograd_differentiates_has_its_coefficient_and_factor():
    """The z-loss: its part of the gradient is linear in both."""
    without, whole = _one_gradient("none"), _one_gradient("z:coefficient=0.5")
    half, scaled = _one_gradient("z:coefficient=0.25"), _one_gradient("z:coefficient=0.5", 1 / 4)
    for name in NAMES:
        name = f"{name}.weight"
        part = whole[name] - without[name]
        assert part.norm() > 1e-3
        assert_close(half[name] - without[name], part / 2, rtol=1e-4, atol=1e-6)
        assert_close(scaled[name], whole[name] / 4, rtol=1e-5, atol=1e-7)


def test_a_float64_model_has_a_float64_factor():
    """Design, section 6: 1e-12 in float64. 1/3 in float32 is off by 1e-8."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = tiny_lm().blocks[1].gate.double()

        def forward(self, x):
            return self.gate(x)[1].sum() * 0

    model = Mixed().train()
    balance = attach(model, LoadBalancingLoss(0.7, "micro_batch"))
    x = torch.randn(10, DIM, generator=torch.Generator().manual_seed(0)).double()
    ((model(x) + balance.loss()) / 3).backward()
    logits = (x @ model.gate.weight.T).detach()
    ids = logits.softmax(-1).topk(K).indices
    rows = reference.load_balancing_gradient(logits.tolist(), reference.load(ids.tolist(), EXPERTS), "softmax")
    expected = torch.tensor(rows, dtype=torch.float64).T @ x * 0.7 / 3
    assert_close(model.gate.weight.grad, expected, rtol=0, atol=1e-12)
    model.zero_grad()
    y = x[:4] * 2
    loss = model(x) + model(y)  # two calls, 10 and 4 tokens, in one micro-batch
    (loss + balance.loss()).backward()
    both = torch.cat([x, y])
    logits = (both @ model.gate.weight.T).detach()
    ids = logits.softmax(-1).topk(K).indices
    rows = reference.load_balancing_gradient(logits.tolist(), reference.load(ids.tolist(), EXPERTS), "softmax")
    expected = torch.tensor(rows, dtype=torch.float64).T @ both * 0.7
    assert_close(model.gate.weight.grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scope", SCOPES)
def test_two_forwards_in_a_micro_batch_are_one_of_all_their_tokens(scope):
    strategy = f"lbl:scope={scope},coefficient=0.5"
    model, balance = _attached(strategy)
    ids = _ids(rows=4)
    # the task loss is a mean over rows of equal length, so a mean of means by rows
    loss = (model(ids[:3]) * 3 + model(ids[3:])) / 4
    value = balance.loss()
    (loss + value).backward()
    expected, other = _attached(strategy)
    whole = expected(ids)
    whole_value = other.loss()
    (whole + whole_value).backward()
    _close(_gradients(model), _gradients(expected))
    if scope != "micro_batch" and scope != "global_batch":  # their value takes the counts known at each call
        assert_close(value, whole_value, rtol=1e-6, atol=0)


def test_retaining_the_graph_gives_the_gradient_twice():
    model, balance = _attached("lbl:coefficient=0.5")
    loss = model(_ids()) + balance.loss()
    loss.backward(retain_graph=True)
    once = _gradients(model)
    loss.backward()
    for name, gradient in _gradients(model).items():
        assert torch.equal(gradient, once[name] * 2)
    balance.step()
    _window_total(balance, 14)


def test_a_second_backward_without_the_ticket_raises():
    model, balance = _attached("lbl:coefficient=0.5")
    task = model(_ids())
    (task + balance.loss()).backward(retain_graph=True)
    with pytest.raises(EquipoiseError, match="must be added"):
        task.backward()


def test_a_backward_after_step_is_refused():
    model, balance = _attached("lbl")
    loss = model(_ids()) + balance.loss()
    balance.step()
    with pytest.raises(EquipoiseError, match="must run before step"):
        loss.backward()


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non_reentrant"])
@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25)], ids=["float", "tensor"])
def test_loss_scale_stands_in_for_tickets(checkpointing, scale):
    strategy = "+".join(f"lbl:scope={s},coefficient=0.3" for s in SCOPES)
    expected = _one_gradient(strategy, 0.25)
    model, balance = _attached(strategy, checkpointing=checkpointing)
    balance.loss_scale = scale
    (model(_ids(rows=4)) * 0.25).backward()
    _close(_gradients(model), expected)
    balance.step()
    _window_total(balance, 28)


def test_loss_scale_with_forwards_first_keeps_micro_batches_apart():
    strategy = "lbl:scope=micro_batch,coefficient=0.5+lbl:coefficient=0.5"
    model, balance = _attached(strategy)
    balance.loss_scale = 0.5
    for loss in [model(_ids(seed=s)) * 0.5 for s in range(2)]:
        loss.backward()
    expected, other = _attached(strategy)
    losses = [(expected(_ids(seed=s)) + other.loss()) * 0.5 for s in range(2)]
    sum(losses).backward()
    _close(_gradients(model), _gradients(expected))


@pytest.mark.parametrize("checkpointing", ["reentrant", "non_reentrant"])
@pytest.mark.parametrize("order", ["sum", "first to last", "last to first"])
def test_loss_scale_finds_the_micro_batch_that_is_recomputed(checkpointing, order):
    """Autograd goes through a sum of losses from the last to the first."""

    strategy, sizes = "lbl:scope=micro_batch,coefficient=0.5", (2, 2, 5)
    model, balance = _attached(strategy, checkpointing=checkpointing)
    balance.loss_scale = 1.0
    losses = [model(_ids(rows=rows, seed=seed)) for seed, rows in enumerate(sizes)]
    if order == "sum":
        sum(losses).backward()
    for loss in {"first to last": losses, "last to first": losses[::-1], "sum": ()}[order]:
        loss.backward()
    expected, other = _attached(strategy)
    sum(expected(_ids(rows=rows, seed=seed)) + other.loss() for seed, rows in enumerate(sizes)).backward()
    _close(_gradients(model), _gradients(expected))


def test_a_loss_for_logging_between_windows_does_not_join_the_micro_batches_of_a_loss_scale():
    gradients = []
    for logged in (False, True):
        model, balance = _attached("lbl:scope=micro_batch,coefficient=0.5")
        balance.loss_scale = 0.5
        for _ in range(2):
            model.zero_grad()
            for loss in [model(_ids(seed=seed)) * 0.5 for seed in range(2)]:
                loss.backward()
            balance.step()
            if logged:
                assert float(balance.loss()) == 0.0
        gradients.append(_gradients(model))
    _close(*gradients)


def test_a_loss_scale_of_one_number_in_a_row_is_that_number():
    expected = _one_gradient("lbl:coefficient=0.3+z:coefficient=0.1", 0.25)
    model, balance = _attached("lbl:coefficient=0.3+z:coefficient=0.1")
    balance.loss_scale = torch.tensor([0.25])
    (model(_ids(rows=4)) * 0.25).backward()
    _close(_gradients(model), expected)


def test_autograd_grad_works_with_a_loss_scale():
    expected = _one_gradient("lbl:coefficient=0.5")
    model, balance = _attached("lbl:coefficient=0.5")
    weights = [model.get_submodule(name).weight for name in NAMES]
    loss = model(_ids(rows=4)) + balance.loss()
    with pytest.raises(EquipoiseError, match="torch.autograd.grad.*set balance.loss_scale"):
        torch.autograd.grad(loss, weights, retain_graph=True)
    balance.loss_scale = 1.0
    for name, gradient in zip(NAMES, torch.autograd.grad(loss, weights), strict=True):
        assert_close(gradient, expected[f"{name}.weight"], rtol=0, atol=1e-6)


def test_previous_pooling_uses_the_last_windows_share():
    strategy = "lbl:coefficient=0.5,pooling=previous"
    model, balance = _attached(strategy)
    plain = tiny_lm()
    plain(_ids()).backward()
    loss = model(_ids()) + balance.loss()
    loss.backward()
    # an even share: E * sum_e P_e / E = 1 a layer; a constant, so no gradient but rounding
    assert float(loss.detach()) == pytest.approx(float(plain(_ids()).detach()) + 2 * 0.5, rel=1e-6)
    _close(_gradients(model), _gradients(plain), 1e-6)
    balance.step()
    last = {name: load.tolist() for name, load in balance.load.items()}
    model.zero_grad()
    seen = _recorder(model)
    (model(_ids(seed=1)) * 0 + balance.loss()).backward()
    for name in NAMES[1:]:  # the last router: nothing flows into it from above
        logits = seen[name][0][0]
        rows = reference.load_balancing_gradient(logits.double().tolist(), last[name], SCORE_FUNCTIONS[name])
        seen_gradient = model.get_submodule(name).weight.grad
        inputs = torch.linalg.lstsq(model.get_submodule(name).weight.detach(), logits.T).solution.T  # DIM > EXPERTS
        assert seen_gradient.shape == (EXPERTS, DIM) and inputs.shape == (14, DIM)
        weight = model.get_submodule(name).weight.detach()
        expected = 0.5 * torch.tensor(rows).T @ logits  # (grad_W) W^T = sum_t g_t z_t^T
        assert_close(seen_gradient @ weight.T, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scope", SCOPES)
def test_uneven_micro_batches_equal_the_reference(scope):
    shapes = [(2, 7), (1, 4), (3, 5)]
    micro_batches = [_ids(r, n, seed=i) for i, (r, n) in enumerate(shapes)]
    weights = [0.5, 0.2, 0.3]
    model, balance = _attached(LoadBalancingLoss(0.7, scope))
    kept = _kept_gradients(model, balance, micro_batches, weights)
    for name in NAMES:
        parts = [{"logits": z.double().tolist(), "expert_ids": ids.tolist()} for z, ids, _ in kept[name]]
        if scope == "global_batch":
            expected = reference.global_batch_gradients(parts, K, SCORE_FUNCTIONS[name], 0.7, weights)
        else:
            expected = []
            for part, weight, (rows, length) in zip(parts, weights, shapes, strict=True):
                if scope == "micro_batch":
                    (own,) = reference.global_batch_gradients([part], K, SCORE_FUNCTIONS[name], 0.7, [weight])
                else:
                    sequences = [t // length for t in range(rows * length)]
                    own = reference.sequence_gradient(
                        part["logits"], part["expert_ids"], sequences, SCORE_FUNCTIONS[name]
                    )
                    own = [[0.7 * weight * value for value in row] for row in own]
                expected.append(own)
        for (_, _, gradient), rows in zip(kept[name], expected, strict=True):
            assert_close(gradient, torch.tensor(rows), rtol=0, atol=1e-7)  # float32, values of 1e-2


def _kept_gradients(model, balance, micro_batches, weights):
    """By layer and micro-batch, (logits, ids, gradient of the logits), taken at the output of the linear map."""
    kept = {name: [] for name in NAMES}
    original = torch.nn.functional.linear
    outputs = []

    def linear(*args, **kwargs):
        output = original(*args, **kwargs)
        if output.shape[-1] == EXPERTS and output.requires_grad:
            output.retain_grad()
            outputs.append(output)
        return output

    torch.nn.functional.linear = linear
    # cut: the second router's loss does not reach the first through the hidden state; the task's gradient is times 0
    model.blocks[1].gate.register_forward_pre_hook(lambda module, args: (args[0].detach(),))
    try:
        for name in NAMES:
            model.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: kept[name].append([outputs[-1], output[2]])
            )
        losses = [
            (model(ids) * 0 + balance.loss()) * weight for ids, weight in zip(micro_batches, weights, strict=True)
        ]
    finally:
        torch.nn.functional.linear = original
    sum(losses).backward()
    return {name: [(z.detach(), ids, z.grad) for z, ids in calls] for name, calls in kept.items()}


@pytest.mark.parametrize("scope", ["sequence", "global_batch"])
def test_token_exact_weighing_equals_one_big_micro_batch(scope):
    strategy = f"loss-free:rate=0.1+lbl:scope={scope},coefficient=0.5"
    ids, lengths = _ids(rows=4), torch.tensor([7, 2, 4, 6])
    mask = (torch.arange(7) < lengths[:, None]).long()
    total = int(mask.sum())
    model, balance = _attached(strategy)
    losses = []
    for rows in (slice(0, 1), slice(1, 4)):
        tokens = mask[rows].sum()
        ce_sum = model(ids[rows], mask[rows]) * tokens
        assert balance.num_tokens == tokens
        losses.append((ce_sum + balance.num_tokens * balance.loss()) / total)
    sum(losses).backward()
    balance.step()
    big, big_balance = _attached(strategy)
    loss = big(ids, mask) + big_balance.loss()
    loss.backward()
    big_balance.step()
    _close(_gradients(model), _gradients(big))
    for name in NAMES:
        assert torch.equal(balance.load[name], big_balance.load[name])
        assert torch.equal(balance.biases[name], big_balance.biases[name])
    if scope == "sequence":  # the global value is logged with the counts known then
        assert_close(sum(losses), loss, rtol=1e-6, atol=0)


def test_packed_sequences_equal_unpacked_ones():
    """A row of two sequences and the two as rows: blocks have no attention, so the model itself sees no difference."""
    strategy = "loss-free:rate=0.1+lbl:scope=sequence,coefficient=0.5"
    ids = _ids(rows=2)
    model, balance = _attached(strategy)
    (model(ids) + balance.loss()).backward()
    for sequence_ids in (
        torch.tensor([[5] * 7 + [9] * 7]),
        torch.tensor([[0] * 7 + [1] * 7]),
        torch.tensor([0] * 7 + [1] * 7),
        torch.tensor([[3] * 7 + [-1] * 7]),
    ):
        packed, packed_balance = _attached(strategy)
        packed_balance.token_mask(torch.ones(1, 14), sequence_ids)
        loss = packed(ids.reshape(1, 14))
        (loss + packed_balance.loss()).backward()
        _close(_gradients(packed), _gradients(model))
    with_rows, balance_of_rows = _attached(strategy)
    balance_of_rows.token_mask(None, torch.zeros(2, 7))  # the same id in two rows: two sequences all the same
    (with_rows(ids) + balance_of_rows.loss()).backward()
    _close(_gradients(with_rows), _gradients(model))


def test_packing_matters():
    strategy = "lbl:scope=sequence,coefficient=0.5"
    ids, found = _ids(rows=2), []
    for sequence_ids in (None, torch.tensor([[0] * 7 + [1] * 7]), torch.tensor([[0] * 5 + [1] * 9])):
        model, balance = _attached(strategy)
        balance.token_mask(None, sequence_ids)
        model(ids.reshape(1, 14))
        found.append(float(balance.loss().detach()))
    assert len(set(found)) == 3


def test_sequence_ids_of_another_size_are_refused():
    model, balance = _attached("lbl:scope=sequence")
    balance.token_mask(None, torch.zeros(1, 13))
    with pytest.raises(EquipoiseError, match="sequence_ids"):
        model(_ids())


# ---- steps ----


def test_step_moves_the_biases_by_the_rules_of_the_gates():
    model, balance = _attached("loss-free:rate=1e-2")
    assert all(not bias.any() for bias in balance.biases.values())
    biases = {name: [0.0] * EXPERTS for name in NAMES}
    for seed in range(3):
        model(_ids(seed=seed))
        model(_ids(seed=seed + 10))
        balance.step()
        for name, rule in zip(NAMES, (reference.sign_rule, reference.proportional_rule), strict=True):
            biases[name] = rule(biases[name], balance.load[name].tolist(), 1e-2, True)
    for name in NAMES:
        assert balance.biases[name].dtype == torch.float32
        assert_close(balance.biases[name], torch.tensor(biases[name]), rtol=0, atol=1e-8)
    assert torch.equal(model.blocks[0].gate.e_score_correction_bias, balance.biases[NAMES[0]])


def test_step_without_a_forward_raises():
    _, balance = _attached("loss-free")
    with pytest.raises(EquipoiseError, match="attached routers must be called .*none was"):
        balance.step()


@pytest.mark.parametrize("strategy", ["loss-free:rate=0.1+lbl", "quantile+z", "lbl:pooling=previous"])
def test_a_layer_that_was_not_called_is_named_once_and_keeps_its_bias(strategy, caplog):
    model, balance = _attached(strategy)
    (model(_ids()) + balance.loss()).backward()
    balance.step()
    before, hidden = balance.biases, torch.randn(1, 3, DIM, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING, "equipoise"):
        for _ in range(2):
            (model.blocks[0](hidden).sum() + balance.loss()).backward()
            balance.step()
    assert caplog.text.count("step: blocks.1.gate got no token between two steps") == 1
    assert [int(load.sum()) for load in balance.load.values()] == [3 * K, 0]
    assert torch.equal(balance.biases[NAMES[1]], before[NAMES[1]])
    found = balance.metrics()
    assert all(math.isfinite(value) for value in found.values()) and found["tokens"] == 3
    assert found["maxvio_batch"] == found["maxvio_micro"] == pytest.approx(max_violation(balance.load[NAMES[0]]).item())
    (model(_ids()) + balance.loss()).backward()
    balance.step()
    assert balance.metrics()["tokens"] == 14


def test_the_loss_of_a_metric_is_of_the_layers_that_were_called():
    model, balance = _attached("lbl:coefficient=1")
    hidden = torch.randn(1, 3, DIM, generator=torch.Generator().manual_seed(0))
    output = model.blocks[0](hidden)
    loss = balance.loss()
    (output.sum() + loss).backward()
    balance.step()
    assert balance.metrics()["load_balancing_loss"] == pytest.approx(loss.item())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_loss_that_reaches_no_router_is_said_once(checkpointed, caplog):
    """A block that makes the weights itself leaves those of the router, on which the gradient travels, unused."""

    class Block(nn.Module):
        def __init__(self, uses):
            super().__init__()
            self.router, self.uses = MoE(DIM, 8, EXPERTS, K).router, uses

        def forward(self, hidden):
            logits, weights, expert_ids = self.router(hidden)
            own = logits.gather(-1, expert_ids).softmax(-1)
            return hidden * (weights if self.uses else own).sum(-1).view(*hidden.shape[:-1], 1)

    model = nn.Sequential(Block(True), Block(False), Block(True))
    balance = attach(model, "lbl")
    hidden = torch.randn(1, 3, DIM, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with caplog.at_level(logging.WARNING, "equipoise"):
        for _ in range(2):
            if checkpointed:
                output = torch.utils.checkpoint.checkpoint(model, hidden, use_reentrant=False)
            else:
                output = model(hidden)
            (output.sum() + balance.loss()).backward()
            balance.step()
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and said[0].startswith("step: the balancing loss gave 1.router no gradient")


def test_a_router_that_is_not_trained_is_no_reason_for_a_word(caplog):
    model, balance = _attached("lbl")
    model.requires_grad_(False)
    leaf = torch.zeros((), requires_grad=True)
    with caplog.at_level(logging.WARNING, "equipoise"):
        (model(_ids()) + leaf + balance.loss()).backward()
        balance.step()
    assert not caplog.records


@pytest.mark.parametrize("applied", [False, torch.tensor(False), torch.tensor(0.0)], ids=str)
def test_a_skipped_step_closes_the_window_and_moves_nothing(applied):
    model, balance = _attached("loss-free:rate=0.1+lbl")
    (model(_ids()) + balance.loss()).backward()
    before = balance.biases
    balance.step(applied)
    assert all(torch.equal(balance.biases[name], before[name]) for name in NAMES)
    _window_total(balance, 14)
    assert balance.state_dict()["num_windows"] == 1


@pytest.mark.parametrize("applied", [True, torch.tensor(True)], ids=str)
def test_an_applied_step_moves(applied):
    model, balance = _attached("loss-free:rate=0.1")
    model(_ids())
    balance.step(applied)
    assert all(bias.any() for bias in balance.biases.values())
    assert torch.equal(model.blocks[0].gate.e_score_correction_bias, balance.biases[NAMES[0]])


def test_follow_steps_with_the_optimizer():
    model, balance = _attached("loss-free:rate=0.1+lbl")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = balance.follow(optimizer)
    for _ in range(2):
        (model(_ids()) + balance.loss()).backward()
        optimizer.step()
    assert balance.state_dict()["num_windows"] == 2
    _window_total(balance, 14)
    with pytest.raises(EquipoiseError, match="follow.. must be called once"):
        balance.follow(optimizer)
    with pytest.raises(EquipoiseError, match=r"follow\(optimizer\) calls it already"):
        balance.step()
    handle.remove()
    balance.follow(optimizer).remove()
    (model(_ids()) + balance.loss()).backward()
    optimizer.step()
    with pytest.raises(EquipoiseError, match="between windows"):
        balance.state_dict()


def test_follow_steps_once_with_an_optimizer_that_steps_by_its_base_class():
    class Inherited(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    model, balance = _attached("loss-free:rate=0.1")
    torch.optim.SGD(model.parameters(), lr=0.1)  # from now on torch calls the hooks in the base class's step too
    optimizer = Inherited(model.parameters(), lr=0.1)
    balance.follow(optimizer)
    for _ in range(2):
        (model(_ids()) + balance.loss()).backward()
        optimizer.step()
    assert balance.state_dict()["num_windows"] == 2


def test_follow_passes_over_the_step_with_which_torch_makes_a_state():
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, balance = _attached("loss-free:rate=0.1")
    optimizer = torch.optim.AdamW(model.parameters())
    balance.follow(optimizer)
    get_state_dict(model, optimizer)
    (model(_ids()) + balance.loss()).backward()
    optimizer.step()
    assert balance.state_dict()["num_windows"] == 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_moves_nothing_where_the_optimizer_skips_it_by_itself(fused):
    """A scaler does not call a plain optimizer, and always calls a fused one, whose kernel looks for itself."""
    model, balance = _attached("loss-free:rate=0.1")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    scaler, before = torch.amp.GradScaler("cpu", init_scale=4.0), model.embed.weight.detach().clone()
    balance.follow(optimizer)
    for factor in (float("inf"), 1.0):
        scaler.scale(model(_ids()) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = [bool(bias.any()) for bias in balance.biases.values()]
        assert moved == [factor == 1.0] * 2 and torch.equal(before, model.embed.weight) == (factor != 1.0)
        optimizer.zero_grad()
    # a plain optimizer's window is open until somebody says that its step was skipped: both are one here
    assert balance.state_dict()["num_windows"] == (2 if fused else 1)


def test_follow_steps_with_an_optimizer_whose_step_is_compiled():
    torch._dynamo.reset()
    model, balance = _attached("loss-free:rate=0.1")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    balance.follow(optimizer)
    step = torch.compile(optimizer.step, backend="eager")
    for number in (1, 2):
        model(_ids()).backward()
        step()
        assert balance.state_dict()["num_windows"] == number
    torch._dynamo.reset()


def test_follow_refuses_an_optimizer_without_hooks():
    class Prepared(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model, balance = _attached("loss-free:rate=0.1")
    with pytest.raises(TypeError, match="got Prepared. Pass the one that it wraps"):
        balance.follow(Prepared(torch.optim.SGD(model.parameters())))


@pytest.mark.parametrize("strategy", ["loss-free:rate=0.1,rule=momentum", "quantile"])
def test_what_is_written_into_a_slot_in_place_is_the_bias(strategy):
    """As a checkpoint that is read into the tensors of ``state_dict()``."""
    bias = torch.tensor([0.3, -0.2, 0.0, 0.1, -0.3, 0.1])
    model, expected = _attached(strategy)
    model.blocks[0].gate.load_state_dict({**model.blocks[0].gate.state_dict(), "e_score_correction_bias": bias})
    other, balance = _attached(strategy)
    other.blocks[0].gate.state_dict()["e_score_correction_bias"].copy_(bias)
    for each, its in ((model, expected), (other, balance)):
        for _ in range(2):
            (each(_ids()) + its.loss()).backward()
            its.step()
    for name in NAMES:
        assert torch.equal(balance.biases[name], expected.biases[name])
    assert torch.equal(other.blocks[0].gate.e_score_correction_bias, balance.biases[NAMES[0]])
    other.blocks[0].gate.e_score_correction_bias.copy_(bias)
    assert torch.equal(balance.biases[NAMES[0]], bias)
    before = balance.biases[NAMES[0]].bfloat16().float()
    other.blocks[0].gate.e_score_correction_bias.copy_(before)  # ours, rounded: the bias stays as it was
    assert torch.equal(balance.biases[NAMES[0]], bias)


def test_a_grad_scaler_changes_nothing():
    expected = _one_gradient("loss-free:rate=0.1+lbl:coefficient=0.5")
    model, balance = _attached("loss-free:rate=0.1+lbl:coefficient=0.5")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(model(_ids(rows=4)) + balance.loss()).backward()
    scaler.unscale_(optimizer)
    _close(_gradients(model), expected)
    scaler.step(optimizer)
    balance.step()


def test_training_with_biases_evens_the_load_out():
    model, balance = _attached("loss-free:rate=0.02,rule=sign")
    history = []
    for step in range(150):
        with torch.no_grad():
            model(_ids(rows=16, length=16, seed=step % 10))
        balance.step()
        history.append(balance.metrics()["maxvio_batch"])
    assert history[0] > 0.4, "the input is not skewed: the test proves nothing"
    assert sum(history[-10:]) / 10 < 0.55 * history[0]  # the floor of 256 tokens is 0.11


# ---- orders of operations ----


@pytest.mark.parametrize("strategy", ["loss-free", "lbl", "lbl:scope=sequence"])
def test_a_micro_batch_without_rows_has_loss_zero(strategy):
    model, balance = _attached(strategy)
    (model(_ids()[:0], MASK[:0]) + balance.loss()).backward()
    assert balance.num_tokens == 0
    (model(_ids()) + balance.loss()).backward()
    balance.step()
    _window_total(balance, 14)


def test_a_frozen_router_needs_no_gradient():
    model, balance = _attached("loss-free+lbl:coefficient=0.5")
    model.embed.requires_grad_(False)
    model.blocks[0].gate.requires_grad_(False)
    (model(_ids()) + balance.loss()).backward()
    assert model.blocks[0].gate.weight.grad is None and model.blocks[1].gate.weight.grad.any()
    balance.step()
    _window_total(balance, 14)


def test_the_next_forward_before_the_backward_of_the_last():
    """F1 loss F2 loss B2 B1: every factor and count goes to its own micro-batch."""
    strategy = "lbl:scope=micro_batch,coefficient=0.5"
    model, balance = _attached(strategy)
    first = model(_ids()) * 2 + balance.loss() * 2
    second = (model(_ids(seed=1, rows=3)) + balance.loss()) / 8
    second.backward()
    first.backward()
    total = {}
    for seed, rows, factor in ((0, 2, 2.0), (1, 3, 1 / 8)):
        other, other_balance = _attached(strategy)
        ((other(_ids(seed=seed, rows=rows)) + other_balance.loss()) * factor).backward()
        for name, gradient in _gradients(other).items():
            total[name] = total.get(name, 0) + gradient
    _close(_gradients(model), total)


def test_after_a_forgotten_ticket_the_next_window_works():
    model, balance = _attached("loss-free:rate=0.1+lbl:coefficient=0.5")
    with pytest.raises(EquipoiseError, match="must be added"):
        model(_ids()).backward()
    balance.step()
    model.zero_grad()
    expected, other = _attached("loss-free:rate=0.1+lbl:coefficient=0.5", biases=balance.biases)
    (model(_ids(seed=1)) + balance.loss()).backward()
    (expected(_ids(seed=1)) + other.loss()).backward()
    _close(_gradients(model), _gradients(expected), 0)
    balance.step()
    _window_total(balance, 14)


class _Interrupted(Exception):
    pass


@pytest.mark.parametrize("where", ["embed", "blocks.0", "blocks.1"])
@pytest.mark.parametrize("strategy", ["loss-free:rate=0.1", "loss-free:rate=0.1+lbl:coefficient=0.5"])
def test_a_forward_that_failed_can_be_tried_again(strategy, where):
    """Out of memory, caught, and the micro-batch run again with another: a usual loop."""
    model, balance = _attached(strategy)

    def fail(module, args):
        raise _Interrupted

    (model(_ids(seed=2)) + balance.loss()).backward()
    handle = model.get_submodule(where).register_forward_pre_hook(fail)
    with pytest.raises(_Interrupted):
        model(_ids(), MASK)
    handle.remove()
    (model(_ids(seed=1)) + balance.loss()).backward()
    expected, other = _attached(strategy)
    for seed in (2, 1):
        (expected(_ids(seed=seed)) + other.loss()).backward()
    _close(_gradients(model), _gradients(expected))
    balance.step()
    _window_total(balance, 28)


def test_a_forward_that_was_stopped_by_hand_can_be_tried_again():
    """torch calls no hook after a KeyboardInterrupt, as in a notebook."""
    model, balance = _attached("loss-free:rate=0.1+lbl:coefficient=0.5")

    def stop(module, args):
        raise KeyboardInterrupt

    handle = model.blocks[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(_ids(rows=5))
    handle.remove()
    (model(_ids()) + balance.loss()).backward()
    balance.step()
    _window_total(balance, 14)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("strategy", ["loss-free", "lbl"])
def test_a_model_may_write_into_the_weights_of_a_router(strategy, compiled):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.values = equipoise.nn.Router(DIM, EXPERTS, K), nn.Parameter(torch.ones(EXPERTS, DIM))

        def forward(self, x):
            _, weights, expert_ids = self.router(x)
            weights *= 2.5
            return (x * (self.values[expert_ids] * weights[..., None]).sum(-2)).square().mean()

    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x = Scaled(), torch.randn(10, DIM)
    model(x).backward()
    plain = _gradients(model)
    model.zero_grad()
    balance = attach(model, strategy)
    called = torch.compile(model, backend="aot_eager") if compiled else model
    (called(x) + 0 * balance.loss()).backward()
    _close(_gradients(model), plain)


def test_detach_in_the_middle_of_a_window_leaves_a_plain_model():
    model, balance = _attached("loss-free:rate=0.1+lbl")
    loss = model(_ids()) + balance.loss()
    slot = model.blocks[0].gate.e_score_correction_bias.clone()
    balance.detach()
    loss.backward()
    plain = tiny_lm()
    plain(_ids()).backward()
    _close(_gradients(model), _gradients(plain), 0)
    with pytest.raises(EquipoiseError, match="detach"):
        balance.step()
    assert torch.equal(model.blocks[0].gate.e_score_correction_bias, slot)


def test_detaching_twice_is_no_harm_or_says_so():
    model, balance = _attached("loss-free:rate=0.1")
    first = balance.detach()
    try:
        again = balance.detach()
    except EquipoiseError:
        return
    assert all(torch.equal(again[name], first[name]) for name in NAMES)


def test_a_balance_that_was_dropped_still_counts_and_a_model_can_be_freed():
    model, balance = _attached("loss-free:rate=0.1,rule=sign")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    balance.follow(optimizer)
    del balance
    gc.collect()
    model(_ids()).backward()
    optimizer.step()
    assert model.blocks[0].gate.e_score_correction_bias.any()
    import weakref

    gone = weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert gone() is None, "equipoise keeps a model alive"


def test_two_balances_on_two_models_do_not_mix():
    first, balance = _attached("loss-free:rate=0.1+lbl:coefficient=0.5")
    second, other = _attached("loss-free:rate=0.1+lbl:coefficient=0.1", seed=1)
    a, b = first(_ids()), second(_ids(rows=3))
    assert balance.num_tokens == 14 and other.num_tokens == 21
    (a + b + balance.loss() + other.loss()).backward()
    balance.step()
    other.step()
    _window_total(balance, 14)
    _window_total(other, 21)
    _close(_gradients(first), dict(_single("0.5", 0, 2).items()))
    _close(_gradients(second), dict(_single("0.1", 1, 3).items()))


def _single(coefficient, seed, rows):
    model, balance = _attached(f"loss-free:rate=0.1+lbl:coefficient={coefficient}", seed=seed)
    (model(_ids(rows=rows)) + balance.loss()).backward()
    return _gradients(model)


def test_two_balances_on_disjoint_layers_of_a_model():
    model = tiny_lm()
    first = attach(model, "loss-free:rate=0.1+lbl:coefficient=0.5", where=lambda name, router: name == NAMES[0])
    second = attach(model, "lbl:coefficient=0.5", where=lambda name, router: name == NAMES[1])
    assert list(first.load) == NAMES[:1] and list(second.load) == NAMES[1:]
    (model(_ids()) + first.loss() + second.loss()).backward()
    whole, balance = _attached("lbl:coefficient=0.5")
    (whole(_ids()) + balance.loss()).backward()
    _close(_gradients(model), _gradients(whole))
    first.step()
    second.step()
    first.detach()
    model(_ids())
    second.loss()
    second.step()
    assert int(second.load[NAMES[1]].sum()) == K * 14


def test_an_ema_copy_does_not_count():
    model, balance = _attached("loss-free:rate=0.1+lbl")
    average = torch.optim.swa_utils.AveragedModel(model)
    loss = model(_ids()) + balance.loss()
    average.train()
    average(_ids(rows=5)).backward()
    loss.backward()
    average.update_parameters(model)
    balance.step()
    _window_total(balance, 14)
    deepcopy(deepcopy(model))(_ids())
    with pytest.raises(EquipoiseError, match="none was"):
        balance.step()


def test_a_compiled_wrapper_is_unwrapped_and_counts():
    torch._dynamo.reset()
    model = tiny_lm()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    balance = attach(compiled, "loss-free:rate=0.1+lbl:coefficient=0.5")
    assert list(balance.load) == NAMES
    (compiled(_ids(rows=4), attention_mask=torch.ones(4, 7)) + balance.loss()).backward()
    balance.step()
    _window_total(balance, 28)
    _close(_gradients(model), _one_gradient("loss-free:rate=0.1+lbl:coefficient=0.5"))


def test_a_default_device_does_not_reach_the_counts():
    expected = _one_gradient("loss-free:rate=0.1+lbl:coefficient=0.5")
    model, balance = _attached("loss-free:rate=0.1+lbl:coefficient=0.5")
    ids = _ids(rows=4)
    with torch.device("meta"):
        (model(ids) + balance.loss()).backward()
        balance.step()
        metrics = balance.metrics()
    assert metrics["tokens"] == 28
    _close(_gradients(model), expected)


class _Shared(nn.Module):
    """One block used twice: its router is called twice a forward."""

    def __init__(self):
        super().__init__()
        self.inner = tiny_lm()
        self.inner.blocks[1] = self.inner.blocks[0]

    def forward(self, input_ids):
        return self.inner(input_ids)


def test_a_router_shared_by_two_layers_is_one_layer_with_all_its_tokens():
    for strategy in ("loss-free:rate=0.1", "loss-free:rate=0.1+lbl:coefficient=0.5"):
        model = _Shared()
        balance = attach(model, strategy)
        assert list(balance.load) == ["inner.blocks.0.gate"]
        (model(_ids()) + balance.loss()).backward()
        balance.step()
        assert int(balance.load["inner.blocks.0.gate"].sum()) == K * 28


class _Uneven(nn.Module):
    """Layers with different numbers of experts, a dense layer between."""

    def __init__(self):
        super().__init__()
        self.moe = nn.ModuleList([models.family(n, layers=1, experts=e) for n, e in (("qwen3_moe", 8), ("olmoe", 4))])
        self.dense = nn.Linear(2, 2)

    def forward(self, input_ids):
        return sum(m(input_ids, labels=input_ids).loss for m in self.moe)


def test_layers_with_different_numbers_of_experts():
    model = _Uneven()
    balance = attach(model, "loss-free:rate=0.1+lbl:coefficient=0.5")
    ids = _ids() % 29 + 3
    (model(ids) + balance.loss()).backward()
    balance.step()
    assert [len(load) for load in balance.load.values()] == [8, 4]
    assert all(load.sum() == 2 * 14 for load in balance.load.values())
    floors = [equipoise.metrics.sampling_floor(14, 2, e) for e in (8, 4)]
    assert balance.metrics()["maxvio_floor"] == pytest.approx(sum(floors) / 2)
    for name, load in balance.load.items():
        expected = reference.proportional_rule([0.0] * len(load), load.tolist(), 0.1, True)
        assert_close(balance.biases[name], torch.tensor(expected), rtol=0, atol=1e-6)
    state = balance.state_dict()
    balance.load_state_dict(state)


def test_the_inner_model_may_be_called_by_itself_and_its_padding_is_found():
    """A wrapper of one's own (a LightningModule) is attached, its Transformers model is called."""

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = models.family("mixtral")

        def forward(self, batch):
            return self.model(**batch).loss

    ids = _ids() % 29 + 3
    batch = {"input_ids": ids, "attention_mask": MASK, "labels": ids}
    wrapper = Wrapper()
    balance = attach(wrapper, "lbl:scope=sequence")
    (wrapper(batch) + balance.loss()).backward()
    balance.step()
    assert all(load.sum() == 2 * 10 for load in balance.load.values())
    (wrapper.model(**batch).loss + balance.loss()).backward()
    balance.step()
    assert all(load.sum() == 2 * 10 for load in balance.load.values())


# ---- micro-batches, metrics ----


def test_micro_batches_end_with_loss_or_with_a_forward_where_nothing_has_a_loss():
    for strategy in ("none", "loss-free:rate=0.1", "lbl"):
        model, balance = _attached(strategy)
        seen = _recorder(model)
        for seed in range(3):
            loss = model(_ids(seed=seed))
            if strategy == "lbl":
                loss = loss + balance.loss()
            loss.backward()
        balance.step()
        found = balance.metrics()
        expected = [sum(reference.max_violation(_counts([seen[name][i]])) for name in NAMES) / 2 for i in range(3)]
        assert found["maxvio_micro"] == pytest.approx(sum(expected) / 3, rel=1e-9), strategy


def test_metrics_by_hand():
    model, balance = _attached("loss-free:rate=0.1,rule=sign+lbl:scope=micro_batch,coefficient=0.5")
    assert balance.metrics() == {}
    seen = _recorder(model)
    values = []
    for seed in range(2):
        loss = model(_ids(seed=seed), MASK)
        values.append(_expected_loss(seen, {"micro_batch": 1.0}, mask=MASK.reshape(-1).tolist()) / 2)
        (loss + balance.loss()).backward()
    balance.step()
    found = balance.metrics()
    counts = [_counts(seen[name], [MASK.reshape(-1).tolist()] * 2) for name in NAMES]
    expected = {
        "maxvio_batch": sum(map(reference.max_violation, counts)) / 2,
        "maxvio_micro": sum(
            reference.max_violation(_counts([call], [MASK.reshape(-1).tolist()]))
            for name in NAMES
            for call in seen[name]
        )
        / 4,
        "maxvio_floor": reference.sampling_floor(20, K, EXPERTS),
        "min_violation": sum(map(reference.min_violation, counts)) / 2,
        "coefficient_of_variation": sum(map(reference.coefficient_of_variation, counts)) / 2,
        "load_entropy": sum(map(reference.normalised_entropy, counts)) / 2,
        "dead_experts": sum(map(reference.dead_experts, counts)),
        "tokens": 20,
        "load_balancing_loss": sum(values) / 2,
        "collectives": 0,
        "collective_bytes": 0,
        "bias_max": max(float(bias.abs().max()) for bias in balance.biases.values()),
    }
    assert found.keys() == expected.keys()
    assert all(type(value) in (float, int) for value in found.values())
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-5), key
    assert 0.05 < found["bias_max"] < 0.2


def test_metrics_leave_out_what_a_strategy_does_not_have():
    model, balance = _attached("none")
    model(_ids())
    balance.step()
    assert "bias_max" not in balance.metrics() and "load_balancing_loss" not in balance.metrics()


def test_an_empty_micro_batch_does_not_lower_the_metric_of_the_loss():
    found = []
    for masks in ([MASK], [MASK, torch.zeros_like(MASK)]):
        model, balance = _attached("lbl:scope=micro_batch")
        for mask in masks:
            (model(_ids(), mask) + balance.loss()).backward()
        balance.step()
        found.append(balance.metrics()["load_balancing_loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-9)


def test_what_was_given_out_does_not_change_later():
    model, balance = _attached("loss-free:rate=0.1")
    model(_ids())
    balance.step()
    load, biases, state = balance.load, balance.biases, balance.state_dict()
    held = {n: v.clone() for n, v in load.items()}, {n: v.clone() for n, v in biases.items()}
    model(_ids(rows=9))
    balance.step()
    for name in NAMES:
        assert torch.equal(load[name], held[0][name]) and torch.equal(biases[name], held[1][name])
        assert torch.equal(state["biases"][name], held[1][name]) and torch.equal(state["load"][name], held[0][name])
    held = balance.load[NAMES[0]].clone()
    for given in (balance.biases, balance.state_dict()["biases"], balance.state_dict()["load"]):
        given[NAMES[0]].zero_()
    assert balance.biases[NAMES[0]].any() and torch.equal(balance.load[NAMES[0]], held)


# ---- state ----

STATEFUL = "loss-free:rate=0.1+lbl:coefficient=0.5,pooling=previous"


def test_state_resumes_as_if_never_stopped(tmp_path):
    model, balance = _attached(STATEFUL)
    for seed in range(2):
        (model(_ids(seed=seed)) + balance.loss()).backward()
        balance.step()
        model.zero_grad()
    torch.save(balance.state_dict(), tmp_path / "state.pt")
    again, resumed = _attached(STATEFUL)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.metrics()["maxvio_batch"] == balance.metrics()["maxvio_batch"]
    for m, b in ((model, balance), (again, resumed)):
        (m(_ids(seed=5)) + b.loss()).backward()
        b.step()
    _close(_gradients(again), _gradients(model), 0)
    for name in NAMES:
        assert torch.equal(resumed.load[name], balance.load[name])
        assert torch.equal(resumed.biases[name], balance.biases[name])
    assert torch.equal(again.blocks[0].gate.e_score_correction_bias, resumed.biases[NAMES[0]])
    first, second = balance.state_dict(), resumed.state_dict()
    assert first["num_windows"] == second["num_windows"] == 3


def test_a_fresh_state_round_trips():
    _, balance = _attached(STATEFUL)
    _, other = _attached(STATEFUL)
    other.load_state_dict(balance.state_dict())
    assert other.metrics() == {}


def test_state_is_legal_between_windows_only():
    for strategy in ("loss-free", "lbl"):
        model, balance = _attached(strategy)
        state = balance.state_dict()
        model(_ids())
        for call in (balance.state_dict, lambda: balance.load_state_dict(state)):  # noqa: B023
            with pytest.raises(EquipoiseError, match="between windows"):
                call()
        balance.loss()
        with pytest.raises(EquipoiseError, match="between windows"):
            balance.state_dict()
        balance.step()
        balance.load_state_dict(state)


def _damaged(state):
    renamed = {f"x.{name}": value for name, value in state["biases"].items()}
    fewer = {NAMES[0]: state["biases"][NAMES[0]]}
    longer = {name: torch.zeros(EXPERTS + 1) for name in NAMES}
    yield "renamed", state | {"biases": renamed}
    yield "fewer", state | {"biases": fewer}
    yield "longer", state | {"biases": longer}
    yield "last longer", state | {"biases": {**state["biases"], NAMES[1]: torch.zeros(EXPERTS + 2)}}
    yield "wrong load", state | {"load": longer}
    yield "empty", {}
    yield "two-dimensional", state | {"biases": {name: torch.ones(EXPERTS, EXPERTS) for name in NAMES}}
    yield "no number", {key: value for key, value in state.items() if key != "num_windows"}


def test_the_state_of_another_model_is_refused_before_anything_moves():
    model, balance = _attached("loss-free:rate=0.1")
    model(_ids())
    balance.step()
    state = balance.state_dict()
    moved = state | {"biases": {name: bias + 1 for name, bias in state["biases"].items()}}
    for case, wrong in _damaged(moved):
        with pytest.raises(EquipoiseError, match="the state must"):
            balance.load_state_dict(wrong)
        for name in NAMES:
            assert torch.equal(balance.biases[name], state["biases"][name]), case
            assert torch.equal(balance.load[name], state["load"][name]), case


# ---- attach ----

BIASES = {name: torch.linspace(-0.3, 0.3, EXPERTS) * (i + 1) for i, name in enumerate(NAMES)}


@pytest.mark.parametrize("strategy", ["frozen", "loss-free:rate=0.1"])
def test_attach_begins_with_the_biases_that_are_given(strategy, tmp_path):
    from safetensors.torch import save_file

    save_file(BIASES, tmp_path / "equipoise_biases.safetensors")
    for biases in (BIASES, tmp_path, tmp_path / "equipoise_biases.safetensors", str(tmp_path)):
        model, balance = _attached(strategy, biases=biases)
        for name in NAMES:
            assert torch.equal(balance.biases[name], BIASES[name])
        assert torch.equal(model.blocks[0].gate.e_score_correction_bias, BIASES[NAMES[0]])
        model(_ids())
        balance.step()
        moved = [not torch.equal(balance.biases[name], BIASES[name]) for name in NAMES]
        assert moved == [strategy != "frozen"] * 2
        assert torch.equal(BIASES[NAMES[0]], torch.linspace(-0.3, 0.3, EXPERTS)), "the caller's tensor was moved"


@pytest.mark.parametrize("strategy", ["none", "lbl"])
def test_biases_without_a_balancer_that_holds_them_are_refused(strategy):
    with pytest.raises((EquipoiseError, ValueError), match="frozen"):
        _attached(strategy, biases=BIASES)


@pytest.mark.parametrize(
    "biases",
    [
        {},
        {NAMES[0]: torch.zeros(EXPERTS)},
        {name: torch.zeros(EXPERTS + 1) for name in NAMES},
        {**BIASES, "blocks.2.gate": torch.zeros(EXPERTS)},
    ],
    ids=["none", "few", "long", "many"],
)
def test_biases_of_another_model_are_refused(biases):
    with pytest.raises(EquipoiseError, match="biases must name the layers of this model"):
        _attached("frozen", biases=biases)
    with pytest.raises(EquipoiseError, match="biases must be a mapping or a saved file: .* does not exist"):
        _attached("frozen", biases="/nowhere/at/all")


@pytest.mark.parametrize(
    ("balancers", "error", "message"),
    [
        (["los-free"], equipoise.UsageError, "got 'los-free'"),
        (["frozen+loss-free"], ValueError, "one balancer may move the bias: got frozen and loss-free"),
        ([LossFree(), LossFree()], ValueError, "one balancer may move the bias"),
        ([LossFree], TypeError, "object such as LossFree"),
        ([3], TypeError, "got int"),
    ],
    ids=["name", "strategy", "objects", "class", "number"],
)
def test_attach_refuses_bad_balancers(balancers, error, message):
    model = tiny_lm()
    with pytest.raises(error, match=message):
        attach(model, *balancers)
    assert not model._forward_hooks
    attach(model)


def test_a_strategy_that_cannot_be_is_a_usage_error():
    with pytest.raises(equipoise.UsageError, match="one balancer may move the bias"):
        attach(tiny_lm(), "frozen+loss-free")


def test_where_chooses_layers():
    model, balance = _attached("loss-free:rate=0.1", where=lambda name, router: name.startswith("blocks.1"))
    assert list(balance.biases) == NAMES[1:]
    model(_ids())
    balance.step()
    assert not model.blocks[0].gate.e_score_correction_bias.any()
    with pytest.raises(EquipoiseError, match="where must choose at least one router"):
        attach(tiny_lm(), where=lambda name, router: False)


def test_balancers_are_copied_and_may_be_used_again():
    balancer = LossFree(rate=0.1)
    first, one = _attached(balancer)
    second, two = _attached(balancer)
    first(_ids())
    one.step()
    assert not two.biases[NAMES[0]].any() and one.biases[NAMES[0]].any()
    assert vars(balancer) == vars(LossFree(rate=0.1))


def test_without_balancers_it_only_counts():
    model, balance = _attached()
    plain = tiny_lm()
    for _ in range(2):
        model(_ids()).backward()
        plain(_ids()).backward()
        balance.step()
    _close(_gradients(model), _gradients(plain), 0)
    _window_total(balance, 14)
    assert all(not bias.any() for bias in balance.biases.values())


def test_notes_and_repr_say_what_is_attached():
    _, balance = _attached("loss-free:rule=sign+lbl")
    assert any("100 steps" in note for note in balance.notes(100))
    assert repr(balance) == "Balance('loss-free:rule=sign+lbl', 2 layers of 6 experts)"


def test_a_model_of_two_gates_has_the_notes_of_both():
    """The sign rule's note is for the sigmoid layers, also where a softmax layer comes first."""
    model = tiny_lm()
    model.blocks = nn.ModuleList([model.blocks[1], model.blocks[0]])
    assert attach(model, "loss-free").notes(100)


def test_a_state_that_steers_is_refused_where_nothing_holds_its_biases():
    balance = equipoise.attach(tiny_lm(), "frozen", biases=BIASES)
    other = equipoise.attach(tiny_lm(), "lbl")
    with pytest.raises(EquipoiseError, match="biases must have a balancer that holds them"):
        other.load_state_dict(balance.state_dict())
    other.load_state_dict(equipoise.attach(tiny_lm(), "loss-free").state_dict())  # all zero: nothing is lost


def test_attach_wants_a_module():
    with pytest.raises(TypeError, match="must be a torch.nn.Module: got str"):
        equipoise.attach("qwen", "lbl")


def test_where_must_be_a_function():
    with pytest.raises(TypeError, match="where must be a function of .name, router.: got str"):
        equipoise.attach(tiny_lm(), "lbl", where="blocks.0")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", True, torch.ones(2)])
def test_a_loss_scale_that_cannot_be_is_refused(value):
    _, balance = _attached("lbl")
    with pytest.raises(ValueError, match="loss_scale must be a finite number"):
        balance.loss_scale = value
    assert balance.loss_scale is None


@pytest.mark.parametrize("applied", [None, 1.0, "yes", torch.ones(2)])
def test_a_verdict_that_is_none_is_refused_before_the_window_closes(applied):
    model, balance = _attached("loss-free:rate=0.1")
    model(_ids())
    with pytest.raises(ValueError, match="applied must be true, false or a tensor of one number"):
        balance.step(applied)
    balance.step()
    assert any(bias.any() for bias in balance.biases.values())


def test_a_loss_of_the_models_own_beside_ours_is_said(caplog):
    model = models.family("qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.5)
    equipoise.attach(model, "lbl")
    assert "adds a load-balancing loss of its own" in caplog.text


def test_a_backward_under_autocast_gives_the_gradient_of_one_outside():
    found = []
    for under in (False, True):
        model, balance = _attached("lbl:coefficient=1+z:coefficient=1e-2")
        last, logits = model.get_submodule(NAMES[-1]), []  # no other router's gradient comes through its logits
        last.register_forward_hook(lambda module, args, output, logits=logits: logits.append(output[0]))
        loss = 0 * model(_ids()) + balance.loss()
        logits[0].retain_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=under):
            loss.backward()
        found.append(logits[0].grad)
    assert found[0].any() and torch.equal(*found)


class _AnyInput(nn.Module):
    """A text whose router sees every token of it, whatever else the model is called with."""

    def __init__(self):
        super().__init__()
        self.embedding, self.moe = nn.Embedding(64, 16), MoE(16, 8, 6, 2)
        self.prefix = nn.Parameter(torch.zeros(1, 3, 16))

    def forward(self, images, input_ids, attention_mask=None, prefixed=False):
        hidden = self.embedding(input_ids)
        if prefixed:
            hidden = torch.cat([self.prefix.expand(len(input_ids), -1, -1), hidden], 1)
        return self.moe(hidden).sum()


def test_a_mask_is_not_cut_by_what_is_no_length():
    """Channels of an image come first; a prefix of the model's own is in the mask too."""
    model = _AnyInput()
    balance = attach(model, "lbl")
    (model(torch.zeros(2, 3, 8, 8), _ids(), attention_mask=MASK) + balance.loss()).backward()
    balance.step()
    assert balance.metrics()["tokens"] == 10
    longer = torch.cat([torch.ones(2, 3), MASK], 1)
    (model(_ids(), _ids(), attention_mask=longer, prefixed=True) + balance.loss()).backward()
    balance.step()
    assert balance.metrics()["tokens"] == 16


def test_a_square_mask_of_padding_is_one_where_the_rows_are_not_those_of_the_first_tensor():
    model = _AnyInput()
    balance = attach(model, "loss-free")
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]])
    model(torch.zeros(6, 3, 8, 8), _ids(rows=4)[:, :4], attention_mask=mask)
    balance.step()
    assert balance.metrics()["tokens"] == 12


def test_a_mask_of_its_own_has_rows_of_its_own():
    model = _Towers()
    balance = attach(model, "lbl:scope=sequence")
    pixels = torch.randn(3, 2, 16)
    balance.token_mask(torch.tensor([[1, 0], [1, 1], [1, 1]]), where=lambda name: name.startswith("image"))
    (model(_ids(), pixels, attention_mask=MASK) + balance.loss()).backward()
    balance.step()
    assert {name: int(load.sum()) for name, load in balance.load.items()} == {"text.router": 20, "image.router": 10}


def test_a_wrapper_makes_no_mask_clearer():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.encoder, self.decoder = nn.Embedding(64, 16), MoE(16, 8, 6, 2), MoE(16, 8, 6, 2)

        def forward(self, input_ids, attention_mask=None, decoder_input_ids=None, decoder_attention_mask=None):
            encoded, decoded = (self.embedding(ids) for ids in (input_ids, decoder_input_ids))
            return self.encoder(encoded).sum() + self.decoder(decoded).sum()

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Bare()

        def forward(self, *args, **kwargs):
            return self.net(*args, **kwargs)

    for model in (Bare(), Wrapper()):
        balance = attach(model, "loss-free")
        with pytest.raises(EquipoiseError, match="there is a decoder_attention_mask beside it"):
            model(_ids(), MASK, _ids(), torch.ones(2, 7))
        model.eval()
        model(_ids(), MASK, _ids(), torch.ones(2, 7))
        model.train()
        model(_ids(), decoder_input_ids=_ids())
        balance.step()
        assert balance.metrics()["tokens"] == 14


def test_several_layers_of_other_tokens_are_one_warning(caplog):
    class Tower(_Towers):
        def __init__(self):
            super().__init__()
            self.image = nn.Sequential(*(MoE(16, 8, 6, 2) for _ in range(5)))

    model = Tower()
    balance = attach(model, "loss-free")
    with caplog.at_level(logging.WARNING, "equipoise"):
        for _ in range(2):
            model(_ids(), torch.randn(2, 9, 16), attention_mask=MASK)
            balance.step()
    (record,) = caplog.records
    assert "image.0.router, image.1.router, image.2.router ... (5 in all) routes other tokens" in record.message


def test_a_call_without_tokens_is_no_reason_for_a_word(caplog):
    """As of images that a batch does not have, where the block goes through the experts that were chosen."""
    model = _Towers()
    model.image.forward = lambda hidden: sum((w.sum() for w in model.image.router(hidden)[1]), torch.zeros(()))
    balance = attach(model, "lbl")
    with caplog.at_level(logging.WARNING, "equipoise"):
        (model(_ids(), torch.zeros(2, 0, 16)) + balance.loss()).backward()
        balance.step()
    assert not caplog.records

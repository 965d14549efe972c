"""Evaluation, measuring, generation and failures in the middle of a window."""

from contextlib import nullcontext
from copy import deepcopy

import models
import pytest
import torch
from block_net import BATCHES, PADDED_LEFT, PADDED_RIGHT, STRATEGY, block_net, sums
from models import K
from windows import clone_gradients, random_ids

from equipoise import attach


def _evaluate(net, balance):
    net.eval()
    with torch.no_grad():
        net(random_ids(3, 4, 20))
    net.train()


def _evaluate_inference(net, balance):
    net.eval()
    with torch.inference_mode():
        net(random_ids(3, 4, 20), torch.tensor([[0, 1, 1, 1]] * 3))
    net.train()


def _evaluate_backward(net, balance):
    """Computes gradients in evaluation mode, and puts the gradients of the window back."""
    gradients = {name: p.grad for name, p in net.named_parameters()}
    checkpointing, net.checkpointing = net.checkpointing, [None] * 3
    net.zero_grad(set_to_none=True)
    net.eval()
    net(random_ids(3, 4, 20)).backward()
    net.train()
    net.checkpointing = checkpointing
    for name, p in net.named_parameters():
        p.grad = gradients[name]


def _measure(net, balance):
    net.eval()
    with torch.inference_mode(), balance.measuring() as load:
        net(random_ids(3, 4, 20))
    net.train()
    assert [int(x.sum()) for x in load.values()] == [K * 12] * 2


def _measure_in_training_mode(net, balance):
    with torch.no_grad(), balance.measuring() as load:
        net(random_ids(3, 4, 20))
        net(random_ids(1, 4, 21), torch.tensor([[0, 1, 1, 0]]))
    assert [int(x.sum()) for x in load.values()] == [K * 14] * 2


def _pause(net, balance):
    with balance.paused():
        net(random_ids(3, 4, 20))


def _fail(net, balance):
    """An evaluation that fails."""
    net.eval()
    handle = net.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), torch.no_grad():
        net(random_ids(3, 4, 20))
    handle.remove()
    net.train()


def _copy(net, balance):
    copy = deepcopy(net)
    copy(random_ids(3, 4, 20))
    copy.eval()
    copy(random_ids(3, 4, 20))


INTERRUPTIONS = [
    _evaluate,
    _evaluate_inference,
    _evaluate_backward,
    _measure,
    _measure_in_training_mode,
    _pause,
    _fail,
    _copy,
]


def _interrupted_window(net, balance, interrupt, uses_token_mask):
    """Two windows of two micro-batches with ``interrupt`` called at every place where a user may put it."""
    losses = []
    for _ in range(2):
        for number, (ids, mask) in enumerate(BATCHES[1:]):
            interrupt(net, balance)
            if uses_token_mask:
                balance.token_mask(mask)
                interrupt(net, balance)
                loss = net(ids)
            else:
                loss = net(ids, mask)
            interrupt(net, balance)
            tokens = int(balance.num_tokens)
            assert tokens == (8, 12)[number]
            ticket = balance.loss()
            interrupt(net, balance)
            losses.append((loss + ticket).detach())
            ((loss + ticket) / 2).backward()
            interrupt(net, balance)
            assert balance.num_tokens == tokens
        gradients = clone_gradients(net)
        balance.step()
        interrupt(net, balance)
    return losses, gradients, balance.load, balance.biases, balance.metrics(), balance.state_dict()


@pytest.mark.parametrize(
    ("kind", "uses_token_mask"), [(None, False), (None, True), ("non_reentrant", False), ("reentrant", True)]
)
@pytest.mark.parametrize("strategy", [STRATEGY, "quantile+z:coefficient=0.1"], ids=["losses", "quantile"])
@pytest.mark.parametrize("interrupt", INTERRUPTIONS, ids=lambda f: f.__name__.strip("_"))
def test_an_interruption_leaves_a_window_bit_for_bit_the_same(interrupt, strategy, kind, uses_token_mask):
    results = []
    for action in (lambda *_: None, interrupt):
        net = block_net()
        net.embed.weight.data += 5  # all tokens are much alike: no rule takes the load for chance
        net.checkpointing = [kind] * 3
        balance = attach(net, strategy)
        results.append(_interrupted_window(net, balance, action, uses_token_mask))
    (losses, gradients, load, biases, metrics, state), interrupted = results
    assert all(torch.equal(a, b) for a, b in zip(losses, interrupted[0], strict=True))
    for values, interrupted_values in ((gradients, interrupted[1]), (load, interrupted[2]), (biases, interrupted[3])):
        assert values.keys() == interrupted_values.keys()
        assert all(torch.equal(values[name], interrupted_values[name]) for name in values)
    assert strategy == STRATEGY or any(bias.any() for bias in biases.values())
    assert metrics == interrupted[4]
    assert state["num_windows"] == interrupted[5]["num_windows"] == 2
    assert sums(load) == [K * (8 + 12)] * 2


@pytest.mark.parametrize("where", ["measuring", "paused"])
def test_a_token_mask_inside_measuring_or_paused_ends_with_it(where):
    net = block_net()
    balance = attach(net, "loss-free:rate=0.1")
    with torch.no_grad(), balance.measuring() if where == "measuring" else balance.paused() as load:
        balance.token_mask(PADDED_RIGHT)
        net(random_ids())
    if where == "measuring":
        assert sums(load) == [K * 8] * 2
    net(random_ids(), PADDED_LEFT)
    balance.step()
    assert sums(balance.load) == [K * 12] * 2


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_generation_counts_in_training_and_measuring_only(name):
    """Prompts of 3 and 5 tokens in rows of 5, and 4 new tokens for each, the last of which the model never reads."""
    prompt = torch.randint(3, 64, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    read = 3 + 5 + 2 * (4 - 1)
    batch = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    results = []
    for generates in (False, True):
        model = models.family(name)
        balance = attach(model, STRATEGY)

        def generate(model=model, generates=generates):
            if generates:
                text = model.generate(
                    prompt, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=True
                )
                assert text.shape == (2, 9)

        for number in range(2):
            with balance.paused():
                generate()
            loss = model(input_ids=batch, attention_mask=PADDED_RIGHT, labels=batch).loss
            with balance.paused():
                generate()
            model.eval()
            generate()
            model.train(number == 0)
            with balance.measuring() as load:
                generate()
            assert [int(x.sum()) for x in load.values()] == [2 * read * generates] * 2
            model.train()
            (loss + balance.loss()).backward()
        balance.step()
        assert [int(x.sum()) for x in balance.load.values()] == [2 * 2 * 8] * 2
        results.append((clone_gradients(model), balance.load, balance.biases, balance.metrics()))
    for values, generating_values in zip(results[0][:3], results[1][:3], strict=True):
        assert values.keys() == generating_values.keys() and all(
            torch.equal(values[n], generating_values[n]) for n in values
        )
    assert results[0][3] == results[1][3]
    generate()  # in training mode and not paused: without gradients it does not count
    with balance.counting():
        generate()
    balance.step()
    assert [int(x.sum()) for x in balance.load.values()] == [2 * read] * 2


@pytest.mark.parametrize("strategy", ["quantile", "quantile:bins=0", "loss-free:rule=sign,scope=micro_batch"])
def test_a_training_forward_under_inference_mode_is_counted_by_every_mechanism(strategy):
    biases = []
    for surrounding in (torch.inference_mode, nullcontext):
        net = block_net()
        balance = attach(net, strategy)
        with surrounding(), balance.counting():
            net(random_ids())
        net(random_ids(seed=1)).backward()
        balance.step()
        with surrounding(), balance.counting():
            net(random_ids(seed=2))
            balance.step()
        net(random_ids(seed=3))
        balance.step()
        assert sums(balance.load) == [K * 14] * 2
        biases.append(balance.biases)
    assert all(torch.equal(biases[0][name], biases[1][name]) for name in biases[0])

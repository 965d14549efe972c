"""Which router calls and tokens are counted."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from equipoise.balancers import LoadBalancingLoss, LossFree
from equipoise.testing._common import NotApplicable, case, require
from equipoise.testing.routers._compare import require_close_gradients, require_load
from equipoise.testing.routers._subject import (
    Subject,
    count_by_hand,
    count_tokens,
    drain,
    gradients_of,
    run_model,
    scalar_of,
    seeded,
)
from equipoise.testing.routers.loss import require_loss_gradient


def count_each_token_once(subject: Subject) -> None:
    """The load must be what the routers chose in training, each token once. It must hold nothing of evaluations and
    pauses, and of forwards without gradients only those in ``counting()``."""
    model, balance = subject.attached(LossFree(), LoadBalancingLoss())
    calls = subject.record(model)
    expected = {name: torch.zeros_like(load) for name, load in balance.load.items()}
    expected_tokens = 0

    def forward(batch: Mapping[str, Any], counts: bool) -> Tensor:
        nonlocal expected_tokens
        drain(calls)  # a backward may have called the routers again
        _, loss = run_model(model, batch)
        mask = batch.get("attention_mask")
        for name, layer_calls in drain(calls).items() if counts else ():
            require(layer_calls, f"no call of {name}")
            expected[name] += count_by_hand(layer_calls, mask).to(expected[name].device)
            expected_tokens = count_tokens(layer_calls, mask)
        return loss

    loss = forward(subject.batch, True)
    model.eval()
    forward(subject.batch, False)
    with torch.no_grad():
        forward(subject.flipped_batch, False)
    model.train()
    with balance.paused():
        forward(subject.batch, False)
    (loss + balance.loss()).backward()
    with torch.no_grad():
        forward(subject.batch, False)
        with balance.counting():
            forward(subject.flipped_batch, True)
    balance.loss()
    num_tokens = int(balance.num_tokens)
    require(num_tokens == expected_tokens, f"num_tokens {num_tokens} for {expected_tokens} tokens")
    balance.step()
    for name, load in balance.load.items():
        with case(layer=name):
            is_same = torch.equal(load, expected[name])
            require(is_same, f"a load of {load.tolist()}, counted by hand {expected[name].tolist()}")


def do_not_count_recomputation(subject: Subject) -> None:
    """Under activation checkpointing each token must be counted once, and every gradient must be the same up to
    rounding."""
    balancers = (LossFree(), LoadBalancingLoss(0.5, scope="micro_batch"))
    plain, balance = subject.attached(*balancers)
    _, loss = run_model(plain, subject.batch)
    (loss + balance.loss()).backward()
    expected, any_tried = gradients_of(plain), False
    for reentrant in (False, True):
        for run_checkpointed in (_checkpointed_layers, _checkpointed_call):
            kind = run_checkpointed.__name__.removeprefix("_checkpointed_")
            with case(use_reentrant=reentrant, checkpointed=kind):
                try:
                    run_checkpointed(subject.copy(), subject.batch, reentrant).backward()
                except Exception:  # the model itself cannot be checkpointed like this
                    continue
                any_tried = True
                model, balance = subject.attached(*balancers)
                calls = subject.record(model)
                loss = run_checkpointed(model, subject.batch, reentrant)
                forward_calls = drain(calls)
                (loss + balance.loss()).backward()
                require(any(calls.values()), "no recomputation in the backward: nothing can be compared")
                balance.step()
                require_load(balance.load, forward_calls, subject.batch)
                dtypes = [call.logits.dtype for layer_calls in forward_calls.values() for call in layer_calls]
                require_close_gradients(gradients_of(model), expected, dtypes)
    if not any_tried:
        raise NotApplicable


def _checkpointed_layers(model: nn.Module, batch: Mapping[str, Any], reentrant: bool) -> Float[Tensor, ""]:
    """By the model's own switch, as Transformers has it."""
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        if hasattr(model, name):
            getattr(model, name)({"use_reentrant": reentrant})
            return run_model(model, batch)[1]
    raise NotApplicable  # it has no such switch


def _checkpointed_call(model: nn.Module, batch: Mapping[str, Any], reentrant: bool) -> Float[Tensor, ""]:
    """The whole call in one checkpoint."""
    # a reentrant checkpoint must have an input with a gradient
    one = torch.ones((), device=next(model.parameters()).device, requires_grad=True)
    with seeded():
        return checkpoint(lambda leaf: leaf * scalar_of(model(**batch)), one, use_reentrant=reentrant)


def measure_an_evaluation(subject: Subject) -> None:
    """measuring() must count an evaluation, and must leave the open window as it is."""
    model, balance = subject.attached(LossFree())
    calls = subject.record(model)
    with torch.no_grad():
        with balance.counting():
            run_model(model, subject.batch)
        training_calls = drain(calls)
        for training in (False, True):
            with case(training=training):
                with balance.measuring() as load:
                    run_model(model.train(training), subject.batch)
                require(load.keys() == calls.keys(), f"loads of {sorted(load)}, not of {sorted(calls)}")
                require_load(load, drain(calls), subject.batch)
    balance.step()
    with case(of="the open window"):
        require_load(balance.load, training_calls, subject.batch)


def do_not_count_padding(subject: Subject) -> None:
    """Tokens that attention_mask masks must not be counted, and must not change the loss."""
    shape = next((v.shape[:2] for v in subject.batch.values() if isinstance(v, Tensor) and v.dim() >= 2), None)
    takes_mask = "attention_mask" in inspect.signature(subject.model.forward).parameters
    if not takes_mask or shape is None or shape[1] < 4:
        raise NotApplicable
    mask = torch.ones(shape, dtype=torch.int64, device=next(subject.model.parameters()).device)
    mask[0, : shape[1] // 4] = 0
    mask[-1, -(shape[1] // 3) :] = 0
    batch = {**subject.batch, "attention_mask": mask}
    model, balance = subject.attached(LossFree(), LoadBalancingLoss(scope="sequence"))
    recorded = subject.record(model)
    with case(attention_mask=f"with {int((mask == 0).sum())} zeros"):
        _, loss = run_model(model, batch)
        calls = drain(recorded)
        (loss + balance.loss()).backward()
        for layer_calls in calls.values():
            num_tokens, expected = int(balance.num_tokens), count_tokens(layer_calls, mask)
            require(num_tokens == expected, f"num_tokens {num_tokens}, not {expected}")
        balance.step()
        require_load(balance.load, calls, batch)
        all_calls = [call for layer_calls in calls.values() for call in layer_calls]
        if all(call.has_graph and not call.chooses_all_experts for call in all_calls):
            require_loss_gradient(subject, batch, {**subject.flipped_batch, "attention_mask": mask.flip(1)})

"""Copies, pickles, state dicts and casts of an attached model."""

import io
from copy import deepcopy

import torch
from torch import Tensor, nn

from equipoise.balance import Balance
from equipoise.balancers import Frozen, LoadBalancingLoss, LossFree
from equipoise.testing._common import NotApplicable, case, require
from equipoise.testing.routers._compare import require_best_experts, require_load, require_same_bits
from equipoise.testing.routers._subject import Subject, drain, run_model, scalar_of, tensors_of


def are_independent(subject: Subject) -> None:
    """A deepcopy must route by the biases that it was copied with and by its own weights, and must never be
    counted."""
    model, balance = subject.attached(
        LossFree(0.1, rule="sign"), LoadBalancingLoss(), biases=subject.random_biases(1.0)
    )
    _require_independent_copy(subject, model, balance, deepcopy(model))


def survive_a_pickle(subject: Subject) -> None:
    """The model that torch.save and torch.load bring back must be a copy like any other."""
    try:
        _save_and_load(subject.copy())
    except Exception:  # the model itself cannot be pickled
        raise NotApplicable from None
    model, balance = subject.attached(
        LossFree(0.1, rule="sign"), LoadBalancingLoss(), biases=subject.random_biases(1.0)
    )
    _require_independent_copy(subject, model, balance, _save_and_load(model))


def _save_and_load(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _require_independent_copy(subject: Subject, model: nn.Module, balance: Balance, copy: nn.Module) -> None:
    """``copy`` is steered as ``model`` was, is counted nowhere, and runs with its own weights and biases."""
    keys, model_keys = list(copy.state_dict()), list(model.state_dict())
    require(keys == model_keys, f"state-dict keys {set(keys) ^ set(model_keys)} on one side only")
    with torch.no_grad(), balance.counting():
        calls = subject.record(model)
        expected, _ = run_model(model, subject.batch)
        model_calls = drain(calls)
        output, _ = run_model(copy, subject.batch)
        require_same_bits(tensors_of(output), tensors_of(expected), "output of the copy")
    run_model(copy, subject.batch)[1].backward()  # a copy has no losses, so it needs no call of loss()
    balance.loss()
    balance.step()
    with case(of="the model, after calls of its copy"):
        require_load(balance.load, model_calls, subject.batch)
    with torch.no_grad():
        output, _ = run_model(copy, subject.batch)
        with case(after="a step of the model"):
            require_same_bits(tensors_of(output), tensors_of(expected), "output of the copy")
        expected, _ = run_model(model, subject.batch)
        for router, _ in subject.routers(copy).values():
            for parameter in router.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).to(parameter))
        changed_output, _ = run_model(copy, subject.batch)
        with case(after="a change of the weights of the copy's routers"):
            is_same = torch.equal(scalar_of(changed_output), scalar_of(output))
            require(not is_same, "the same output of the copy: it runs with the weights of the model")
            model_output, _ = run_model(model, subject.batch)
            require_same_bits(tensors_of(model_output), tensors_of(expected), "output of the model")


def share_the_state_dict(subject: Subject) -> None:
    """The state dict must have the keys of the plain model, and the plain model's state dict must load."""
    plain = subject.copy()
    model, _ = subject.attached(LossFree(), LoadBalancingLoss())
    state, expected = model.state_dict(), plain.state_dict()
    require(list(state) == list(expected), f"keys {sorted(state.keys() ^ expected.keys())} on one side only")
    for name in state:
        if isinstance(state[name], Tensor):
            require_same_bits([state[name].to(expected[name].dtype)], [expected[name]], name)
    model.load_state_dict(expected)
    names = [name for name, _ in model.named_parameters()]
    require(names == [name for name, _ in plain.named_parameters()], "other names of parameters")


def keep_float32_biases(subject: Subject) -> None:
    """A model that is cast to bfloat16 must still be steered by the float32 biases."""
    plain = subject.copy().to(torch.bfloat16)
    try:
        with torch.no_grad():
            run_model(plain, subject.batch)
    except Exception:  # the model itself cannot run in bfloat16
        raise NotApplicable from None
    biases = {name: 64 + bias for name, bias in subject.random_biases(1.0).items()}  # bfloat16 loses the differences
    model, balance = subject.attached(Frozen(), biases=biases)
    model.to(torch.bfloat16)
    calls = subject.record(model)
    with torch.no_grad():
        run_model(model, subject.batch)
    for name, (router, kind) in subject.routers(model).items():
        with case(layer=name):
            require_same_bits([balance.biases[name].cpu()], [biases[name]], "Balance.biases")
            require_best_experts(calls[name][-1], router, kind, biases[name], False)

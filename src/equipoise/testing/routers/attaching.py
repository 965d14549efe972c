"""``attach`` happens once, and ``detach`` undoes it."""

from copy import deepcopy

import torch

from equipoise.attachment import attach
from equipoise.balancers import LoadBalancingLoss, LossFree
from equipoise.errors import EquipoiseError
from equipoise.routers.find import find_routers
from equipoise.testing._common import case, fail, require
from equipoise.testing.routers._compare import require_load, require_same_bits
from equipoise.testing.routers._subject import Subject, run_model, tensors_of


def happens_once(subject: Subject) -> None:
    """A second attach must be refused and leave the first as it is; a copy must be accepted."""
    model, balance = subject.attached(LossFree(0.1, rule="sign"))
    try:
        attach(model, LossFree(), where=subject.where)
    except EquipoiseError:
        pass
    else:
        fail("a second Balance of the same routers")
    copy_balance = attach(deepcopy(model), LossFree(), where=subject.where)
    calls = subject.record(model)
    with torch.no_grad(), balance.counting():
        run_model(model, subject.batch)
    balance.step()
    require_load(balance.load, calls, subject.batch)
    require(
        not any(load.any() for load in copy_balance.load.values()), "counts of the model in the Balance of its copy"
    )


def is_undone_by_detach(subject: Subject) -> None:
    """detach() must restore classes, buffers, hooks, keys and outputs; the model's own slot must keep the biases."""
    plain = subject.copy()
    model, balance = subject.attached(
        LossFree(0.1, rule="sign"), LoadBalancingLoss(), biases=subject.random_biases(1.0)
    )
    _, loss = run_model(model, subject.batch)
    (loss + balance.loss()).backward()
    balance.step()
    biases = balance.detach()
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    for (name, module), plain_module in zip(model.named_modules(), plain.modules(), strict=True):
        with case(module=name or "the model"):
            require(type(module) is type(plain_module), f"a {type(module)}, not a {type(plain_module)}")
            only_one_side = sorted(vars(module).keys() ^ vars(plain_module).keys())
            require(not only_one_side, f"attributes {only_one_side} on one side only")
            same_buffers = module._buffers.keys() == plain_module._buffers.keys()
            require(same_buffers, f"buffers {sorted(module._buffers)}, not {sorted(plain_module._buffers)}")
            for kind in hooks:
                same_number = len(getattr(module, kind)) == len(getattr(plain_module, kind))
                require(same_number, f"{kind[1:]} that were left")
    require(list(model.state_dict()) == list(plain.state_dict()), "other state-dict keys")
    for layer in find_routers(plain):
        if layer.slot is not None and layer.name in biases:
            layer.slot.replace(biases[layer.name])
    with torch.no_grad():
        outputs, plain_outputs = (tensors_of(run_model(m, subject.batch)[0]) for m in (model, plain))
        require_same_bits(outputs, plain_outputs, "output")

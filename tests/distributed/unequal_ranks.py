"""What ranks do in ``test_window.py``; in a module of its own, so that other processes can import it."""

import torch
from models import family

import equipoise
from equipoise.errors import EquipoiseError


def _said(function, *args):
    try:
        return function(*args)
    except EquipoiseError as error:
        return str(error)


def _window(rank, counts, strategy="lbl+loss-free"):
    model = family("glm4_moe", layers=1)
    balance = equipoise.attach(model, strategy)
    for seed in range(counts[rank]):
        ids = torch.randint(0, 16, (2, 8), generator=torch.Generator().manual_seed(seed))
        (model(input_ids=ids).logits.mean() + balance.loss()).backward()
    balance.step()
    return "went on"


def _unequal_start(rank):
    model = family("glm4_moe", layers=1)
    (slot,) = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    slot.fill_(rank)
    equipoise.attach(model, "loss-free")
    return "went on"


def _of_others(rank):
    group = torch.distributed.new_group([0])
    balance = _said(lambda: equipoise.attach(family("glm4_moe", layers=1), "none", group=group))
    return balance if isinstance(balance, str) else "went on"


def everything(rank):
    found = {counts: _said(_window, rank, counts) for counts in ((2, 2), (2, 3), (3, 2), (1, 0), (0, 2))}
    for strategy in ("lbl+quantile", "lbl+loss-free:rule=sign,scope=micro_batch"):  # statistics besides the counts
        found[strategy] = _said(_window, rank, (2, 3), strategy)
    return {**found, "start": _said(_unequal_start, rank), "others": _of_others(rank)}

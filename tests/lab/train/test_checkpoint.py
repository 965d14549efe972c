"""Checkpoints: what they hold, and that a foreign one neither runs code nor is loaded where it does not fit."""

import copy
import json
import math
import pickle
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from equipoise.errors import EquipoiseError
from equipoise_lab.train import checkpoint
from equipoise_lab.train.loop import train


class _Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def _files(folder):
    return [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]


@pytest.fixture
def interrupted(tiny, new_watcher):
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), new_watcher(stop_after=6))
    return tiny().out


def test_a_pickle_in_place_of_any_file_of_a_run_never_runs(tiny, new_watcher, interrupted, tmp_path):
    """And with the ``.metadata`` of a former checkpoint, whose reader unpickled it."""
    marker = tmp_path / "the pickle ran"
    hostile = pickle.dumps(_Touch(marker))
    pickle.loads(hostile)
    assert marker.exists(), "the pickle does nothing, so the test shows nothing"
    marker.unlink()
    names = [path for path in _files(interrupted) if path.name != "run.yaml"]  # a copy for people: it is not read
    assert {"config.json", "steps.jsonl", "loads.jsonl", "state.safetensors", "facts.json"} <= {p.name for p in names}
    metadata = Path("checkpoints", "step-00000005", ".metadata")
    for name in [*names, metadata]:
        folder = shutil.copytree(interrupted, tmp_path / "foreign")
        (folder / name).write_bytes(hostile)
        if name == metadata:
            (folder / name.parent / "state.safetensors").unlink()
        watcher = new_watcher()
        with pytest.raises(EquipoiseError, match=re.escape(name.name)):
            train(tiny(out=folder, resume=True), watcher)
        assert not marker.exists(), name
        shutil.rmtree(folder)


def test_a_checkpoint_of_a_former_version_is_named_as_such(tiny, new_watcher, interrupted):
    newest = interrupted / "checkpoints" / "step-00000005"
    (newest / "state.safetensors").rename(newest / "__0_0.distcp")
    (newest / ".metadata").write_bytes(b"")
    with pytest.raises(EquipoiseError, match=r"\.metadata is a pickle, .*continue with the version of equipoise that"):
        train(tiny(resume=True), new_watcher())


class _Tied(nn.Module):
    """Two names for one weight, and a transposed view."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 6, bias=False)
        self.head = nn.Linear(8, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("turned", torch.arange(6.0).view(2, 3).T)


def _state():
    return {
        "model": _Tied().state_dict(),
        "optimizer": {"param_groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.95), "params": ["a", "b"], "fused": None}]},
        "balance": {"strategy": "lbl", "num_windows": 3, "rate": math.inf, "load": {"gate": torch.tensor([2**60, 1])}},
        "random": torch.get_rng_state(),
    }


def _equal(first, second):
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return type(first) is type(second) and all(map(_equal, first, second))
    return type(first) is type(second) and first == second


def test_a_state_reads_back_exactly(tmp_path):
    """Tied and transposed weights, tuples, None, infinity and integers above 2^53 too."""
    state = _state()
    checkpoint._write(tmp_path, 7, state)
    empty = copy.deepcopy(state)
    for tensor in (*empty["model"].values(), empty["balance"]["load"]["gate"], empty["random"]):
        tensor.zero_()
    empty["balance"] |= {"num_windows": 0, "rate": 0.0}
    facts, balance, random = checkpoint._read(tmp_path / "step-00000007", empty, None)
    assert facts["step"] == 7 and _equal(empty, state)
    assert balance is empty["balance"] and random is empty["random"]


def _widen(state):
    state["model"]["embed.weight"] = torch.zeros(7, 8)


def _halve(state):
    state["model"]["embed.weight"] = state["model"]["embed.weight"].bfloat16()


def _rename(state):
    state["model"]["other"] = state["model"].pop("turned")


def _name_a_number(state):
    state["optimizer"]["param_groups"][0]["lr"] = "0.3"


def _shorten(state):
    state["optimizer"]["param_groups"][0]["params"] = ["a"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_widen, r"/model/embed.weight must be \(torch.float32, \(6, 8\)\): got \(torch.float32, \(7, 8\)\)"),
        (_halve, "/model/embed.weight must be .*got .*bfloat16"),
        (_rename, "it has no /model/turned"),
        (lambda state: state["model"].update(more=torch.ones(1)), "the model has no /model/more"),
        (_name_a_number, "/optimizer/param_groups/0/lr must be float: got str"),
        (_shorten, "it has no /optimizer/param_groups/0/params/1"),
        (lambda state: state.update(random=torch.zeros_like(state["random"])), "Invalid mt19937 state"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_changed(tmp_path, change, reason):
    """Its digest is right: somebody made it so."""
    state = _state()
    change(state)
    checkpoint._write(tmp_path, 7, state)
    template, said = _state(), []
    before = copy.deepcopy(template)
    assert re.search(reason, checkpoint._read(tmp_path / "step-00000007", template, said.append))
    assert re.search(reason, said[0]) and "step-00000007" in said[0]
    assert "mt19937" in reason or _equal(template, before)


def test_a_checkpoint_holds_safetensors_and_json_only(tiny, interrupted):
    newest = interrupted / "checkpoints" / "step-00000005"
    assert [path.name for path in _files(newest)] == ["facts.json", "state.safetensors"]
    assert json.loads((newest / "facts.json").read_text())["step"] == 5
    assert "/random" in safetensors.torch.load_file(newest / "state.safetensors")

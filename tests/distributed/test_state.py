"""A state is saved on one number of ranks and taken up on another: what follows is what one process that never stopped
would have done.

On a CPU Accelerate makes DDP of a model that it is told to shard with FSDP2 (1.15), so FSDP2 is tested with
``torch.distributed.checkpoint`` alone.
"""

import warnings
from typing import NamedTuple

import pytest
import state_ranks
import torch
import torch.distributed.checkpoint as dcp
from ranks import run_on_ranks
from state_ranks import ACCELERATED, MICRO_BATCHES, OVERFLOWS, SAVED, STRATEGIES, WINDOWS, Training
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.testing import assert_close

import equipoise
from equipoise.errors import EquipoiseError

pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.slow]

REFUSALS = {  # which part of each message must be the same on every rank
    "other names": "its biases have blocks.third.moe.router [(6,)], blocks.fourth.moe.router [(8,)], this model has "
    "blocks.first.moe.router [(6,)], blocks.second.moe.router [(8,)]. Load the state that was saved",
    "other names on one rank": "on rank 1 of the group, EquipoiseError: the state must be of a model with the same "
    "layers: its biases have blocks.third.moe.router",
    "other names of the counts on one rank": "on rank 1 of the group, EquipoiseError: the state must be of a model "
    "with the same layers: its load have blocks.third.moe.router",
    "older on one rank": "rank 0 of the group has one after 2 windows, rank 1 one after 1, and they differ in biases, "
    "load, num_windows, state. Load the same checkpoint",
    "other biases on one rank": "rank 0 of the group has one after 2 windows, rank 1 one after 2, and they differ in "
    "biases. Load",
    "nothing on one rank": "on rank 1 of the group, EquipoiseError: the state must be what state_dict() gave: got "
    "NoneType",
    "a factor": "biases that are added and biases that multiply cannot take each other's place: the state is of "
    "loss-free:rate=0.05,rule=multiplicative, this Balance has loss-free:rate=0.05,rule=momentum",
    "checkpoint of other names": "Missing key in checkpoint state_dict: balance.biases.blocks.first.moe.router",
}


class Found(NamedTuple):
    """What came out on each rank, by number of ranks; ``one`` and ``alone`` by strategy, in this process."""

    alone: dict  # trained without a stop
    one: dict  # the state that was saved in one process
    went_on: dict  # what went on in one process after four ranks
    four: list
    two: list
    single: list


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    torch.set_num_threads(1)  # as every test does, but this comes before one
    folder = tmp_path_factory.mktemp("state")
    alone = {name: Training(strategy).train(range(WINDOWS)) for name, strategy in STRATEGIES.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        one = state_ranks.begin(0, folder / "one", "none", 1)
        state_ranks.other_names(folder / "other names")
        four = run_on_ranks(4, state_ranks.on_four, folder)
        assert not any(isinstance(rank, str) for rank in four), four
        went_on = state_ranks.go_on(0, folder / "four", "none", 1)
    two = run_on_ranks(2, state_ranks.on_two, folder)
    single = run_on_ranks(1, state_ranks.on_one, folder)
    assert not any(isinstance(rank, str) for rank in two + single), two + single
    return Found(alone, one, went_on, four, two, single)


def assert_same_state(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert_same_state(value, theirs[key])
    elif isinstance(ours, tuple):
        assert_same_state(dict(enumerate(ours)), dict(enumerate(theirs)))
    elif isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    else:
        assert ours == theirs


def assert_same_progress(ours, theirs, windows):
    assert list(ours.windows) == list(windows)
    for window in windows:
        for (name, load), bias in zip(ours.windows[window][0].items(), ours.windows[window][1].values(), strict=True):
            assert load.dtype == torch.int64
            assert torch.equal(load, theirs.windows[window][0][name])
            assert_close(bias, theirs.windows[window][1][name], rtol=0, atol=1e-12)
    assert_close(ours.parameters, theirs.parameters, rtol=0, atol=1e-12)  # float64, sums in another order


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_state_is_the_same_on_every_rank_and_on_any_number_of_ranks(found, strategy):
    kept = found.one[strategy]
    assert kept["num_windows"] == SAVED
    assert all(bias.any() for bias in kept["biases"].values())
    assert list(kept["state"]) == (["momentum"] if strategy == "momentum" else [])
    for rank in found.four:
        assert_same_state(rank[strategy], kept)
    for source in ("four", "one"):
        for wrapper in ("ddp", "fsdp2"):
            (loaded, _, last), (other, _, other_last) = (rank[source, wrapper][strategy] for rank in found.two)
            assert_same_state(loaded, kept)
            assert_same_state(other, kept)
            assert_same_state(last, other_last)
            assert last["num_windows"] == WINDOWS


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.parametrize("source", ["four", "one"])
def test_two_ranks_go_on_as_one_process_that_never_stopped(found, source, wrapper, strategy):
    for rank in found.two:
        assert_same_progress(rank[source, wrapper][strategy][1], found.alone[strategy], range(SAVED, WINDOWS))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_process_goes_on_after_four_ranks(found, strategy):
    loaded, progress, last = found.went_on[strategy]
    assert_same_state(loaded, found.one[strategy])
    assert_same_progress(progress, found.alone[strategy], range(SAVED, WINDOWS))
    assert last["num_windows"] == WINDOWS


def test_pipeline_stages_share_a_checkpoint(found):
    """What it holds once, for all ranks, holds for a stage without routers too."""
    for rank, (before, after) in enumerate(result["stages"] for result in found.two):
        assert_same_state(after, before)
        assert (after["num_windows"], len(after["biases"])) == (1, 2 * rank)


def test_accelerate_saves_on_two_ranks_and_goes_on_on_one_or_two(found):
    alone, half = Training(ACCELERATED), Training(ACCELERATED)
    before = half.train(range(SAVED), OVERFLOWS)
    after = alone.train(range(WINDOWS), OVERFLOWS)
    for rank in found.two:
        assert_same_progress(rank["accelerate begins"][1], before, range(SAVED))
    for rank in found.two + found.single:
        loaded, progress = rank["accelerate goes on"]
        assert_same_state(loaded, half.balance.state_dict())
        assert_same_progress(progress, after, range(SAVED, WINDOWS))


def test_accelerate_tells_a_step_that_was_skipped(found):
    """The window that overflowed is counted, and its step moves nothing."""
    for rank in found.two:
        (_, begins), (loaded, goes_on) = rank["accelerate begins"], rank["accelerate goes on"]
        assert loaded["num_windows"] == SAVED
        windows = begins.windows | goes_on.windows
        for window in range(1, WINDOWS):
            for name, bias in windows[window][1].items():
                assert torch.equal(bias, windows[window - 1][1][name]) == (window in OVERFLOWS)
                assert not torch.equal(windows[window][0][name], windows[window - 1][0][name])
                tokens = MICRO_BATCHES * state_ranks.ROWS * state_ranks.LENGTH
                assert windows[window][0][name].sum() == 2 * tokens


@pytest.mark.parametrize("name", REFUSALS)
def test_a_state_that_cannot_be_taken_is_refused_on_every_rank_and_moves_nothing(found, name):
    for rank in found.two:
        refused = rank["refused"][name]
        assert refused.kind == ("CheckpointException" if name == "checkpoint of other names" else "EquipoiseError")
        assert REFUSALS[name] in refused.text
        assert_same_state(refused.after, refused.before)
        assert all(bias.any() for bias in refused.after["balance"]["biases"].values())
    assert found.two[0]["refused"].keys() == REFUSALS.keys()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_what_a_checkpoint_lacks_begins_at_zero_where_it_may(tmp_path):
    """A checkpoint without momenta is read where the planner is told that parts may be missing."""
    without = Training("loss-free:rule=sign,rate=0.05")
    without.train(range(2))
    dcp.save({"balance": without.balance}, checkpoint_id=tmp_path, no_dist=True)
    balance = equipoise.attach(state_ranks.lm(), STRATEGIES["momentum"])
    planner = DefaultLoadPlanner(allow_partial_load=True)
    dcp.load({"balance": balance}, checkpoint_id=tmp_path, planner=planner, no_dist=True)
    state, expected = balance.state_dict(), without.balance.state_dict()
    for part in ("biases", "load", "num_windows"):
        assert_same_state(state[part], expected[part])
    assert not any(momentum.any() for momentum in state["state"]["momentum"].values())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_state_that_was_saved_within_a_window_is_loaded_between_two(tmp_path):
    training = Training(STRATEGIES["momentum"])
    training.train(range(1))
    state = training.balance.state_dict()
    training.model(state_ranks.micro_batch(0, 0))
    dcp.save({"balance": training.balance}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(EquipoiseError, match="between windows"):
        dcp.load({"balance": training.balance}, checkpoint_id=tmp_path, no_dist=True)
    resumed = equipoise.attach(state_ranks.lm(), STRATEGIES["momentum"])
    dcp.load({"balance": resumed}, checkpoint_id=tmp_path, no_dist=True)
    for part in ("biases", "load", "num_windows"):
        assert_same_state(resumed.state_dict()[part], state[part])


def test_one_rank_may_take_a_state_while_counts_travel(found):
    """Rank 0 alone does, after each micro-batch, before the backward waits for its collective. All else is the same."""
    micro_batches = MICRO_BATCHES // 2
    for rank, (disturbed, undisturbed, within, before) in enumerate(result["within"] for result in found.two):
        assert_same_state(tuple(disturbed), tuple(undisturbed))
        assert len(within) == (0 if rank else SAVED * micro_batches)
        for number, state in enumerate(within):
            assert_same_state(state, before[number // micro_batches])

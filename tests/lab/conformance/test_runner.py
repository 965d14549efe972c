"""The runner and its command: verdicts, processes that end or hang, what is printed."""

import json
import queue
from types import SimpleNamespace

import pytest

from equipoise.errors import UsageError
from equipoise_lab.cli import main
from equipoise_lab.conformance import NotOffered, NotTried, Refuses, run, runner
from equipoise_lab.conformance.drivers.equipoise import Equipoise
from equipoise_lab.conformance.runner import ask
from equipoise_lab.conformance.scenarios import SCENARIOS


@pytest.mark.parametrize(
    ("failure", "kind", "words"),
    [
        (NotOffered("a loss"), "does not have it", "a loss"),
        (Refuses("k must be 1"), "refuses", "k must be 1"),
        (NotTried("needs a GPU"), "not tried", "needs a GPU"),
        (ValueError("shapes differ\nmore"), "wrong", "ValueError: shapes differ"),
    ],
)
def test_what_a_driver_raises_is_a_verdict(monkeypatch, failure, kind, words):
    def raises(self, layer):
        raise failure

    monkeypatch.setattr(Equipoise, "__init__", raises)
    verdict = ask("equipoise", "loss-gradient")
    assert (verdict.kind, verdict.got) == (kind, words)


def test_processes_give_the_verdicts_in_order():
    names = ["bias-two-ranks", "loss-gradient", "loss-at-balance"]
    seen = []
    verdicts = run("equipoise", names, seen.append)
    assert [verdict.scenario for verdict in verdicts] == names
    assert {verdict.kind for verdict in verdicts} == {"right"}
    assert sorted(verdict.scenario for verdict in seen) == sorted(names)


def test_a_process_that_ends_is_wrong_and_the_others_go_on():
    first, second = run("lab.conformance.broken:EndsUnderASigmoid", ["loss-gradient-sigmoid", "loss-gradient"])
    assert (first.kind, second.kind) == ("wrong", "right")
    assert "ended without an answer: a last word" in first.got


def test_ranks_that_wait_for_each_other(monkeypatch):
    monkeypatch.setattr(runner, "LIMIT", 0)
    running = SimpleNamespace(exitcode=None)
    (words,) = runner._answers(queue.Queue(), 1, [running], "")
    assert words == "no answer in 0 seconds: the ranks wait for each other"


def test_a_framework_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(runner.FRAMEWORKS, "torchtitan", "nothing_of_this_name:X")
    with pytest.raises(UsageError, match="torchtitan must be installed in this environment"):
        run("torchtitan", ["loss-gradient"])


def test_an_unknown_framework_gets_the_nearest_name():
    with pytest.raises(
        UsageError, match="must be one of equipoise, megatron, .*: got 'megatorn'. Did you mean megatron?"
    ):
        run("megatorn", ["loss-gradient"])


def test_the_command_shows_one_scenario_with_its_reason(capsys):
    main(["conformance", "equipoise", "loss-at-balance"])
    out = capsys.readouterr().out
    assert "What is the loss if the load is even?" in out
    assert "right:     1\n" in out
    assert "why:       All experts have f = 1/8" in out


def test_the_command_lists_the_scenarios(capsys):
    main(["conformance"])
    out, err = capsys.readouterr()
    assert "global-batch-uneven" in out
    assert f"{len(SCENARIOS)} scenarios" in err


def test_the_command_prints_json(capsys):
    main(["conformance", "equipoise", "loss-at-balance", "--json"])
    (verdict,) = json.loads(capsys.readouterr().out)
    assert verdict["kind"] == "right"


def test_a_wrong_answer_is_exit_code_1(capsys, monkeypatch):
    wrong = runner.Verdict("equipoise", "1", "loss-at-balance", "wrong", "1", "2", 1.0, 0.0)
    monkeypatch.setattr("equipoise_lab.conformance.run", lambda *arguments: [wrong])
    with pytest.raises(SystemExit) as stop:
        main(["conformance", "equipoise", "loss-at-balance"])
    assert stop.value.code == 1
    assert "got:       2" in capsys.readouterr().out


def test_an_unknown_scenario_is_told_the_nearest(error_of):
    assert "Did you mean loss-at-balance?" in error_of(["conformance", "equipoise", "los-at-balance"], 2)

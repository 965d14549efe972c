"""Alerts: on loads whose answer is known, on chance, and where they are said."""

import math

import pytest
import torch

import equipoise
from equipoise.alerts import EXPECTED, PATIENCE, STILL_BUSY, Alerts

EVEN = torch.full((8,), 100)


def told(alerts, loads, **more):
    """(number of the window from 1, kind, over) of every alert."""
    return [
        (number, alert.kind, alert.over)
        for number, load in enumerate(loads, start=1)
        for alert in alerts.see({"a": load, "b": EVEN}, **more)
    ]


def test_a_collapse_is_said_once_and_its_end_once():
    collapsed = torch.tensor([300, 300, 100, 100, 0, 0, 1, 1])  # 3.6 effective experts of 8
    assert equipoise.effective_experts(collapsed) < 4
    loads = [EVEN] * 5 + [collapsed] * 60 + [EVEN] * 40
    found = [one for one in told(Alerts(steers=False), loads) if one[1] == "collapse"]
    assert found == [(5 + PATIENCE, "collapse", False), (65 + PATIENCE, "collapse", True)]


def test_a_collapse_that_does_not_last_is_not_said():
    collapsed = torch.tensor([800, 0, 0, 0, 0, 0, 0, 0])
    loads = ([collapsed] * (PATIENCE - 1) + [EVEN]) * 5
    assert [one for one in told(Alerts(steers=False), loads) if one[1] == "collapse"] == []


def test_an_alert_that_comes_and_goes_is_not_said_again():
    collapsed = torch.tensor([800, 0, 0, 0, 0, 0, 0, 0])
    loads = [collapsed] * 30 + ([EVEN] * (PATIENCE - 1) + [collapsed]) * 5
    assert [one for one in told(Alerts(steers=False), loads) if one[1] == "collapse"] == [(PATIENCE, "collapse", False)]


@pytest.mark.parametrize(("size", "when"), [(100, PATIENCE), (2, math.ceil(EXPECTED / (14 / 8)))])
def test_a_dead_expert_is_named_when_chance_cannot_be_it(size, when):
    """An even share of small windows is 14 / 8 assignments: 58 windows until it would have been 100."""
    load = torch.tensor([size] * 7 + [0])
    alerts = Alerts()
    assert told(alerts, [load] * when)[-1:] == [(when, "dead experts", False)]
    assert alerts.holding == {"dead experts": ["a"]}
    alerts = Alerts()
    said = [alert for _ in range(when) for alert in alerts.see({"a": load})]
    assert len(said) == 1 and "a: 7 (of 8) got no token" in str(said[0]) and said[0].layers == ("a",)


def test_a_rate_is_slow_where_an_expert_stays_busy():
    load = torch.tensor([350] + [100] * 7)
    assert told(Alerts(num_steps=60), [load] * 60) == [(STILL_BUSY, "slow rate", False)]
    alerts = Alerts(num_steps=60)
    text = next(str(alert) for _ in range(60) for alert in alerts.see({"a": load}))
    assert "and 10 steps are left: a: 0 (of 8, MaxVio 1.7)." in text
    assert told(Alerts(steers=False), [load] * 60) == []
    broken = [load] * (STILL_BUSY - 1) + [EVEN]
    assert told(Alerts(), broken * 2) == []


def test_what_is_not_finite_is_said():
    alerts = Alerts()
    (alert,) = alerts.see({"a": EVEN}, loss=math.nan)
    assert alert.kind == "nan" and "not finite: the loss." in str(alert)
    (alert,) = Alerts().see({"a": EVEN}, loss=1.0, offsets={"a": torch.tensor([0.0, math.inf])})
    assert alert.layers == ("a",) and "the offset of a" in str(alert)


def test_chance_raises_no_alarm():
    """2,000 windows of a router that chooses evenly, with loads of 8 a window and expert."""
    generator = torch.Generator().manual_seed(0)
    alerts = Alerts()
    for _ in range(2000):
        counts = torch.randint(64, (512,), generator=generator).bincount(minlength=64)
        assert alerts.see({"a": counts}) == []


def test_layers_of_other_sizes_stand_side_by_side():
    alerts, dead = Alerts(), torch.tensor([100, 100, 100, 0])
    found = [alert for _ in range(PATIENCE) for alert in alerts.see({"a": EVEN, "b": dead, "c": dead})]
    assert [alert.layers for alert in found] == [("b", "c")]


def test_it_is_at_hand_and_takes_what_a_balance_gives():
    model = torch.nn.ModuleList([equipoise.nn.Router(4, 8, 2)]).train()
    balance, alerts = equipoise.attach(model, "loss-free"), equipoise.Alerts()
    model[0](torch.randn(16, 4))
    balance.step()
    assert alerts.see(balance.load, 1.0, balance.offsets) == []


def test_a_run_of_the_lab_says_them_once_also_after_it_went_on(tmp_path, monkeypatch):
    """Without balancing and with PATIENCE at 2, the experts of a tiny model soon are as uneven as few."""
    from equipoise.lab.config import Train
    from equipoise.lab.run_folder import RunFolder
    from equipoise.records import Run

    said = []

    class Watcher:
        def say(self, text):
            said.append(text)

        def begin(self, config, done):
            pass

        def step(self, row, tokens_per_second):
            said.append(row.get("holding"))

        def end(self):
            pass

    monkeypatch.setattr("equipoise.alerts.PATIENCE", 2)
    config = Train(out=tmp_path / "run", steps=6, strategy="none")
    Run.create(config.out, {"layers": ["a"], "notes": []})
    first = RunFolder(config, Watcher())
    first.records = Run(config.out)
    for step in (1, 2, 3):
        first.step({"step": step, "loss": 1.0, "maxvio_batch": 3.0, "seconds": 1.0}, [[400, 0, 0, 0]])
    rows = list(first.records.rows("steps"))
    assert "alerts" not in rows[0] and len(rows[1]["alerts"]) == 2 and "alerts" not in rows[2]
    assert said[0] is None and said[1].startswith("step 2: collapse: a is as uneven as 1.0 of 4 experts")
    assert said[-1] == ["collapse", "dead experts"]
    again = RunFolder(config, Watcher())
    again.records = Run(config.out)
    again.begin(3)
    said.clear()
    again.step({"step": 4, "loss": 1.0, "maxvio_batch": 3.0, "seconds": 1.0}, [[400, 0, 0, 0]])
    assert said == [["collapse", "dead experts"]]  # they hold, and were said


def test_the_trainer_logs_how_many_hold(caplog, monkeypatch):
    import logging

    from equipoise.integrations.trainer import EquipoiseCallback

    class State:
        is_world_process_zero, global_step = True, 3

    monkeypatch.setattr("equipoise.alerts.PATIENCE", 2)
    callback = EquipoiseCallback("loss-free")
    with caplog.at_level(logging.WARNING, "equipoise"):
        callback._unread = [{"a": torch.tensor([400, 0, 0, 0])}] * 3
        callback._hear(State())
    assert callback._alerts.holding == {"collapse": ["a"], "dead experts": ["a"]} and callback._unread == []
    assert caplog.text.count("by step 3: collapse") == 1

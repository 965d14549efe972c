"""Alerts: on loads with a known answer, on chance, in the lab and in the Trainer."""

import json
import logging
import math

import pytest
import torch
from models import family
from trainer_ranks import rows, train

import equipoise
from equipoise.alerts import PATIENCE, Alert, Alerts
from equipoise.errors import EquipoiseError

EVEN = torch.full((8,), 100)
ONE = torch.tensor([700, 0, 0, 0, 0, 0, 50, 50])  # 1.6 effective experts of 8
BUSIEST = torch.tensor([300] + [100] * 7)  # 2.4 times its share, MaxVio 1.4


def feed(alerts, loads, **more):
    """(window from 1, kind, over) of every alert. Layer a gets the loads; layer b beside it is even."""
    seen = [alert for load in loads for alert in alerts.see({"a": load, "b": EVEN}, **more)]
    assert all(alert.layers == ("a",) for alert in seen)
    return [(alert.step, alert.kind, alert.over) for alert in seen]


def only(kind, alerts):
    return [alert for alert in alerts if alert[1] == kind]


# ---- collapse ----


def test_a_collapse_is_reported_once_when_it_starts_and_once_when_it_ends():
    loads = [EVEN] * PATIENCE + [ONE] * 3 * PATIENCE + [EVEN] * 3 * PATIENCE
    found = only("collapse", feed(Alerts(steers=False), loads))
    assert found == [(2 * PATIENCE, "collapse", False), (5 * PATIENCE, "collapse", True)]


def test_the_bound_of_a_collapse_is_half_of_the_experts():
    """Four of eight equally used experts are a collapse and five are not. An existing collapse ends above 0.6 of 8."""
    four, five = torch.tensor([8, 8, 8, 8, 0, 0, 0, 0]) * 100, torch.tensor([8, 8, 8, 8, 8, 0, 0, 0]) * 100
    nearly = torch.tensor([80, 80, 80, 80, 21, 0, 0, 0]) * 10
    assert 4 < float(equipoise.metrics.effective_experts(nearly)) < 0.6 * 8 < 5
    assert only("collapse", feed(Alerts(), [four] * PATIENCE)) == [(PATIENCE, "collapse", False)]
    assert only("collapse", feed(Alerts(), [nearly] * PATIENCE)) == []
    alerts = Alerts()
    feed(alerts, [four] * PATIENCE)
    assert only("collapse", feed(alerts, [nearly] * PATIENCE)) == []
    assert only("collapse", feed(alerts, [five] * PATIENCE)) == [(3 * PATIENCE, "collapse", True)]


def test_imbalance_that_does_not_last_is_not_reported():
    alerts = Alerts()
    assert feed(alerts, [ONE] * (PATIENCE // 4) + [EVEN] * (PATIENCE - PATIENCE // 4)) == []
    assert feed(alerts, [ONE] * (PATIENCE - 1)) == [] and alerts.mark == ""


def test_a_layer_without_tokens_raises_no_alert():
    assert feed(Alerts(), [torch.zeros(8, dtype=torch.int64)] * 5 * PATIENCE) == []


# ---- dead experts ----


def test_dead_experts_are_named_where_an_even_share_is_thirty():
    """3 assignments a window for 8 experts: an even share of 20 windows is 7.5, of 80 it is 30."""
    alerts = Alerts()
    load = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0])
    rolled = [torch.cat([load[:7].roll(number), load[7:]]) for number in range(5 * PATIENCE)]
    (alert,) = [alert for load in rolled for alert in alerts.see({"a": load, "b": EVEN})]
    assert (alert.kind, alert.step, alert.experts) == ("dead experts", 4 * PATIENCE, ((7,),))
    assert "a: expert 7 of 8 got no token in 80 steps, where an even share is 30." in str(alert)
    assert alerts.holding == {"dead experts": {"a": (7,)}} and alerts.mark == "1 dead expert"


def test_experts_are_named_by_id_and_counted_after_six():
    def text(*dead):
        load = torch.full((32,), 100)
        load[list(dead)] = 0
        alerts = Alerts()
        return str([alert for _ in range(PATIENCE) for alert in alerts.see({"a": load})][-1])

    assert "a: expert 28 of 32 got no token" in text(28)
    assert "a: experts 0, 6 and 12 of 32 got no token" in text(0, 6, 12)
    assert "a: experts 0, 1, 2, 3, 4, 5 and 2 more of 32 got no token" in text(*range(8))


def test_each_expert_is_reported_when_it_dies_and_when_it_is_back():
    alerts, two, one = Alerts(), torch.tensor([100] * 6 + [0, 0]), torch.tensor([100] * 7 + [0])
    loads = [one] * PATIENCE + [two] * PATIENCE + [one] * PATIENCE + [EVEN] * PATIENCE
    seen = [alert for load in loads for alert in alerts.see({"a": load})]
    steps = [PATIENCE * stretch for stretch in range(1, 5)]
    assert [(alert.step, alert.over, alert.experts) for alert in seen] == [
        (steps[0], False, ((7,),)),
        (steps[1], False, ((6,),)),
        (steps[2], True, ((6,),)),
        (steps[3], True, ((7,),)),
    ]
    assert str(seen[2]) == "over: dead experts: a: expert 6 of 8" and alerts.holding == {}


def test_an_expert_that_gets_a_token_now_and_then_stays_dead():
    alerts, dead, token = Alerts(), torch.tensor([100] * 7 + [0]), torch.tensor([100] * 7 + [1])
    assert len(feed(alerts, ([dead] * PATIENCE + [token] * PATIENCE) * 5)) == 1
    assert alerts.mark == "1 dead expert"


# ---- the strategy ----


@pytest.mark.parametrize(
    ("strategy", "collapse", "dead"),
    [
        (
            None,
            "Take a larger coefficient or rate, or another mechanism.",
            "The strategy quantile revives them at once,",
        ),
        ("none", "is none, which does not balance. Take lbl:scope=global_batch, loss-free or quantile.", "is none, wh"),
        ("frozen+z", "is frozen+z, which does not balance.", "which does not balance."),
        ("lbl-groups", "raise its coefficient, or take another mechanism.", "raise its coefficient, or take q"),
        ("lbl:scope=sequence", "raise its coefficient, or take another mechanism.", "raise its coefficient, or take q"),
        ("loss-free:rate=0.01", "is loss-free:rate=0.01: raise its rate, or take another", "raise its rate, or take q"),
        (
            "deepseek-v3",
            "is deepseek-v3: raise its rate or its coefficient, or",
            "raise its rate or its coefficient, or",
        ),
        ("quantile", "is quantile, which evens the load in every step: make sure that step()", "make sure that step()"),
        (
            "mine:speed=3",
            "is mine:speed=3: let it balance more strongly, or",
            "let it balance more strongly, or take quantile",
        ),
    ],
)
def test_an_alert_names_the_strategy_and_what_to_change_in_it(strategy, collapse, dead):
    alerts = Alerts(strategy=strategy)
    first, second = [alert for _ in range(PATIENCE) for alert in alerts.see({"a": ONE})]
    assert (first.kind, second.kind) == ("collapse", "dead experts")
    assert collapse in str(first) and dead in str(second)
    assert strategy in (None, "frozen+z") or f"The strategy is {strategy}" in str(second)
    assert "a: experts 1, 2, 3, 4 and 5 of 8 got no token in 20 steps, where" in str(second)


def test_a_slow_rate_names_its_strategy():
    alerts = Alerts(num_steps=10 * PATIENCE, strategy="loss-free")
    (alert,) = [alert for _ in range(5 * PATIENCE) for alert in alerts.see({"a": BUSIEST, "b": EVEN})]
    assert str(alert).endswith("140 steps are left. The strategy is loss-free: raise its rate.")


def test_only_the_first_alert_of_a_kind_says_what_to_do():
    alerts, two, one = Alerts(strategy="none"), torch.tensor([100] * 6 + [0, 0]), torch.tensor([100] * 7 + [0])
    loads = [one] * PATIENCE + [two] * PATIENCE + [one] * PATIENCE + [EVEN] * PATIENCE
    seen = [alert for load in loads for alert in alerts.see({"a": load})]
    assert [alert.first for alert in seen] == [True, False, True, False]
    assert ["The strategy is none" in str(alert) for alert in seen] == [True, False, False, False]
    again = Alerts(strategy="none")
    again.load_state_dict(alerts.state_dict())
    (alert,) = [alert for _ in range(PATIENCE) for alert in again.see({"a": one})]
    assert not alert.first and str(alert).endswith("where an even share is 1,750.")


def test_layers_of_two_sizes_that_fail_at_once_are_both_first():
    alerts, four = Alerts(), torch.tensor([100, 100, 100, 0])
    seen = [alert for _ in range(PATIENCE) for alert in alerts.see({"a": four, "b": torch.tensor([100] * 7 + [0])})]
    assert [(alert.layers, alert.first) for alert in seen] == [(("a",), True), (("b",), True)]


# ---- slow rate ----


def test_a_rate_is_slow_if_the_busiest_expert_is_pushed_down_without_end():
    alerts = Alerts(num_steps=10 * PATIENCE)
    (alert,) = [alert for _ in range(5 * PATIENCE) for alert in alerts.see({"a": BUSIEST, "b": EVEN})]
    # a quarter of 200 windows is 50, within the third stretch
    assert (alert.kind, alert.step, alert.layers, alert.experts) == ("slow rate", 3 * PATIENCE, ("a",), ((0,),))
    assert "a: expert 0 of 8 has 2.4 times its share although its bias moved down in each of the last 60" in str(alert)
    assert "no end in sight" in str(alert) and "140 steps are left. Raise the rate." in str(alert)
    assert feed(alerts, [EVEN] * 2 * PATIENCE) == [(6 * PATIENCE, "slow rate", True)]


def test_without_a_known_end_a_rate_is_slow_after_two_hundred_windows():
    assert feed(Alerts(), [BUSIEST] * 240) == [(200, "slow rate", False)]


def test_windows_without_a_call_neither_count_nor_interrupt():
    """Such as image experts, if only some batches have images."""
    loads = [load for _ in range(240) for load in (BUSIEST, torch.zeros_like(BUSIEST))]
    assert feed(Alerts(), loads) == [(400, "slow rate", False)]


def test_nothing_is_slow_without_a_rate():
    alerts = Alerts(steers=False)
    assert feed(alerts, [BUSIEST] * 300) == []
    alerts.steers = True
    assert feed(alerts, [BUSIEST] * PATIENCE) == [(300 + PATIENCE, "slow rate", False)]
    alerts.steers = False  # a schedule took the rate to zero
    assert feed(alerts, [BUSIEST] * PATIENCE) == [(300 + 2 * PATIENCE, "slow rate", True)]


def test_nothing_is_slow_where_biases_do_not_move():
    zeros, held = ({name: torch.full((8,), value) for name in "ab"} for value in (0.0, 0.5))
    assert feed(Alerts(), [BUSIEST] * 300, biases=zeros) == []  # attached without a strategy, or with a loss
    assert feed(Alerts(), [BUSIEST] * 300, biases=held) == []  # frozen
    alerts, seen = Alerts(), []
    for window in range(300):
        moved = torch.arange(8.0) * min(window, 220)  # then the rate is zero
        seen += alerts.see({"a": BUSIEST, "b": EVEN}, biases={"a": moved, "b": moved})
    assert [(alert.step, alert.kind, alert.over) for alert in seen] == [
        (200, "slow rate", False),
        (260, "slow rate", True),
    ]


def falling(per_window, start=1200):
    """Loads with a busiest expert that loses so many assignments per window; the others have 100."""
    return [torch.tensor([start - per_window * number] + [100] * 7) for number in range(5 * PATIENCE)]


def test_a_rate_that_is_in_time_is_not_slow():
    assert feed(Alerts(num_steps=300), falling(8)) == []
    (alert,) = feed(Alerts(num_steps=5 * PATIENCE + 1), falling(8))
    assert alert == (2 * PATIENCE, "slow rate", False)


def test_an_alert_estimates_the_steps_that_a_rate_still_needs():
    """MaxVio falls linearly from stretch to stretch; pooled over 20 windows it is the value in their middle."""
    alerts = Alerts(num_steps=41)
    (text,) = (str(a) for load in falling(8)[: 2 * PATIENCE] for a in alerts.see({"a": load}))
    first, second = (8 * (1200 - 8 * middle) / (1900 - 8 * middle) - 1 for middle in (9.5, 29.5))
    more = (second - 1) / ((first - second) / PATIENCE) - PATIENCE / 2
    assert f"at this rate about {more:,.0f} more steps. 1 step is left" in text


def test_one_window_below_the_mean_starts_the_count_again():
    loads = ([BUSIEST] * (2 * PATIENCE - 1) + [torch.tensor([50] + [150] * 7)]) * 6
    assert feed(Alerts(num_steps=2 * PATIENCE), loads) == []


def test_chance_imbalance_is_not_slow():
    """Two assignments a window for 64 experts: MaxVio of a stretch is above 1 by chance, and no expert is pushed."""
    generator, alerts = torch.Generator().manual_seed(0), Alerts()
    draws = (torch.randint(64, (2,), generator=generator).bincount(minlength=64) for _ in range(5000))
    assert [alert for load in draws for alert in alerts.see({"a": load})] == []


def test_a_busy_expert_is_slow_above_three_times_the_chance_level():
    """MaxVio 16/7 - 1 = 1.29; chance gives 256 experts 2.83 sqrt(256 / assignments of 20 windows): three times that is
    1.43 of 448 a window and 1.01 of twice as many; four times, 1.35."""
    load = torch.tensor([4] + [2] * 189 + [1] * 66)
    assert feed(Alerts(), [load] * 240) == []
    assert feed(Alerts(), [2 * load] * 240) == [(200, "slow rate", False)]


# ---- nan ----


def test_a_loss_that_is_not_finite_is_reported_at_once_and_ends_after_a_stretch():
    alerts = Alerts()
    assert feed(alerts, [EVEN] * 3, loss=1.0) == []
    (alert,) = alerts.see({"a": EVEN}, loss=math.nan)
    assert (alert.kind, alert.layers, alert.step) == ("nan", ("the loss",), 4) and "the loss is not finite" in str(
        alert
    )
    assert [a for _ in range(3) for a in alerts.see({"a": EVEN}, loss=torch.tensor(math.inf))] == []
    assert alerts.mark == "nan"
    ends = [(a.step, a.over) for _ in range(2 * PATIENCE) for a in alerts.see({"a": EVEN}, loss=2.0)]
    assert ends == [(2 * PATIENCE, True)] and alerts.holding == {}


def test_a_bias_that_is_not_finite_is_named():
    biases = {"a": torch.zeros(8), "b": torch.tensor([0.0] * 7 + [math.inf])}
    alerts = Alerts()
    (alert,) = alerts.see({"a": EVEN, "b": EVEN}, 1.0, biases)
    assert alert.layers == ("b",) and "a bias of b is not finite" in str(alert)
    assert alerts.see({"a": EVEN, "b": EVEN}, 1.0, biases) == []
    (alert,) = Alerts().see({}, None, dict.fromkeys("ab", torch.tensor([math.nan])))
    assert "a bias of a and a bias of b are not finite" in str(alert)


# ---- chance, layers, resume ----


@pytest.mark.parametrize(("experts", "k", "tokens"), [(64, 4, 256), (64, 4, 8), (128, 1, 64), (16, 16, 4)])
def test_chance_raises_no_alarm(experts, k, tokens):
    """2,000 windows of an even router and of one with experts that differ by a half; some have few tokens."""
    generator, alerts = torch.Generator().manual_seed(0), Alerts()
    tilt = torch.linspace(0, 0.4, experts).exp()
    for _ in range(2000):
        even = torch.rand(tokens, experts, generator=generator)
        load = {
            name: draw.topk(k).indices.flatten().bincount(minlength=experts)
            for name, draw in {"even": even, "tilted": even.log() / tilt}.items()
        }
        assert alerts.see(load) == []


def test_layers_of_other_sizes_and_too_few_tokens_stand_side_by_side():
    alerts, dead, idle = Alerts(), torch.tensor([100, 100, 100, 0]), torch.tensor([1, 0, 0, 0])
    seen = [a for _ in range(PATIENCE) for a in alerts.see({"a": EVEN, "b": dead, "c": dead, "d": idle})]
    assert [alert.layers for alert in seen] == [("b", "c")]
    assert alerts.mark == "2 dead experts"


def test_mark_summarises_the_problems_in_a_few_words():
    alerts, load = Alerts(), dict.fromkeys("abcdef", ONE)
    (collapse, dead) = [alert for _ in range(PATIENCE) for alert in alerts.see(load)]
    assert alerts.mark == "collapse of 6 layers, 30 dead experts"
    assert "d is as uneven as 1.6 of 8 experts used equally; and 2 more layers. Take" in str(collapse)
    assert len(dead.experts) == 6 and dead.experts[0] == (1, 2, 3, 4, 5)


@pytest.mark.parametrize("cut", [7, PATIENCE, 3 * PATIENCE + 3])
def test_a_loaded_state_continues_as_if_never_interrupted(cut):
    generator = torch.Generator().manual_seed(1)
    kinds = [EVEN, ONE, BUSIEST, torch.tensor([100] * 7 + [0])]
    loads = [load for draw in torch.randint(4, (12,), generator=generator) for load in [kinds[draw]] * PATIENCE]
    losses = [math.nan if 30 < number < 33 else 1.0 for number in range(len(loads))]

    def replay(alerts, start, stop):
        return [
            a for n in range(start, stop) for a in alerts.see({"a": loads[n], "b": EVEN}, losses[n], {"a": EVEN / 1})
        ]

    whole, first, second = Alerts(num_steps=300), Alerts(num_steps=300), Alerts(num_steps=300)
    expected = replay(whole, 0, len(loads))
    before, state = replay(first, 0, cut), first.state_dict()
    replay(first, cut, len(loads))  # the state is a copy
    second.load_state_dict(state)
    assert before + replay(second, cut, len(loads)) == expected
    assert {alert.kind for alert in expected} == {"nan", "collapse", "dead experts", "slow rate"}
    assert second.holding == whole.holding
    group = state["groups"][0]
    for wrong, got in (
        ({"biases": {}}, "one with biases"),
        (None, "NoneType"),
        (state | {"groups": [{"names": ("a",)}]}, "one with num_seen"),
        (state | {"groups": [group | {"counts": None}]}, "one with num_seen"),
    ):
        with pytest.raises(EquipoiseError, match=f"must be what Alerts.state_dict.* gave: got .*{got}"):
            second.load_state_dict(wrong)
    assert second.holding == whole.holding, "nothing of a wrong state was taken"


def test_biases_that_stay_after_a_resume_have_not_moved():
    """They are compared with those of the last stretch, not with 0: no rate is slow where none acts."""
    biases = {name: torch.full((8,), 0.5) for name in "ab"}
    first, second = Alerts(), Alerts()
    assert feed(first, [BUSIEST] * 200, biases=biases) == []
    second.load_state_dict(first.state_dict())
    assert feed(second, [BUSIEST] * 200, biases=biases) == []
    state = first.state_dict()
    del state["biases"]  # as an earlier version saved it
    second.load_state_dict(state)
    assert feed(second, [BUSIEST] * PATIENCE, biases=biases) == [(200 + PATIENCE, "slow rate", False)]


def test_alerts_take_the_loads_of_a_balance():
    model = torch.nn.ModuleList([equipoise.nn.Router(4, 8, 2)]).train()
    balance, alerts = equipoise.attach(model, "loss-free"), equipoise.Alerts()
    seen = []
    for _ in range(PATIENCE):
        model[0](torch.ones(16, 4))  # one token sixteen times: two experts get all
        balance.step(applied=False)
        seen += alerts.see(balance.load, torch.tensor(1.0), balance.biases)
    assert [alert.kind for alert in seen] == ["collapse", "dead experts"] and isinstance(seen[0], Alert)


# ---- the lab ----


class Watcher:
    def __init__(self):
        self.said, self.marks = [], []

    def say(self, text):
        self.said.append(text)

    def begin(self, config, done):
        pass

    def step(self, row, tokens_per_second):
        self.marks.append(row.get("holding"))

    def end(self):
        pass


def _folder(config, watcher):
    from equipoise_lab.records import Run
    from equipoise_lab.train.run_folder import RunFolder

    folder = RunFolder(config, watcher)
    folder.records = Run(config.out)
    return folder


def _step(folder, step, load):
    row = {"step": step, "loss": 1.0, "maxvio_batch": 3.0, "maxvio_micro": 3.0, "seconds": 1.0}
    folder.step(row, [load])


@pytest.fixture
def config(tmp_path):
    from equipoise_lab.records import Run
    from equipoise_lab.train.config import Train

    config = Train(out=tmp_path / "run", steps=100, strategy="none")
    Run.create(config.out, {"layers": ["a"], "notes": []})
    return config


def test_a_run_of_the_lab_reports_each_alert_once_even_after_it_went_on(config):
    watcher, again = Watcher(), Watcher()
    folder = _folder(config, watcher)
    for step in range(1, PATIENCE + 6):
        _step(folder, step, [400, 0, 0, 0])
    rows = list(folder.records.rows("steps"))
    assert [row["step"] for row in rows if "alerts" in row] == [PATIENCE]
    assert watcher.said == [f"step {PATIENCE}: {text}" for text in rows[PATIENCE - 1]["alerts"]]
    assert watcher.said[0].startswith(f"step {PATIENCE}: collapse: a is as uneven as 1.0 of 4 experts")
    assert watcher.marks == [None] * (PATIENCE - 1) + ["collapse, 3 dead experts"] * 6
    folder = _folder(config, again)
    folder.begin(PATIENCE + 5)
    for step in range(PATIENCE + 6, 2 * PATIENCE + 1):
        _step(folder, step, [400, 0, 0, 0])
    assert again.said == [] and set(again.marks) == {"collapse, 3 dead experts"}
    for step in range(2 * PATIENCE + 1, 3 * PATIENCE + 1):
        _step(folder, step, [100, 100, 100, 100])
    assert [text.split(": ")[1] for text in again.said] == ["over", "over"] and again.marks[-1] is None
    assert "The strategy is none, which does not balance." in watcher.said[0]


def test_a_run_of_the_lab_prints_each_kind_once_and_records_all(config):
    watcher = Watcher()
    folder = _folder(config, watcher)
    for step in range(1, 4 * PATIENCE + 1):
        _step(folder, step, [100, 100, 100, 0] if step <= PATIENCE else [100, 100, 0, 0])
    for step in range(4 * PATIENCE + 1, 5 * PATIENCE + 1):
        _step(folder, step, [100, 100, 100, 100])
    recorded = [text for row in folder.records.rows("steps") for text in row.get("alerts", [])]
    kinds = ["dead experts", "collapse", "dead experts", "over: collapse", "over: dead experts"]
    assert [text.split(": a")[0] for text in recorded] == kinds
    assert [text.split(": ", 1)[1].split(": a")[0] for text in watcher.said] == [*kinds[:2], *kinds[3:]]


@pytest.mark.parametrize(
    ("strategy", "then", "says"),
    [
        ("loss-free:rate=1e-3", None, True),
        ("loss-free:rate=1e-3,schedule=drop,zero_from=10", None, False),
        ("quantile", None, False),
        ("frozen", None, False),
        ("loss-free:rate=1e-3", "quantile", False),
        ("quantile", "loss-free:rate=1e-3", True),
    ],
)
def test_a_run_of_the_lab_is_slow_by_the_rate_of_the_step(config, strategy, then, says):
    from dataclasses import replace

    config = replace(config, strategy=strategy, then=then, switch_at=None if then is None else PATIENCE // 2)
    watcher = Watcher()
    folder = _folder(config, watcher)
    for step in range(1, 3 * PATIENCE + 1):
        _step(folder, step, [400, 100, 100, 100])
    assert [text.split(":")[1] for text in watcher.said] == ([" slow rate"] if says else [])


def test_a_progress_line_of_the_lab_shows_the_problems(capsys):
    from equipoise_lab.train.config import Train
    from equipoise_lab.train.watch import Terminal

    row = {"step": 1, "loss": 1.0, "maxvio_batch": 3.0, "holding": "3 dead experts"}
    with Terminal() as terminal:
        terminal.begin(Train(out="run", steps=3), 0)
        terminal.step(row, 10.0)
    assert "tokens/s  ! 3 dead experts" in capsys.readouterr().err


# ---- the Trainer ----


def _routed_to_few(model):
    """Sends every token to the same experts."""
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            parameter.data.zero_()
        parameter.requires_grad_(name == "lm_head.weight")
    return model


def _train(tmp_path, callback, model=None, steps=6, **options):
    model = _routed_to_few(family("qwen3_moe")) if model is None else model
    return train(model, rows(8), [callback], tmp_path, max_steps=steps, **options)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("equipoise.alerts.PATIENCE", 2)


def _warnings(caplog):
    return [record.message.split(": ", 2)[:2] for record in caplog.records if ", step " in record.message]


def test_the_trainer_warns_once_and_logs_the_number_of_problems(impatient, caplog, tmp_path):
    from equipoise.integrations import EquipoiseCallback

    with caplog.at_level(logging.WARNING, "equipoise"):
        trainer = _train(tmp_path, EquipoiseCallback("none"))
    said = [["EquipoiseCallback, step 2", "collapse"], ["EquipoiseCallback, step 2", "dead experts"]]
    assert _warnings(caplog) == said
    assert caplog.text.count("The strategy is none, which does not balance.") == 2
    logged = [log["equipoise/alerts"] for log in trainer.state.log_history if "equipoise/alerts" in log]
    assert logged == [0.0] + [4.0] * 5  # two kinds of two layers


def test_a_training_that_resumes_repeats_no_alert(impatient, caplog, tmp_path):
    from equipoise.integrations import EquipoiseCallback

    with caplog.at_level(logging.WARNING, "equipoise"):
        _train(tmp_path, EquipoiseCallback("none"), steps=3, save_steps=3, save_strategy="steps")
        caplog.clear()
        resumed = EquipoiseCallback("none")
        _train(tmp_path, resumed, steps=6, resume=str(tmp_path / "checkpoint-3"))
    assert _warnings(caplog) == []
    assert resumed._alerts.num_seen == 6 and len(resumed._alerts.holding) == 2


@pytest.mark.parametrize("strategy", ["none", "loss-free", "lbl"])
def test_the_trainer_reports_a_loss_that_is_not_finite(caplog, tmp_path, strategy):
    """Its own log hides it: ``logging_nan_inf_filter``."""
    from equipoise.integrations import EquipoiseCallback

    model = family("qwen3_moe")
    model.lm_head.weight.data[0, 0] = math.nan
    callback = EquipoiseCallback(strategy)
    with caplog.at_level(logging.WARNING, "equipoise"):
        trainer = _train(tmp_path, callback, model, steps=2)
    assert _warnings(caplog) == [["EquipoiseCallback, step 1", "nan"]]
    assert json.dumps(callback._alerts.holding) == '{"nan": {"the loss": []}}'
    assert trainer.state.log_history[0]["equipoise/alerts"] == 1.0

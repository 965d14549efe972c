"""`equipoise train` under torchrun: a killed rank, a stopped run, and two nodes without a shared disk."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import lab_ranks
import pytest
from lab_ranks import tiny, write_text
from ranks import run_on_ranks

from equipoise_lab.records import Run
from equipoise_lab.train.checkpoint import newest_step

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]
pytestmark += [
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="the processes of the ranks are found in /proc")
]

LONG = {"steps": 80, "checkpoint_every": 5}
MAX_SECONDS_TO_END = 60  # from the loss of a rank until all processes have ended


def _start(config, folder, *options, resume=False, **environment):
    """Starts torchrun with this configuration. Its stderr goes to ``folder/said``."""
    values = {**config.shared(), "strategy": config.strategy, "out": config.out, "wrapper": config.wrapper}
    arguments = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in values.items()
        if value is not None and not isinstance(value, bool)
    ]
    folder.mkdir(exist_ok=True)
    with open(folder / "said", "wb") as said:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", *options),
                *("-m", "equipoise", "train", *arguments, "--no-save-model", *(["--resume"] if resume else [])),
            ],
            stdout=subprocess.DEVNULL,
            stderr=said,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        )


def _wait(process, folder, seconds=120):
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"it did not end within {seconds} s: {(folder / 'said').read_text()}")
    return (folder / "said").read_text()


def _ranks(agent):
    """The process id of each rank, by rank."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    pids = {}
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        pids |= {int(line[5:]): int(child) for line in environment if line.startswith(b"RANK=")}
    return pids


def _ranks_at_step(agent, out, step, folder):
    log, deadline = out / "steps.jsonl", time.monotonic() + 120
    while not log.exists() or log.read_bytes().count(b"\n") < step:
        assert agent.poll() is None, (folder / "said").read_text()
        assert time.monotonic() < deadline, (folder / "said").read_text()
        time.sleep(0.002)
    return _ranks(agent)


def _are_gone(pids):
    return not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def _numbers(folder):
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in Run(folder).rows("steps")]
    return rows, {k: v for k, v in Run(folder).result.items() if k != "tokens_per_second"}


def test_a_run_that_loses_a_rank_ends_and_can_be_resumed(tmp_path):
    write_text(tmp_path / "text")
    cache, torchrun = {"EQUIPOISE_CACHE": str(tmp_path / "cache")}, ("--nproc-per-node", "2")
    for attempt in run_on_ranks(2, lab_ranks.one_run, tmp_path, "whole", LONG):
        assert attempt["error"] is None, attempt

    draw = random.Random()
    step, lost = draw.randrange(6, 40), draw.randrange(2)
    drawn = f"drawn: rank {lost} killed after step {step}\n"
    config, folder = tiny(tmp_path, "cut", **LONG), tmp_path / "1"
    agent = _start(config, folder, *torchrun, **cache)
    ranks = _ranks_at_step(agent, config.out, step, folder)
    os.kill(ranks[lost], signal.SIGKILL)
    said = drawn + _wait(agent, folder, MAX_SECONDS_TO_END)
    assert agent.returncode != 0, said
    assert _are_gone([agent.pid, *ranks.values()]), said
    assert "error: every rank must run to the end: another rank was lost at step " in said, said
    assert "start the same command again with --resume." in said, said
    assert not Run(config.out).complete

    agent = _start(config, folder, *torchrun, resume=True, **cache)  # now stop it instead of losing a rank
    ranks = _ranks_at_step(agent, config.out, min(step + 10, 60), folder)
    agent.terminate()
    said = drawn + _wait(agent, folder, MAX_SECONDS_TO_END)
    assert agent.returncode != 0, said
    assert _are_gone([agent.pid, *ranks.values()]), said
    saved = newest_step(config.out / "checkpoints")
    message = f"checkpoint is of step {saved}. To continue with step {saved + 1}, run the same command with --resume."
    assert said.count(f"equipoise: stopped. The newest {message}") == 1, said
    assert said.count("with a checkpoint; Ctrl-C again leaves at once") == 1, said
    assert saved == (config.out / "steps.jsonl").read_bytes().count(b"\n"), f"steps were lost: {said}"
    assert "lost" not in said, said

    agent = _start(config, folder, *torchrun, resume=True, **cache)
    said = drawn + _wait(agent, folder)
    assert agent.returncode == 0, said
    assert said.count("continuing after step") == said.count("evaluating on the selection") == 1, "only rank 0 reports"
    assert _numbers(config.out) == _numbers(tmp_path / "whole"), drawn


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_nodes_need_no_shared_disk(tmp_path):
    port, agents = _free_port(), []
    for node in (0, 1):
        folder = tmp_path / str(node)
        folder.mkdir()
        write_text(folder / "text")
        options = ("--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1")
        options += ("--master-addr", "127.0.0.1", "--master-port", str(port))
        options += (
            "--log-dir",
            str(folder / "log"),
            "--redirects",
            "3",
        )  # each agent may warn that the other has ended
        config = tiny(folder, "out", data="text", steps=4, wrapper="fsdp2")
        cache = {"EQUIPOISE_CACHE": str(folder / "cache"), "LOGLEVEL": "ERROR"}
        agents.append(_start(config, folder, *options, **cache))
    said = [_wait(agent, tmp_path / str(node)) for node, agent in enumerate(agents)]
    assert [agent.returncode for agent in agents] == [0, 0], said
    run = Run(tmp_path / "0" / "out")
    assert run.complete
    assert (run.config["wrapper"], run.config["num_ranks"]) == ("fsdp2", 2)
    assert run.config["command"].startswith("torchrun --nnodes 2 --nproc-per-node 1 -m equipoise train")
    assert not (tmp_path / "1" / "out").exists()
    manifests = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("*/cache/tokens/*/manifest.json"))]
    assert len(manifests) == 2
    assert manifests[0]["fingerprint"] == manifests[1]["fingerprint"] == run.config["corpus_fingerprint"]
    logs = ["".join(file.read_text() for file in sorted((tmp_path / node / "log").rglob("std*.log"))) for node in "01"]
    assert "step" in logs[0] and not logs[1], logs

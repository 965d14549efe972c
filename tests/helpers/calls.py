"""Calls of ``equipoise`` as a new user types them, right and wrong, and a folder to make them in.

A call is what stands after ``equipoise``. SMALL stands for options of a run that takes less than a second, and the
folder ``new`` is missing before each call.
"""

import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

from equipoise_lab.cli import main

SMALL = (
    "--vocab-size 300 --steps 2 --layers 1 --width 32 --experts 4 --experts-per-token 2 --expert-width 16 "
    "--sequence-length 16 --sequences 2 --micro-batches 2 --evaluation-sequences 4 --dtype float32"
)
TRAIN = "train --out new --data my_text SMALL"
COMPARE = "compare --out new --data my_text --workers 1 SMALL"
COMMANDS = ("compare", "train", "report", "recipes", "reproduce", "audit", "export-check", "families", "conformance")

RIGHT = [
    "--version",
    "--help",
    "-h",
    *(f"{command} --help" for command in COMMANDS),
    "train -h",
    # train: strategies
    TRAIN,
    f"{TRAIN} --strategy none",
    f"{TRAIN} --strategy=lbl:scope=global_batch,coefficient=1e-2",
    f"{TRAIN} --strategy loss-free:rate=1e-2+lbl:scope=sequence,coefficient=1e-4",
    f"{TRAIN} --strategy olmoe --arch olmoe",
    f"{TRAIN} --strategy frozen --model runs/one",
    f"{TRAIN} --seed 3",
    f"{TRAIN} --strategy none --then lbl --switch-at 1",
    f"{TRAIN} --strategy none --selection sinkhorn",
    f"{TRAIN} --strategy none --selection expert-choice:chunk=8",
    f"{TRAIN} --strategy none --selection hash --no-save-model",
    # train: folders
    "train --out new/deep/er --data my_text SMALL",
    f"{TRAIN} --resume",
    "train --out runs/one --data my_text SMALL --resume",
    f"{TRAIN} --checkpoint-every 1",
    # train: text
    "train --out new --data my_text/one.txt SMALL",
    "train --out new --data code SMALL",
    "train --out new --data rows --text-key body SMALL",
    f"{TRAIN} --tokenizer runs/one/model",
    f"{TRAIN} --shuffled",
    # train: model
    f"{TRAIN} --arch qwen3_moe",
    f"{TRAIN} --arch mixtral",
    f"{TRAIN} --arch deepseek_v3",
    f"{TRAIN} --qk-norm",
    f"{TRAIN} --score-function softmax --no-save-model",
    f"{TRAIN} --model runs/one/model",
    # train: training, evaluation, machine
    f"{TRAIN} --balance-batch 2",
    f"{TRAIN} --order interleaved",
    f"{TRAIN} --learning-rate 1e-2 --warmup 0 --weight-decay 0 --clip 0.5",
    f"{TRAIN} --learning_rate 0.01",
    f"{TRAIN} --evaluate-every 1",
    f"{TRAIN} --wrapper none",
    # config files
    "train --config my.yaml --out new",
    "train --config runs/one/run.yaml --out new",
    "train --config runs/one/run.yaml --out new --steps 1",
    "compare --config my.yaml --out new --workers 1 --strategies none",
    "compare --config runs/first/compare.yaml --out new",
    # compare
    COMPARE,
    f"{COMPARE} --strategies none quantile --json",
    f"{COMPARE} --strategies loss-free --seeds 2 --no-save-model",
    "compare --out runs/first --data my_text --workers 1 --strategies none lbl SMALL --resume",
    "compare --out runs/first --data my_text --workers 1 --strategies none lbl SMALL --resume --json",
    # report
    "report runs/one",
    "report runs/first",
    "report runs/first/none_seed0",
    "report runs/audit",
    # recipes
    "recipes",
    "recipes --json",
    "recipes deepseek-v3",
    "recipes deepseek-v3 --json",
    # reproduce
    "reproduce --budget 0",
    "reproduce --budget 0 --json",
    "reproduce 1-scope --budget 0",
    "reproduce --budget 0 --page new/claims.md",
    # audit
    "audit runs/one --data my_text --out new --tokens 200 --sequence-length 16",
    "audit runs/one/model --data my_text --out new --tokens 200 --sequence-length 16 --batch 2",
    "audit runs/one --data my_text --out new --tokens 200 --sequence-length 16 --json",
    # export-check
    "export-check runs/one",
    "export-check runs/one/model --json",
    # families
    "families qwen",
    "families qwen --json",
    "families mixtral --wide",
    "families runs/one",
    "families runs/one --json",
    "families runs/one/model/config.json",
    # conformance
    "conformance",
    "conformance --json",
    "conformance equipoise loss-at-balance",
]


class Wrong(NamedTuple):
    """A call that must fail."""

    call: str
    code: int
    phrase: str  # in the error


WRONG = [
    # the command
    Wrong("trian", 2, "Did you mean train?"),
    Wrong("", 2, "the command must be one of compare, train, report"),
    Wrong("help train", 2, "Did you mean `equipoise train --help`?"),
    Wrong("--verison", 2, "Did you mean --version?"),
    Wrong("--out new", 2, "must come first: got --out"),
    # options
    Wrong("train", 2, "needs --out PATH: got none"),
    Wrong("train new", 2, "got new alone. Write --out new."),
    Wrong("train --out", 2, "--out needs a value: got none"),
    Wrong("train --out new --stpes 3", 2, "got --stpes. Did you mean --steps?"),
    Wrong("train -o new", 2, "which have two dashes: got -o"),
    Wrong("train --out new --steps 3 4", 2, "must get the arguments that it knows, and no more: got 4"),
    Wrong(f"{TRAIN} --strategies none lbl", 2, "got --strategies. Did you mean --strategy?"),
    Wrong(f"{COMPARE} --strategy none lbl", 2, "got --strategy. Did you mean --strategies?"),
    Wrong("report --out runs/one", 2, "an option must be one of `equipoise report`: got --out"),
    Wrong("recipes olmoe switch", 2, "no more: got switch"),
    # values
    Wrong(f"{TRAIN} --steps many", 2, "--steps must be a whole number: got 'many'"),
    Wrong(f"{TRAIN} --steps 0", 2, "--steps must be at least 1: got 0"),
    Wrong(f"{TRAIN} --learning-rate nan", 2, "--learning-rate must be a finite number above 0: got nan"),
    Wrong(f"{TRAIN} --seed 99999999999999999999", 2, "--seed must be below 2**63"),
    Wrong(f"{TRAIN} --arch qwen3", 2, "Did you mean qwen3_moe?"),
    Wrong(f"{TRAIN} --dtype float16", 2, "Did you mean bfloat16 or float32?"),
    Wrong(f"{TRAIN} --experts-per-token 9", 2, "--experts-per-token must be at most --experts: got 9 and 4"),
    Wrong(f"{TRAIN} --vocab-size 10", 2, "--vocab-size must be at least 300"),
    Wrong(f"{TRAIN} --wrapper ddp", 2, "Start them with torchrun"),
    Wrong(f"{TRAIN} --then lbl", 2, "--then needs --switch-at"),
    Wrong(f"{TRAIN} --selection hash --strategy none", 2, "--selection hash needs --no-save-model"),
    Wrong(f"{COMPARE} --seeds 0", 2, "--seeds must be at least 1: got 0"),
    Wrong("compare --out new --data my_text SMALL --workers 0", 2, "--workers must be at least 1: got 0"),
    Wrong(f"{TRAIN} --experts 1000000000000", 1, "memory must suffice: it ran out."),
    Wrong(f"{TRAIN} --vocab-size 10000000000", 2, "--vocab-size must be at most 1,000,000"),
    Wrong("reproduce --budget -1", 2, "--budget must be a number of minutes, at least 0"),
    Wrong("audit runs/one --data my_text --tokens 0 --out new", 2, "--tokens must be at least 1: got 0"),
    # strategies and names
    Wrong(f"{TRAIN} --strategy los-free", 2, "got 'los-free'. Did you mean loss-free?"),
    Wrong(f"{TRAIN} --strategy lbl:scope=global", 2, "got 'global'. Did you mean global_batch?"),
    Wrong(f"{TRAIN} --strategy lbl:coefficient=-1", 2, "in 'lbl:coefficient=-1', coefficient must be at least 0"),
    Wrong(f"{TRAIN} --strategy loss-free,rate=1e-2", 2, "Did you mean loss-free:rate=1e-2?"),
    Wrong(f"{TRAIN} --strategy loss-free+loss-free", 2, "only one balancer may move the bias"),
    Wrong(f"{COMPARE} --strategies", 2, "--strategies must name at least one: got none"),
    Wrong(f"{COMPARE} --strategies none,lbl", 2, "got 'none,lbl'. Write none lbl."),
    Wrong(f"{COMPARE} --strategies none none", 2, "got none and none, which are the same. Remove one."),
    Wrong("recipes olmo", 2, "got 'olmo'. Did you mean olmoe?"),
    Wrong("reproduce 1-scop", 2, "Did you mean 1-scope?"),
    Wrong("families qwn", 2, "no family of the installed Transformers has it in its name"),
    Wrong("conformance transfomers", 2, "Did you mean transformers?"),
    Wrong("conformance equipoise no-such", 2, "a scenario must be one of"),
    Wrong("conformance os:path", 2, "path in os is none"),
    # text
    Wrong("train --out new --data my_txt SMALL", 2, "my_txt does not exist here. Did you mean my_text?"),
    Wrong("train --out new --data owner/name SMALL", 2, "is written hf:owner/name"),
    Wrong("train --out new --data '' SMALL", 2, "--data must have a value: got an empty one"),
    Wrong("train --out new --data empty SMALL", 2, "empty contains none of these"),
    Wrong("train --out new --data cat.png SMALL", 2, "cat.png is none. Check the path."),
    Wrong("train --out new --data pictures SMALL", 2, "1 not text (cat.png)"),
    Wrong("train --out new --data few SMALL", 1, "at least 4 different documents"),
    Wrong("train --out new --data rows SMALL", 1, "with --text-key"),
    Wrong("compare --out new --data few --workers 1 SMALL", 1, "at least 4 different documents"),
    Wrong("audit runs/one --data nowhere --out new", 2, "nowhere does not exist here"),
    # models
    Wrong(f"{TRAIN} --model my_text", 2, "--model must be a folder with a config.json: my_text has none. Check"),
    Wrong(f"{TRAIN} --model runs/no_model", 2, "is a run without a model"),
    Wrong(f"{TRAIN} --model runs/first", 2, "give one of runs/first/lbl_seed0, runs/first/none_seed0."),
    Wrong(f"{TRAIN} --tokenizer my_text", 2, "must be a tokenizer.json or a folder with one"),
    Wrong("audit nowhere", 2, "nowhere does not exist"),
    Wrong("audit runs/stopped --data my_text --out new", 2, "is a run without a model"),
    Wrong("export-check", 2, "needs MODEL: got none. Folder of a Transformers model, or of a run. `equipoise"),
    Wrong("export-check runs/stopped", 2, "is a run without a model"),
    Wrong("families runs/stopped", 2, "is a run without a model"),
    Wrong("families my_text", 2, "my_text/config.json does not exist"),
    # folders and records
    Wrong("train --out runs/one --data my_text SMALL", 1, "holds audit.json, config.json, evaluations.jsonl and"),
    Wrong("compare --out runs/one --data my_text SMALL", 1, "holds audit.json, config.json, evaluations.jsonl and"),
    Wrong("train --out my.yaml --data my_text SMALL", 1, "my.yaml is a file"),
    Wrong("train --out runs/one --data my_text SMALL --seed 1 --resume", 1, "has seed=0, got 1"),
    Wrong("train --out runs/first --data my_text SMALL --resume", 1, "Use `equipoise compare --resume`"),
    Wrong("train --out runs/torn --data my_text SMALL --resume", 1, "runs/torn/config.json must be JSON"),
    Wrong("compare --out runs/one --data my_text --workers 1 SMALL --resume", 1, "runs/one has no compare.json"),
    Wrong("report", 2, "needs PATH: got none. The folder that was passed as --out"),
    Wrong("report runs/on", 2, "Did you mean runs/one"),
    Wrong("report empty", 2, "it contains none"),
    Wrong("report runs/torn", 1, "runs/torn/config.json must be JSON"),
    Wrong("report runs/one/model", 1, "runs/one/model contains a Transformers model"),
    Wrong("reproduce --budget 0 --page runs", 2, "runs is a folder. Write runs/claims.md."),
    Wrong("reproduce --budget 0 --results my.yaml", 2, "my.yaml is a file"),
    # config files
    Wrong("train --out new --config wrong.yaml", 2, "got stpes in wrong.yaml, line 1. Did you mean steps?"),
    Wrong("train --out new --config empty.yaml", 2, "empty.yaml must hold options: it holds none"),
    Wrong("train --out new --config my.yml", 2, "Did you mean my.yaml"),
    Wrong("train --out new --config runs/one", 2, "Did you mean runs/one/run.yaml?"),
    Wrong("train --out new --config runs/first/compare.yaml", 2, "Use `equipoise compare --config"),
    Wrong("train --out new --config my.yaml --steps 0", 2, "--steps must be at least 1: got 0."),
]

CORRECTED = [  # a wrong call, and the right one with the same folder, in which nothing may be in the way
    (f"{TRAIN} --strategy lbl:scope=global", f"{TRAIN} --strategy lbl:scope=global_batch"),
    ("train --out new --data few SMALL", TRAIN),
    ("train --out new --data rows SMALL", "train --out new --data rows --text-key body SMALL"),
    (f"{TRAIN} --tokenizer cat.png", f"{TRAIN} --tokenizer runs/one/model"),
    (f"{TRAIN} --model my_text", f"{TRAIN} --model runs/one"),
    ("train --out new --config wrong.yaml", "train --out new --config my.yaml"),
    (f"{COMPARE} --strategies none none", f"{COMPARE} --strategies none"),
    ("compare --out new --data few --workers 1 --strategies none SMALL", f"{COMPARE} --strategies none"),
    (f"{COMPARE} --strategies none --sequence-length 9999", f"{COMPARE} --strategies none"),
    (f"{COMPARE} --strategies none --sequence-length 9999", f"{COMPARE} --strategies none --resume"),
    (
        "audit runs/one --data empty --out new",
        "audit runs/one --data my_text --out new --tokens 200 --sequence-length 16",
    ),
]


def make_folder(folder: Path) -> None:
    """Writes text, files and runs for the calls into ``folder``, which must be the current one."""
    documents = {name: "\n\n".join(f"{name} document {i} " * 30 for i in range(40)) for name in ("one", "two")}
    files: dict[str, str | bytes] = {f"my_text/{name}.txt": text for name, text in documents.items()}
    files |= {f"code/py/{i}.py": f"def f{i}(x):\n    return x + {i}\n" * 20 for i in range(8)}
    files |= {f"code/notes/{i}": f"A note on number {i}. " * 30 for i in range(8)}
    files["rows/a.jsonl"] = "".join(f'{{"body": "{"a row of words " * 20}{i}"}}\n' for i in range(20))
    files["rows/b.csv"] = "body\n" + "".join(f"{'some other words ' * 20}{i}\n" for i in range(20))
    files["few/one.txt"] = "a first document\n\na second"
    files["pictures/cat.png"] = b"\x89PNG\r\n\x1a\n\x00\xff" * 50
    files["cat.png"] = files["pictures/cat.png"]
    files["my.yaml"] = "".join(
        f"{name.removeprefix('--')}: {value}\n" for name, value in zip(*[iter(SMALL.split())] * 2, strict=True)
    )
    files["my.yaml"] += "data: my_text\n"
    files["wrong.yaml"] = "stpes: 3\n"
    files["empty.yaml"] = ""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "empty").mkdir()
    for call in (
        "train --out runs/one --data my_text SMALL",
        "compare --out runs/first --data my_text --workers 1 --strategies none lbl SMALL",
        "audit runs/one --data my_text --out runs/audit --tokens 200 --sequence-length 16",
    ):
        main(arguments(call))
    for name in ("torn", "no_model", "stopped"):
        shutil.copytree(folder / "runs/one", folder / "runs" / name)
    (folder / "runs/torn/config.json").write_text('{"format": 1, "stra')
    shutil.rmtree(folder / "runs/no_model/model")
    for name in ("result.json", "evaluations.jsonl", "audit.json", "report.html"):
        (folder / "runs/stopped" / name).unlink()
    shutil.rmtree(folder / "runs/stopped/model")


def arguments(call: str) -> list[str]:
    return shlex.split(call.replace("SMALL", SMALL))

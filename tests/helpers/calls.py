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
    "conformance equipoise one-micro-batch",
    "conformance equipoise one-micro-batch --json",
]


class Wrong(NamedTuple):
    call: str
    code: int
    phrase: str  # in the error
    note: str = ""


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

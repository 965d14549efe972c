"""Fine-tunes a mixture-of-experts model with the Trainer of Transformers, without balancing and with it.

    python examples/finetune_trainer.py
    python examples/finetune_trainer.py --model FOLDER --text TEXT --out runs/tuned

Without --model a small Qwen3-MoE over bytes is pretrained first, with balancing, on the corpus that is packaged with
equipoise, but for its Python code. Without --text the model is fine-tuned on that code. The table at the end is about
held-out rows of the new text: without balancing their load becomes more uneven. --out then holds the balanced model,
the logs of the Trainer, and curves.html: loss and MaxVio of both runs. Takes about half a minute on one core of a CPU.

A model that brings a bias keeps it: its strategy begins with frozen+. docs/which_strategy.md says why.
"""

import argparse
import copy
import json
import lzma
import random
from pathlib import Path

import plotly.graph_objects as go
import transformers
from plotly.subplots import make_subplots

import equipoise
import equipoise_lab
from equipoise import metrics
from equipoise.integrations import EquipoiseCallback

CORPUS = Path(equipoise_lab.__file__).parent / "corpus"
OLD_DOMAINS = ("bible_en", "law_fr", "law_zh", "math_mm", "speech_en", "speech_tr", "verse_zh")
LENGTH, HELD_OUT = 128, 64  # tokens of a row; rows
Rows = list[dict[str, list[int]]]


def corpus_text(domain: str, characters: int) -> str:
    with lzma.open(CORPUS / f"{domain}.jsonl.xz", "rt", encoding="utf-8") as lines:
        return "\n".join(json.loads(line)["text"] for line in lines)[:characters]


def read_text(path: Path) -> str:
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    return "\n\n".join(file.read_text(encoding="utf-8") for file in files)


def to_rows(text: str, tokenizer: transformers.PreTrainedTokenizerBase) -> Rows:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    rows = [ids[first : first + LENGTH] for first in range(0, len(ids) - LENGTH + 1, LENGTH)]
    if len(rows) < 2 * HELD_OUT:
        raise SystemExit(f"The text must fill {2 * HELD_OUT} rows of {LENGTH} tokens: it fills {len(rows)}.")
    random.Random(0).shuffle(rows)
    return [{"input_ids": row, "labels": row} for row in rows]


def choose_strategy(model: transformers.PreTrainedModel) -> str:
    """A loss over the global batch; a model that brings a bias keeps it where it is."""
    balance = equipoise.attach(model, "frozen")
    has_bias = any(bias.any() for bias in balance.biases.values())
    balance.detach()
    return ("frozen+" if has_bias else "") + "lbl:scope=global_batch,coefficient=1e-2"


def train(
    model: transformers.PreTrainedModel, rows: Rows, steps: int, learning_rate: float, strategy: str
) -> tuple[transformers.Trainer, EquipoiseCallback]:
    callback = EquipoiseCallback(strategy)
    arguments = transformers.TrainingArguments(
        output_dir="runs/checkpoints",  # nothing is saved there
        save_strategy="no",
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=learning_rate,
        logging_steps=max(1, steps // 30),
        disable_tqdm=True,
        report_to=[],
    )
    data = dict(train_dataset=rows[HELD_OUT:], eval_dataset=rows[:HELD_OUT])
    trainer = transformers.Trainer(model, arguments, **data, callbacks=[callback])  # the only change
    trainer.remove_callback(transformers.PrinterCallback)  # its lines are long; curves.html shows the logs
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"{strategy}: loss of held-out text: {before:.3f} -> {trainer.evaluate()['eval_loss']:.3f} nats per token")
    return trainer, callback


def draw(histories: dict[str, list[dict[str, float]]], path: Path) -> None:
    titles = ("training loss with balancing loss, nats per token", "MaxVio of a step (0 is even)")
    figure = make_subplots(cols=2, subplot_titles=titles)
    for (strategy, history), color in zip(histories.items(), ("gray", "royalblue"), strict=False):
        for column, name in enumerate(("loss", "equipoise/maxvio_batch"), start=1):
            rows = [row for row in history if name in row]
            steps, values = [row["step"] for row in rows], [row[name] for row in rows]
            line = go.Scatter(x=steps, y=values, name=strategy, line_color=color, showlegend=column == 1)
            figure.add_trace(line, row=1, col=column)
    figure.update_xaxes(title="step").write_html(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model of Transformers with its tokenizer (default: make one)")
    parser.add_argument("--text", type=Path, help="text file, or folder of them (default: the code of the corpus)")
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps of each fine-tuning (default: 80)")
    parser.add_argument("--strategy", help="compared with none (default: lbl, after frozen+ if the model has a bias)")
    parser.add_argument("--out", type=Path, default=Path("runs/tuned"), help="folder for the results (runs/tuned)")
    parser.add_argument("--smoke", action="store_true", help="4 steps on little text, in a few seconds: does it run?")
    options = parser.parse_args()
    steps, characters = (4, 20_000) if options.smoke else (options.steps, 100_000)

    transformers.set_seed(0)
    if options.model:
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model)
    else:
        tokenizer = transformers.ByT5Tokenizer(extra_ids=0)  # a token is a byte
        sizes = dict(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, moe_intermediate_size=32)
        heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=32)
        config = transformers.Qwen3MoeConfig(**sizes, **heads, num_experts=16, num_experts_per_tok=2)
        model = transformers.AutoModelForCausalLM.from_config(config)
        old_rows = to_rows("".join(corpus_text(domain, characters) for domain in OLD_DOMAINS), tokenizer)
        pretraining = "lbl:scope=global_batch,coefficient=1e-2"
        _, callback = train(model, old_rows, 4 if options.smoke else 120, 3e-3, pretraining)
        callback.detach()
    new_text = read_text(options.text) if options.text else corpus_text("code_py", 3 * characters)
    rows = to_rows(new_text, tokenizer)

    table, histories = [], {}
    for strategy in ("none", options.strategy or choose_strategy(model)):
        trainer, callback = train(copy.deepcopy(model), rows, steps, 2e-3, strategy)
        with callback.balance.measuring() as load:
            loss = trainer.evaluate()["eval_loss"]
        figures = metrics.max_violation(load), metrics.dead_experts(load), loss
        table.append("{:42} {:7.2f} {:13.0f} {:11.3f}".format(strategy, *figures))
        histories[strategy] = trainer.state.log_history
    trainer.save_model(str(options.out / "model"))  # with its biases
    tokenizer.save_pretrained(options.out / "model")
    trainer.state.save_to_json(str(options.out / "trainer_state.json"))
    draw(histories, options.out / "curves.html")
    print(f"\n{'strategy':42} {'MaxVio':>7} {'dead experts':>13} {'loss, nats':>11}", *table, sep="\n")


if __name__ == "__main__":
    main()

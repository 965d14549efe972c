"""Fine-tunes a mixture-of-experts model on your own text with the Trainer of Transformers, with balancing.

equipoise train --out runs/base                                                 # or use a model you have
python examples/finetune_trainer.py runs/base/model TEXT.txt --out runs/tuned   # or a folder of .txt files

Afterwards ``--out`` holds the model, the Trainer's logs and ``curves.html``: loss and MaxVio over the steps.
"""

import argparse
from pathlib import Path

import plotly.graph_objects as go
import transformers
from plotly.subplots import make_subplots

from equipoise.integrations import EquipoiseCallback

LENGTH = 128  # tokens per row


def read_rows(text: Path, tokenizer: transformers.PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """Cuts the text into rows, one file after another. Tokens left over at the end are dropped."""
    files = sorted(text.rglob("*.txt")) if text.is_dir() else [text]
    ids = [i for file in files for i in tokenizer(file.read_text(encoding="utf-8"))["input_ids"]]
    rows = [ids[first : first + LENGTH] for first in range(0, len(ids) - LENGTH + 1, LENGTH)]
    if len(rows) < 16:
        raise SystemExit(f"The text must fill 16 rows of {LENGTH} tokens: {text} fills {len(rows)}. Give more text.")
    return [{"input_ids": row, "labels": row} for row in rows]


def draw(logs: list[dict[str, float]], path: Path) -> None:
    figure = make_subplots(
        cols=2, subplot_titles=("training loss with balancing loss, nats per token", "MaxVio of a step (0 is even)")
    )
    for column, name in enumerate(("loss", "equipoise/maxvio_batch"), start=1):
        rows = [row for row in logs if name in row]
        steps, values = [row["step"] for row in rows], [row[name] for row in rows]
        figure.add_trace(go.Scatter(x=steps, y=values, name=name), row=1, col=column)
    figure.update_xaxes(title="step").update_layout(showlegend=False)
    figure.write_html(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a Transformers model with its tokenizer")
    parser.add_argument("text", type=Path, help="a text file, or a folder of text files")
    parser.add_argument("--out", type=Path, default=Path("runs/tuned"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--strategy", default="loss-free:rate=1e-3+lbl:scope=global_batch,coefficient=1e-3")
    options = parser.parse_args()

    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model)
    rows = read_rows(options.text, tokenizer)
    held_out = max(4, len(rows) // 20)
    arguments = transformers.TrainingArguments(
        output_dir=str(options.out / "checkpoints"),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
        learning_rate=5e-4,
        bf16=True,
        warmup_steps=options.steps // 10,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=max(1, options.steps // 2),
        save_strategy="no",
        report_to=[],
        use_cpu=not transformers.utils.is_torch_cuda_available(),
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows[held_out:],
        eval_dataset=rows[:held_out],
        callbacks=[EquipoiseCallback(options.strategy)],  # the only change
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"loss of held-out text: {before:.3f} -> {trainer.evaluate()['eval_loss']:.3f} nats per token")
    trainer.save_model(str(options.out / "model"))
    tokenizer.save_pretrained(options.out / "model")
    trainer.state.save_to_json(str(options.out / "trainer_state.json"))
    draw(trainer.state.log_history, options.out / "curves.html")
    print(f"{options.out / 'model'}, {options.out / 'curves.html'}")


if __name__ == "__main__":
    main()

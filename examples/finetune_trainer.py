"""Fine-tunes a mixture-of-experts model on your own text with the Trainer of Transformers, balanced, and draws it.

equipoise train --out runs/base                                                 # or any model that you have
python examples/finetune_trainer.py runs/base/model TEXT.txt --out runs/tuned   # a folder of .txt does too

``--out`` then holds the model, the Trainer's logs and ``curves.html``: loss and MaxVio over the steps.
"""

import argparse
from pathlib import Path

import plotly.graph_objects as go
import transformers
from plotly.subplots import make_subplots

from equipoise.integrations import EquipoiseCallback

LENGTH = 128  # tokens a row


def read_rows(text: Path, tokenizer: transformers.PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """The text, one file after another, cut into rows; what is left over at the end is dropped."""
    files = sorted(text.rglob("*.txt")) if text.is_dir() else [text]
    ids = [i for file in files for i in tokenizer(file.read_text(encoding="utf-8"))["input_ids"]]
    rows = [ids[first : first + LENGTH] for first in range(0, len(ids) - LENGTH + 1, LENGTH)]
    if len(rows) < 16:
        raise SystemExit(f"the text must fill 16 rows of {LENGTH} tokens: {text} fills {len(rows)}. Give more text.")
    return [{"input_ids": row, "labels": row} for row in rows]


def draw(logs: list[dict[str, float]], path: Path) -> None:
    figure = make_subplots(
        cols=2, subplot_titles=("training loss with balancing loss, nats a token", "MaxVio of a step (0 is even)")
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
    parser.add_argument("text", type=Path, help="a text file, or a folder of them")
    parser.add_argument("--out", type=Path, default=Path("runs/tuned"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--strategy", default="loss-free:rate=1e-3+lbl:scope=global_batch,coefficient=1e-3")
    asked = parser.parse_args()

    tokenizer = transformers.AutoTokenizer.from_pretrained(asked.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(asked.model)
    rows = read_rows(asked.text, tokenizer)
    held_out = max(4, len(rows) // 20)
    arguments = transformers.TrainingArguments(
        output_dir=str(asked.out / "checkpoints"),
        max_steps=asked.steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
        learning_rate=5e-4,
        bf16=True,
        warmup_steps=asked.steps // 10,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=max(1, asked.steps // 2),
        save_strategy="no",
        report_to=[],
        use_cpu=not transformers.utils.is_torch_cuda_available(),
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows[held_out:],
        eval_dataset=rows[:held_out],
        callbacks=[EquipoiseCallback(asked.strategy)],  # that is all
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"loss of held-out text: {before:.3f} -> {trainer.evaluate()['eval_loss']:.3f} nats a token")
    trainer.save_model(str(asked.out / "model"))
    tokenizer.save_pretrained(asked.out / "model")
    trainer.state.save_to_json(str(asked.out / "trainer_state.json"))
    draw(trainer.state.log_history, asked.out / "curves.html")
    print(f"{asked.out / 'model'}, {asked.out / 'curves.html'}")


if __name__ == "__main__":
    main()

"""How fast `nn.MoE` and the lab are: the sections of docs/evidence/speed_lab.md, each from a stored result."""

from typing import Any

from page_parts import Section, Target, disturbance_note, explain_misses, format_ratio, format_verdict, table


def experts(stored: dict[str, Any]) -> Section:
    def shape(row: dict[str, Any]) -> str:
        return f"{row['dim']}, {row['hidden']}, {row['experts']}, {row['k']}, {row['tokens']}, {row['dtype']}"

    limit = stored["limit"]
    met = {shape(row): row["ours_over_best_stock"]["median"] <= limit for row in stored["rows"]}
    ratios = [row["ours_over_best_stock"]["median"] for row in stored["rows"]]
    target = Target(
        "`nn.MoE`, forward and backward, over the best of Transformers, every shape",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
        f"{limit}",
        stored["holds"],
        "Both ways compute the same grouped products. The larger their share of the time, the less there is to gain "
        "around them.",
        "over Transformers",
    )
    dense_target = Target(
        "`nn.MoE`, forward and backward, over a dense SwiGLU, every shape",
        _dense_ranges(stored["rows"]),
        ", ".join(f"{limit} in {dtype}" for dtype, limit in stored["dense_limits"].items()),
        stored["dense_holds"],
        "Each expert multiplies few rows by a matrix of its own, which is slower than one large product. And every "
        "expert's matrix is read and gets a gradient.",
        "over a dense SwiGLU",
    )
    lines = [
        "The table times forward and backward of one layer. *Ours* is `nn.MoE`. *Best* is the block of Qwen3-MoE, "
        "under the fastest way in which Transformers computes experts. *Dense* is the floor: one dense SwiGLU with as "
        "many operations as the experts of a token.",
        "",
        *table(
            ("D, F, E, k, tokens", "ours, ms", "best of Transformers", "ours over it", f"target {limit}",
             "ours over dense", "best over dense"),
            (
                (
                    shape(row),
                    f"{row['milliseconds']['ours']:.1f}",
                    f"`{row['best_stock']}`, {row['milliseconds'][row['best_stock']]:.1f} ms",
                    format_ratio(row["ours_over_best_stock"], 2),
                    format_verdict(met[shape(row)]),
                    format_ratio(row["ours_over_dense"], 2),
                    format_ratio(row["best_stock_over_dense"], 2),
                )
                for row in stored["rows"]
            ),
        ),
        "D: width of the model. F: width of an expert. E: number of experts. k: experts per token.",
        "",
    ]  # fmt: skip
    targets = [target, dense_target]
    return Section("Experts", [*lines, *explain_misses(targets)], targets)


def _dense_ranges(rows: list[dict[str, Any]]) -> str:
    by_dtype: dict[str, list[float]] = {}
    for row in rows:
        by_dtype.setdefault(row["dtype"], []).append(row["ours_over_dense"]["median"])
    return ", ".join(f"{min(r):.2f} to {max(r):.2f} in {dtype}" for dtype, r in by_dtype.items())


SIDES = {
    "trainer": "transformers.Trainer",
    "lab": "the lab",
    "lab_with_grouped_mm": "the lab with Transformers' experts",
}


def trainer(stored: dict[str, Any]) -> Section:
    lab = next(row for row in stored["rows"] if row["side"] == "lab")
    target = Target(
        "speed of the lab over transformers.Trainer (at least)",
        format_ratio(lab["over_trainer"], 2),
        f"{stored['limit']}",
        stored["holds"],
        "Attention, norms and dense products are those of Transformers on both sides.",
    )
    lines = [
        "Both sides train the same model from the same weights on the same micro-batches "
        f"({stored['tokens_per_step']:,} tokens per step), with nothing attached. Each runs in its own processes.",
        "",
        *table(
            ("", "tokens/s", "speed over the Trainer"),
            (
                (
                    SIDES[row["side"]],
                    f"{row['tokens_per_second']:,}",
                    "1" if row["side"] == "trainer" else format_ratio(row["over_trainer"], 2),
                )
                for row in stored["rows"]
            ),
        ),
    ]
    return Section("The lab beside transformers.Trainer", [*lines, *explain_misses([target])], [target])


PARTS = {
    "data": "data: the micro-batches of the step",
    "forward": "forward, including the loss of the text and the counting at the routers",
    "backward": "backward, including that of the balancing loss",
    "clipping": "clipping",
    "optimizer": "optimizer",
    "balancing": "balancing: `loss()`, `step()`, `metrics()`",
    "records": "records: what a run writes about a step",
    "rest": "rest: the step minus all of these",
}


def step_parts(stored: dict[str, Any]) -> Section:
    step, run = stored["step"], stored["run"]
    share = {row["part"]: row["share"] for row in step["parts"]}
    extra = sum(row["over_step"] for row in run["rows"])
    lines = [
        f"The default model trains under `{stored['strategy']}` in {stored['dtype']}, on one thread. A step takes "
        f"{step['seconds']:.3f} s, which is {stored['tokens_per_step'] / step['seconds']:,.0f} tokens/s. Forward and "
        f"backward are {share['forward'] + share['backward']:.1%} of it. Times are medians over {step['steps']} steps; "
        f"together they are {step['seconds_of_parts']:.3f} s. Shares refer to the sum over all steps.",
        "",
        *table(
            ("part", "ms", "share"),
            ((PARTS[row["part"]], f"{1000 * row['seconds']:.1f}", f"{row['share']:.1%}") for row in step["parts"]),
        ),
        f"A default run ({run['steps']} steps) also evaluates and saves. Spread over its steps, that adds {extra:.1%} "
        "to each step:",
        "",
        *table(
            ("", "s", "times per run", "added to each step"),
            (
                (row["what"], f"{row['seconds']:.2f}", f"{row['times']}", f"{row['over_step']:.1%}")
                for row in run["rows"]
            ),
        ),
        *disturbance_note(stored),
    ]
    return Section("Where a step of the lab goes", lines)


def faster_way(ratio: dict[str, float]) -> str:
    """The faster way, by the ratio of the other way's time to the lab's."""
    if ratio["low"] > 1:
        return "the lab's way"
    return "the other way" if ratio["high"] < 1 else "undecided"


def steps_to_pay_back(row: dict[str, Any]) -> str:
    """The number of steps after which compiling has saved the time it took. Empty if it is not the faster way."""
    if faster_way(row["ratio"]) != "the other way":
        return ""
    return f"{row['compile_seconds'] / (row['seconds_lab'] * (1 - row['ratio']['median'])):,.0f}"


def alternatives(stored: dict[str, Any], attention: dict[str, Any]) -> Section:
    page_faults = next(row for row in stored["remedies"] if "minor_faults_lab" in row)
    failed = [row for row in stored["compiled"] if row["error"] is not None]
    lines = [
        "Each row compares a choice of the lab with another way. The ratio is the time of a step the other way, "
        "divided by its time the lab's way. Above 1 the lab's way is faster.",
        "",
        *table(
            ("", "the lab's way", "the other way", "ms, lab", "ms, other", "other over lab", "faster"),
            (
                (
                    row["remedy"],
                    row["lab"],
                    row["other"],
                    f"{1000 * row['seconds_lab']:.0f}",
                    f"{1000 * row['seconds_other']:.0f}",
                    format_ratio(row["ratio"], 2),
                    "undecided"
                    if row["remedy"] == "threads" and disturbance_note(stored)
                    else faster_way(row["ratio"]),
                )
                for row in stored["remedies"]
            ),
        ),
        f"Minor page faults a step: {page_faults['minor_faults_lab']:,.0f} with freed memory kept, "
        f"{page_faults['minor_faults_other']:,.0f} without.",
        "",
        "The next table compares decoder layers that `torch.compile` compiled with the lab's own step, in the same "
        "precision. The ratio excludes the time to compile. If compiling is faster, the last column says how many "
        f"steps pay for it. A default run has {stored['run']['steps']} steps.",
        "",
        *table(
            ("", "compiled in, s", "ms, lab", "ms, compiled", "compiled over lab", "faster", "steps to pay it back"),
            (
                (row["way"], "", "", "", "does not run", "", "")
                if row["error"] is not None
                else (
                    row["way"],
                    f"{row['compile_seconds']:.0f}",
                    f"{1000 * row['seconds_lab']:.0f}",
                    f"{1000 * row['seconds_other']:.0f}",
                    format_ratio(row["ratio"], 2),
                    faster_way(row["ratio"]),
                    steps_to_pay_back(row),
                )
                for row in stored["compiled"]
            ),
        ),
        *(line for row in failed for line in (f"Does not run, {row['way']}: `{row['error']}`", "")),
        *disturbance_note(stored),
        "Attention: on a CPU the lab uses `eager`.",
        "",
        *table(
            ("", "s a step, eager", "s a step, sdpa", "eager over sdpa, median (quartiles)"),
            (
                (
                    "with norms on queries and keys",
                    f"{attention['seconds']['eager']:.2f}",
                    f"{attention['seconds']['sdpa']:.2f}",
                    "{:.2f} ({:.2f} to {:.2f})".format(attention["ratio"], *attention["quartiles"]),
                ),
            ),
        ),
    ]
    return Section("What the lab's choices are worth", lines)

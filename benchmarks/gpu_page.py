"""The page of `gpu.py`: docs/evidence/gpu.md."""

from collections.abc import Sequence
from typing import Any

from gpu_parts import FAILED, NOT_RUN, OK, ROOT, Part, Row
from page_parts import format_ratio, source_line, table

PAGE = ROOT / "docs" / "evidence" / "gpu.md"
INTRODUCTION = [
    "# On a GPU",
    "",
    "This page says what has been seen on a GPU, part by part, and what has not.",
    "",
    "Do not edit it by hand: `python benchmarks/gpu.py` writes it. `make gpu` runs all parts on a machine with one "
    "GPU, in at most eight minutes. It stores the result in `benchmarks/results/gpu.json`.",
    "",
]
NOTHING_SEEN = [
    "**Nothing on this page has been seen on a GPU.** No result of one is stored. Until there is one, these tests on a "
    "CPU stand for it:",
    "",
    "- Counts, losses, gradients and biases are compared with an exact reference "
    "(`library/test_grid.py::test_one_process`).",
    "- The host must not wait for the device. This is tested on fake tensors of an accelerator "
    "(`library/test_no_synchronisation.py::test_counting_losses_gradients_and_steps_ask_nothing_of_the_device`).",
    "- A capture of a counting forward must be refused. This is tested with a device that only claims to capture.",
    "- Kernel launches are counted as operations: see [Operations and bytes](speed.md#operations-and-bytes).",
    "- The kernels of `fused=True` run in Triton's interpreter and are compiled for GPUs (`library/test_kernels.py`).",
    "- The backend gloo stands in for NCCL.",
    "",
    "So no time, no memory, no kernel, no CUDA graph and no NCCL has been seen.",
    "",
]
VERDICTS = {OK: "ok", FAILED: "**failed**", NOT_RUN: "not run"}


def page(parts: Sequence[Part], result: dict[str, Any] | None) -> str:
    """``result``: what ``gpu.run_all`` gives; None: there is none."""
    if result is None:
        rows = ((part.title, part.shows, "not seen") for part in parts)
        lines = [*INTRODUCTION, *NOTHING_SEEN, *table(("part", "what it would show", "on a GPU"), rows)]
        return "\n".join(lines)
    lines = [*INTRODUCTION, *summary(result), *source_line(result)]
    entries = result["parts"]
    lines += table(
        ("part", "what it shows if it is ok", "", "s", ""),
        ((e["title"], e["shows"], VERDICTS[e["status"]], f"{e['seconds']:.0f}", cell(e["message"])) for e in entries),
    )
    for e in entries:
        if e["rows"]:
            rows = ((f"`{row['what']}`", VERDICTS[row["status"]], describe(row)) for row in e["rows"])
            lines += [f"## {e['title']}", "", *table(("", "", ""), rows)]
    return "\n".join(lines)


def summary(result: dict[str, Any]) -> list[str]:
    """What has been seen and what has not."""
    titles = {status: [entry["title"] for entry in result["parts"] if entry["status"] == status] for status in VERDICTS}
    if result["device"] != "cuda":
        first = "**Nothing on this page has been seen on a GPU:** this is a run on a CPU."
    elif result["small"]:
        first = "**This is a run on small sizes.** Its times say nothing."
    else:
        first = "This was seen on one GPU, with one rank."
    seen = [f"{len(titles[OK])} of {len(result['parts'])} parts are ok."]
    if titles[FAILED]:
        seen.append(f"Failed: {', '.join(titles[FAILED])}.")
    if titles[NOT_RUN]:
        seen.append(f"Not run, so not seen: {', '.join(titles[NOT_RUN])}.")
    skipped = sum(row["status"] == NOT_RUN for e in result["parts"] if e["status"] != NOT_RUN for row in e["rows"])
    if skipped:
        seen.append(f"In the other parts {skipped} rows were not run.")
    seen.append("Several GPUs have not been seen.")
    return [" ".join((first, *seen)), ""]


def cell(text: str) -> str:
    return text.replace("|", "/")


def describe(row: Row) -> str:
    """The message of a row, or its figures."""
    if row["status"] != OK:
        return cell(row["message"])
    figures = ((name, value) for name, value in row.items() if name not in ("what", "status") and value is not None)
    return "; ".join(f"{name} {format_figure(value)}" for name, value in figures)


def format_figure(value: Any) -> str:
    """
    >>> format_figure(1234567), format_figure(8.2e-7), format_figure(12.3456), format_figure("eager")
    ('1,234,567', '8.2e-07', '12.3', 'eager')
    """
    if isinstance(value, dict):
        return format_ratio(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)

"""Writes the README's table and figure from a folder of `equipoise compare`.

    equipoise compare --out runs/demo
    python benchmarks/demo.py runs/demo      # stores benchmarks/results/demo.json, writes the README's table and figure
    python benchmarks/demo.py --check        # fails if the README's table is not that of the stored result

The figure is a screenshot of the report, taken by Chromium (needs playwright and /usr/bin/chromium).
"""

import json
import os
import platform
import sys
from pathlib import Path

import readme

from equipoise_lab.train.config import Compare

ROOT = Path(__file__).parent.parent
STORED = ROOT / "benchmarks" / "results" / "demo.json"
COLUMNS = {
    "strategy": ("strategy", "`{}`"),
    "maxvio_global": ("MaxVio, test text", "{:.2f}"),
    "maxvio_batch": ("MaxVio, batch", "{:.2f}"),
    "dead_experts": ("dead experts", "{:.0f}"),
    "domain_information_bits": ("domain information, bits", "{:.2f}"),
    "val_nats": ("loss, nats", "{:.3f}"),
    "val_bits_per_byte": ("bits per byte", "{:.3f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
}


def store(folder: Path) -> dict:
    config = json.loads(next(folder.glob("*/config.json")).read_text())
    stored = {
        "command": config["command"],
        "options": config["options"],
        "date": config["began"][:10],
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, no accelerator",
        "versions": config["versions"],
        "results": json.loads((folder / "results.json").read_text()),
        "floor": json.loads((folder / "results.json").read_text())[0]["maxvio_floor"],
    }
    STORED.write_text(json.dumps(stored, indent=1) + "\n")
    return stored


def table(stored: dict) -> str:
    lines = ["| " + " | ".join(title for title, _ in COLUMNS.values()) + " |", "|---" * len(COLUMNS) + "|"]
    for row in stored["results"]:
        lines.append("| " + " | ".join(template.format(row[key]) for key, (_, template) in COLUMNS.items()) + " |")
    versions = ", ".join(f"{name} {version}" for name, version in stored["versions"].items())
    lines += [
        "",
        f"`{stored['command']}` on {stored['hardware']}, {stored['date']}, {versions}. The sampling floor of "
        f"MaxVio on the test text is {stored['floor']:.3f}.",
        "",
    ]
    return "\n".join(lines)


def figure(folder: Path) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900}, device_scale_factor=1.5)
        page.goto((folder / "report.html").absolute().as_uri())
        page.wait_for_timeout(2000)
        page.add_style_tag(content="button { display: none }")
        page.locator("section[aria-labelledby=h-heat] .grid").first.screenshot(
            path=ROOT / "docs" / "figures" / "demo.png"
        )
        browser.close()


def main() -> None:
    if sys.argv[1:] == ["--check"]:
        stored = json.loads(STORED.read_text())
        if not readme.check("demo", table(stored)):
            sys.exit("README.md must have the table of benchmarks/results/demo.json: run benchmarks/demo.py FOLDER.")
        defaults = Compare(out=Path("runs/demo"))
        options = defaults.shared()  # an option newer than the result had its default then
        options |= {name: value for name, value in stored["options"].items() if name in options}
        if options != defaults.shared() or [r["strategy"] for r in stored["results"]] != list(defaults.strategies):
            sys.exit("benchmarks/results/demo.json must have the defaults of `equipoise compare`: run it again.")
        return
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    readme.replace("demo", table(store(folder)))
    figure(folder)


if __name__ == "__main__":
    main()

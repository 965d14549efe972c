"""Executes the notebooks of the handbook and stores their outputs: ``python docs/tools/notebooks.py``.

Each one runs in an empty folder, with the kernel of this Python, one after the other. What changes from run to run is
left out of the file. A notebook that is too slow or too large is not stored. With names, as in ``five_minutes``, only
these run. ``--check`` executes nothing: it says whether every stored notebook was executed and is small enough.

The alternative text of a cell's pictures is its metadata ``alt``.
"""

import argparse
import base64
import io
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from PIL import Image

__all__ = ["NOTEBOOKS", "execute", "problems", "to_markdown"]

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))
MAX_SECONDS = 600  # of a notebook; on a free core each takes about one minute
MAX_BYTES = 300_000  # of a file
MAX_OUTPUT_BYTES = 100_000  # of a cell
VOLATILE = {
    "an address in memory": re.compile(r" at 0x[0-9a-f]{6,}"),
    "a path of the machine": re.compile(r"(?:^|[\s'\"(])/(?:tmp|home|root|usr|work|Users)/"),
}
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# Fences name their language, as on every page. A picture has the alternative text of its cell.
PAGE = """{% extends 'markdown/index.md.j2' %}
{% block stream %}
```text
{{ output.text.rstrip() }}
```
{% endblock stream %}
{% block data_text scoped %}
```text
{{ output.data['text/plain'].rstrip() }}
```
{% endblock data_text %}
{% block data_png %}
![{{ output | get_metadata('alt', 'image/png') }}]({{ output.metadata.filenames['image/png'] | path2url }})
{% endblock data_png %}
"""


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook, executed in ``folder``, without what changes from run to run. Raises what a cell raises."""
    notebook = nbformat.read(path, as_version=4)
    deadline = time.monotonic() + MAX_SECONDS
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout_func=lambda cell: max(1, round(deadline - time.monotonic())),
        resources={"metadata": {"path": str(folder)}},
        extra_arguments=["--log-level=ERROR"],  # else it warns that it talks over TCP
        coalesce_streams=True,
        record_timing=False,
    )
    commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # that of equipoise is in there
    client.execute(env=os.environ | {"PATH": commands})
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({key: cell.metadata[key] for key in ("alt", "tags") if key in cell.metadata})
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _with_256_colours(output.data["image/png"])
                output.metadata = nbformat.from_dict({"image/png": {"alt": cell.metadata.get("alt", "")}})
    return notebook


def _with_256_colours(png: str) -> str:
    """The same picture in about a third of the bytes."""
    small = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(small, format="PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def problems(notebook: nbformat.NotebookNode) -> list[str]:
    """Why this executed notebook must not be stored."""
    found = [reason for cell in notebook.cells if cell.cell_type == "code" for reason in _problems_of_cell(cell)]
    size = len(nbformat.writes(notebook).encode())
    return found + ([f"it has {size:,} bytes, at most {MAX_BYTES:,} are allowed"] if size > MAX_BYTES else [])


def _problems_of_cell(cell: nbformat.NotebookNode) -> Iterator[str]:
    where = f"the cell that begins with {cell.source.splitlines()[0]!r}"
    if cell.execution_count is None:
        yield f"{where} was not executed"
    for output in cell.outputs:
        data = output.get("data", {})
        text = output.get("text", "") + data.get("text/plain", "")
        size = len(str(data or text).encode())
        if output.output_type == "error" or output.get("name") == "stderr":
            yield f"{where} gives an error or a warning: {output.get('evalue', text)[:200]}"
        if size > MAX_OUTPUT_BYTES:
            yield f"{where} has an output of {size:,} bytes, at most {MAX_OUTPUT_BYTES:,} are allowed"
        if "image/png" in data and not output.metadata.get("image/png", {}).get("alt"):
            yield f"{where} has a picture without alternative text: give the cell metadata `alt`"
        for what, pattern in VOLATILE.items():
            if pattern.search(text):
                yield f"{where} shows {what}"


def to_markdown(path: Path, folder: Path) -> Path:
    """Writes the stored notebook as a page, ``NAME.md``, with its pictures in ``NAME_files/``. Returns the page."""
    notebook = nbformat.read(path, as_version=4)
    resources: dict[str, Any] = {"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
    text, resources = MarkdownExporter(raw_template=PAGE).from_notebook_node(notebook, resources)
    for name, content in resources["outputs"].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    text = re.sub(r"^```(\w+)\n%%\w+\n", r"```\1\n", text, flags=re.MULTILINE)  # a terminal needs no %%sh
    page = folder / f"{path.stem}.md"
    page.write_text(text.strip() + "\n", encoding="utf-8")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="which notebooks, as in five_minutes; by default all")
    parser.add_argument("--check", action="store_true", help="execute nothing, check what is stored")
    options = parser.parse_args()
    if unknown := set(options.names) - {path.stem for path in NOTEBOOKS}:
        parser.error(f"there is no notebook {', '.join(sorted(unknown))}")
    is_bad = False
    for path in [path for path in NOTEBOOKS if not options.names or path.stem in options.names]:
        start = time.monotonic()
        if options.check:
            notebook = nbformat.read(path, as_version=4)
        else:
            with tempfile.TemporaryDirectory() as folder:
                notebook = execute(path, Path(folder))
        found = problems(notebook)
        if not found and not options.check:
            nbformat.write(notebook, path)
        result = "good" if options.check else f"{time.monotonic() - start:.0f} s, {path.stat().st_size:,} bytes"
        print(f"{path.relative_to(ROOT)}: {'; '.join(found) or result}", flush=True)
        is_bad = is_bad or bool(found)
    sys.exit(is_bad)


if __name__ == "__main__":
    main()

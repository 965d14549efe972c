"""Loads the text of a data set of the Hub."""

from equipoise.errors import EquipoiseError, UsageError
from equipoise_lab.train.text_files import checked_text, first_line
from equipoise_lab.train.text_problems import Problems

__all__ = ["load_data_set"]


def load_data_set(name: str, text_key: str) -> dict[str, list[str]]:
    """The documents of the split ``train`` by domain: its column ``domain``, else its configuration or its name."""
    try:
        import datasets  # slow to import, and only needed here

        rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # offline, unknown, gated, ...: the library has no common error class
        raise UsageError(
            f"The library datasets must be able to load {name}: {type(error).__name__}: {first_line(error)}. Check the "
            "name, or save the data set as a folder of .parquet files while you are online."
        ) from None
    if text_key not in rows.column_names:
        raise EquipoiseError(
            f'A data set must have the column "{text_key}": {name} has the columns {rows.column_names}. Name the '
            "column of the text with --text-key."
        )
    texts, problems = [], Problems()
    for number, text in enumerate(rows[text_key], start=1):
        with problems.collect():
            texts.append(checked_text(text, text_key, f"{name}, row {number}"))
    problems.raise_error()
    if "domain" in rows.column_names:
        labels = [str(label) for label in rows["domain"]]
    else:
        config = rows.info.config_name
        labels = [config if config and config != "default" else name.split("/")[-1]] * len(texts)
    documents: dict[str, list[str]] = {label: [] for label in sorted(set(labels))}
    for label, text in zip(labels, texts, strict=True):
        documents[label].append(text)
    if not documents:
        raise EquipoiseError(f"A data set must have rows: the split train of {name} has none. Choose another data set.")
    return documents

"""The command ``equipoise``, also ``python -m equipoise``. Its code is in ``equipoise_lab``."""

import sys


def main() -> None:
    """Runs the command line, or says how to install it."""
    try:
        from equipoise_lab.cli import main as run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "equipoise":
            raise
        sys.exit(  # 1, with this text on stderr
            f"equipoise: error: the command needs the lab, and {error.name} is not installed. In a clone: "
            "pip install -e '.[lab]'"
        )
    run()


if __name__ == "__main__":
    main()

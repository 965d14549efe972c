from lab.cli.conftest import error_of  # noqa: F401

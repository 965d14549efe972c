import pytest


@pytest.fixture(autouse=True)
def _pages_without_stills(request, monkeypatch):
    """Drawing the still pictures takes most of the time of a page. The tests of the report draw them."""
    if "report" not in request.path.parts:
        monkeypatch.setattr("equipoise_lab.report.contents.still", lambda figure: "")

"""Saves plotly figures as pictures. Needs playwright and /usr/bin/chromium."""

from pathlib import Path
from typing import Any

__all__ = ["photograph"]


def photograph(figure: Any, path: Path) -> None:
    """Draws a plotly figure in Chromium and saves a screenshot at twice its size."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        size = {"width": figure.layout.width, "height": figure.layout.height}
        page = browser.new_page(viewport=size, device_scale_factor=2)
        page.set_content(figure.to_html(include_plotlyjs=True, config={"staticPlot": True}))
        page.locator(".js-plotly-plot .main-svg").first.wait_for()
        page.wait_for_timeout(500)
        page.locator(".js-plotly-plot").screenshot(path=path)
        browser.close()

"""The notebook in JupyterLab, in a real browser: run from the menu, it shows bars and figures and no error.

`make browser` runs this, where Debian's chromium (or another Chromium, named by $CHROMIUM) is installed. Screenshots
stay in runs/browser/.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

sync_api = pytest.importorskip("playwright.sync_api")

REPOSITORY = Path(__file__).parents[1]
SCREENSHOTS = REPOSITORY / "runs/browser"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium")]


@pytest.fixture
def lab(tiny_notebook, tmp_path, monkeypatch) -> Iterator[str]:
    """The address of a JupyterLab whose folder holds the notebook."""
    nbformat.write(tiny_notebook, tmp_path / "S9_Final.ipynb")
    for kind in ("CONFIG", "DATA", "RUNTIME"):
        monkeypatch.setenv(f"JUPYTER_{kind}_DIR", str(tmp_path / "jupyter" / kind.lower()))
    settings = {
        "notebook-extension/tracker": {"windowingMode": "none"},  # else only what is in the window is there to be seen
        "apputils-extension/notification": {"fetchNews": "false"},
    }
    for name, content in settings.items():
        file = tmp_path / f"jupyter/settings/@jupyterlab/{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(content))
    monkeypatch.setenv("JUPYTERLAB_SETTINGS_DIR", str(tmp_path / "jupyter/settings"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root"]
    options = ["--expose-app-in-browser", "--IdentityProvider.token=", f"--ServerApp.root_dir={tmp_path}"]
    with (
        (tmp_path / "lab.log").open("w") as log,
        subprocess.Popen([*command, *options], stdout=log, stderr=log) as server,
    ):
        address = f"http://127.0.0.1:{port}"
        try:
            for _ in range(120):
                try:
                    urllib.request.urlopen(f"{address}/api", timeout=1)
                    break
                except OSError:
                    time.sleep(0.5)
            else:
                pytest.fail((tmp_path / "lab.log").read_text())
            yield address
        finally:
            server.terminate()


CODE_CELLS = """window.jupyterapp.shell.currentWidget.content.model.sharedModel.toJSON().cells.filter(
    cell => cell.cell_type === "code")"""
ENDED = f"""{CODE_CELLS}.some(cell => cell.outputs.some(output => output.output_type === "error"))
    || {CODE_CELLS}.every(cell => cell.execution_count)"""


def test_restart_and_run_all_shows_bars_and_figures_and_no_error(lab):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(120_000)
        page.goto(f"{lab}/lab/tree/S9_Final.ipynb?reset")
        page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        page.wait_for_function(
            "window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'"
        )
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Restart Kernel and Run All Cells…").click()
        page.get_by_role("button", name="Confirm Kernel Restart").click()

        bar = page.locator(".jp-OutputArea .widget-hprogress, .jp-OutputArea .jupyter-widgets [role=progressbar]").first
        bar.wait_for()
        bar.scroll_into_view_if_needed()
        page.screenshot(path=SCREENSHOTS / "bar.png")

        page.wait_for_function(ENDED, timeout=240_000)
        cells = page.evaluate(CODE_CELLS)
        assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))

        figures = page.locator(".jp-OutputArea-output img")
        assert figures.count() >= 6
        for figure in figures.all():
            assert figure.evaluate("image => image.complete && image.naturalWidth > 300")
        assert not page.locator("[data-mime-type='application/vnd.jupyter.stderr']").count()
        assert not page.locator(".jp-OutputArea .widget-hprogress").count(), "a bar stayed behind"
        longest = page.evaluate("Math.max(...Array.from(document.querySelectorAll('*'), part => part.scrollHeight))")
        height = longest + 200  # with the bars above, so that the whole notebook is in the picture
        page.set_viewport_size({"width": 1280, "height": height})
        page.locator(".jp-Cell").first.scroll_into_view_if_needed()
        page.wait_for_timeout(1000)
        last = page.locator(".jp-Cell").last.bounding_box()
        assert last
        assert last["y"] + last["height"] <= height
        page.locator(".jp-Notebook").screenshot(path=SCREENSHOTS / "notebook.png")
        browser.close()

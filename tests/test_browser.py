"""The notebook in JupyterLab, in a real browser: run whole, out of order, interrupted and resumed.

`make browser` runs this, where Debian's chromium (or another Chromium, named by $CHROMIUM) is installed. Screenshots
stay in runs/browser/.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

sync_api = pytest.importorskip("playwright.sync_api")

SCREENSHOTS = Path(__file__).parents[1] / "runs/browser"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
NOTEBOOK = "window.jupyterapp.shell.currentWidget.content"
CELLS = f'{NOTEBOOK}.model.sharedModel.toJSON().cells.filter(cell => cell.cell_type === "code")'
FAILED = f'{CELLS}.some(cell => cell.outputs.some(output => output.output_type === "error"))'

pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium")]


@pytest.fixture
def page(tiny_notebook, tmp_path, monkeypatch) -> Iterator[Any]:
    """The notebook in a JupyterLab of its own, with a kernel."""
    nbformat.write(tiny_notebook, tmp_path / "S9_Final.ipynb")
    for kind in ("CONFIG", "DATA", "RUNTIME"):
        monkeypatch.setenv(f"JUPYTER_{kind}_DIR", str(tmp_path / "jupyter" / kind.lower()))
    # Otherwise JupyterLab renders only the cells in the window.
    settings = tmp_path / "jupyter/settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"windowingMode": "none"}))
    monkeypatch.setenv("JUPYTERLAB_SETTINGS_DIR", str(tmp_path / "jupyter/settings"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root"]
    command += ["--expose-app-in-browser", "--IdentityProvider.token=", f"--ServerApp.root_dir={tmp_path}"]
    address, log = f"http://127.0.0.1:{port}", tmp_path / "lab.log"
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=output) as server,
        sync_api.sync_playwright() as playwright,
    ):
        try:
            for _ in range(120):
                try:
                    urllib.request.urlopen(f"{address}/api", timeout=1)
                    break
                except OSError:
                    time.sleep(0.5)
            else:
                pytest.fail(log.read_text())
            browser = playwright.chromium.launch(
                executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
            )
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            page.set_default_timeout(240_000)
            page.goto(f"{address}/lab/tree/S9_Final.ipynb?reset")
            page.wait_for_selector(".jp-Notebook .jp-CodeCell")
            session = "window.jupyterapp.shell.currentWidget.sessionContext.session"
            page.wait_for_function(f"{session}?.kernel?.status === 'idle'")
            yield page
            browser.close()
        finally:
            server.terminate()


def start(page: Any, number: int, source: str | None = None) -> None:
    """Begins to run a code cell, with another source if one is given."""
    page.evaluate(
        f"""([number, source]) => {{
            const notebook = {NOTEBOOK}, cell = notebook.widgets.filter(cell => cell.model.type === "code")[number];
            if (source !== null) cell.model.sharedModel.setSource(source);
            notebook.activeCellIndex = notebook.widgets.indexOf(cell);
            window.jupyterapp.commands.execute("notebook:run-cell");
        }}""",
        [number, source],
    )


def wait_for(page: Any, number: int, pattern: str) -> str:
    """Waits until the outputs of a code cell match the pattern, and returns them."""
    outputs = f"JSON.stringify({CELLS}[{number}].outputs)"
    page.wait_for_function(f"new RegExp({json.dumps(pattern)}).test({outputs})", polling=50)
    return page.evaluate(outputs)


def test_restart_and_run_all_shows_bars_and_figures_and_no_error(page):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Restart Kernel and Run All Cells…").click()
    page.get_by_role("button", name="Confirm Kernel Restart").click()
    bar = page.locator(".jp-OutputArea .widget-hprogress, .jp-OutputArea .jupyter-widgets [role=progressbar]").first
    bar.wait_for()
    bar.scroll_into_view_if_needed()
    page.screenshot(path=SCREENSHOTS / "bar.png")

    page.wait_for_function(f"{FAILED} || {CELLS}.every(cell => cell.execution_count)")
    assert not page.evaluate(FAILED)
    assert [cell["execution_count"] for cell in page.evaluate(CELLS)] == list(range(1, len(page.evaluate(CELLS)) + 1))
    figures = page.locator(".jp-OutputArea-output img")
    assert figures.count() >= 6
    for figure in figures.all():
        assert figure.evaluate("image => image.complete && image.naturalWidth > 300")
    assert not page.locator("[data-mime-type='application/vnd.jupyter.stderr']").count()
    assert not page.locator(".jp-OutputArea .widget-hprogress").count(), "a bar stayed behind"
    height = 200 + page.evaluate("Math.max(...Array.from(document.querySelectorAll('*'), part => part.scrollHeight))")
    page.set_viewport_size({"width": 1280, "height": height})
    page.locator(".jp-Notebook").screenshot(path=SCREENSHOTS / "notebook.png")


def test_cells_out_of_order_and_an_interrupted_training(page):
    cells = page.evaluate(CELLS)
    parameters, training = cells[0]["source"], next(k for k, c in enumerate(cells) if "fit(" in c["source"])
    start(page, 0, f"{parameters}\nepochs = 3")
    start(page, 1)
    start(page, training)
    wait_for(page, training, "2,034,040 parameters.*epoch 1/3")
    page.evaluate('window.jupyterapp.commands.execute("notebook:interrupt-kernel")')
    folder = re.search(r'resume = \\+"(.+?)\\+"', wait_for(page, training, "StoppedError.*resume = "))
    assert folder
    start(page, 0, f"{parameters}\nepochs, resume = 3, {folder[1]!r}")
    start(page, training)
    wait_for(page, training, "going on after.*epoch 3/3: train")
    assert not page.evaluate(FAILED)

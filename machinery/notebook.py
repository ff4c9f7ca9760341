"""Runs a notebook from the terminal with papermill, and writes it as HTML beside it.

`python -m machinery.notebook S9_Final.ipynb runs/S9_Final.ipynb -p epochs 1` writes both, also when a cell fails.
Ctrl-C and SIGTERM interrupt the running cell; the third one ends the kernel.
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError, strip_color

# Jupyter's own template leaves out the alternative text of a figure; here it is the key `alt` of its cell's metadata.
TEMPLATE = """{%- extends 'index.html.j2' -%}
{%- block data_png -%}
{%- set alt = cell | get_metadata('alt') -%}
{{ super() | replace('<img', '<img alt="' ~ (alt | escape_html) ~ '"', 1) if alt else super() }}
{%- endblock -%}
"""


def run(source: Path, target: Path, parameters: dict[str, Any]) -> tuple[str, int]:
    """Executes the notebook; returns the error, if any, and the status."""
    kernel = AsyncKernelManager(kernel_name="python3", shutdown_wait_time=600)  # seconds that a cell has to save
    signals: list[int] = []

    def stop(number: int, frame: object) -> None:
        signals.append(number)
        if kernel.has_kernel:
            run_sync(kernel.signal_kernel)(signal.SIGINT if len(signals) < 3 else signal.SIGKILL)

    def begin_cell(**_: Any) -> None:
        if signals:  # they came while no cell was running
            raise KeyboardInterrupt

    options: dict[str, Any] = {"progress_bar": False, "stdout_file": sys.stdout, "stderr_file": sys.stderr}
    options |= {"km": kernel, "on_cell_start": begin_cell, "autosave_cell_every": 0}
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    fault = ""
    try:
        papermill.execute_notebook(source, target, parameters, **options)
    except PapermillExecutionError as error:
        in_the_cell = [part for part in map(strip_color, error.traceback) if part.startswith("Cell In") and not signals]
        fault = "\n\n".join([*in_the_cell[:1], f"{error.ename}: {error.evalue}"])
    except (KeyboardInterrupt, RuntimeError) as error:
        fault = "stopped at once" if signals else f"the kernel died, maybe for want of memory: {error}"
    finally:
        if kernel.has_kernel:
            run_sync(kernel.shutdown_kernel)()
        for number, handler in before.items():
            signal.signal(number, handler)
    return fault, (128 + signals[0] if signals else 1) if fault else 0


def page_of(notebook: nbformat.NotebookNode, title: str) -> str:
    """The notebook as HTML, with alternative texts for its figures."""
    return HTMLExporter(raw_template=TEMPLATE).from_notebook_node(notebook, {"metadata": {"name": title}})[0]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m machinery.notebook", description="Run a notebook top to bottom.")
    parser.add_argument("source", help="the notebook", type=Path)
    parser.add_argument("target", help="where the executed one goes, and an HTML page beside it", type=Path)
    text = "replaces a value, written as in YAML, in the notebook's cell with the tag `parameters`"
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help=text)
    options = parser.parse_args(arguments)
    parameters = {name: yaml.safe_load(value) for name, value in options.parameter}
    known = papermill.inspect_notebook(options.source)
    if unknown := parameters.keys() - known.keys():
        parser.error(f"{options.source} has no parameter {', '.join(sorted(unknown))}; it has {', '.join(known)}")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars are widgets, which a terminal cannot show
    page = options.target.with_suffix(".html")
    try:
        options.target.parent.mkdir(parents=True, exist_ok=True)
        fault, status = run(options.source, options.target, parameters)
        page.write_text(page_of(nbformat.read(options.target, as_version=4), page.stem), encoding="utf-8")
    except OSError as error:
        parser.exit(1, f"error: cannot write {options.target} and its page: {error.strerror or error}\n")
    print(f"{fault}\n\nThe executed notebook is {options.target}; {page} shows it.", file=sys.stderr if fault else None)
    return status


if __name__ == "__main__":
    sys.exit(main())

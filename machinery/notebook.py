"""Runs a notebook from a terminal, which shows its headings and printed lines as they come, and makes a page of it.

`python -m machinery.notebook S9_Final.ipynb runs/S9_Final.ipynb -p epochs 1` writes runs/S9_Final.ipynb and
runs/S9_Final.html, also when a cell fails or Ctrl-C stops it. Ctrl-C goes to the running cell, which may save
something and end; the second one ends it at once, the third ends the kernel.
"""

import argparse
import ast
import asyncio
import contextlib
import datetime
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbclient.util import ensure_async
from nbconvert import HTMLExporter
from nbformat import NotebookNode

from machinery.words import duration, remaining

EPOCH = re.compile(r"epoch (\d+)/(\d+)\b.*: train ")  # as `fit` prints it
IN_THE_CELL = re.compile(r"^Cell In.*?(?=\n\n|\Z)", re.DOTALL | re.MULTILINE)  # of a traceback of IPython
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
CLEAR = "\x1b[K"  # the rest of the terminal's line
# Jupyter's own template leaves out the alternative text, which its older one takes from the same place.
TEMPLATE = """{%- extends 'index.html.j2' -%}
{%- block data_png -%}
{%- set alt = (output | get_metadata('alt', 'image/png')) or (cell | get_metadata('alt')) -%}
{{ super() | replace('<img', '<img alt="' ~ (alt | escape_html) ~ '"', 1) if alt else super() }}
{%- endblock -%}
"""


class StopError(Exception):
    """A signal came while no cell was at work."""


class TerminalClient(NotebookClient):
    """Executes a notebook, shows it in the terminal and saves it after every cell.

    Attributes:
        signal: The one that asked for an end, 0 until then.
    """

    def __init__(self, notebook: NotebookNode, target: Path) -> None:
        super().__init__(notebook, timeout=None, kernel_name="python3", coalesce_streams=True, record_timing=False)
        self.target, self.signal, self.requests, self.is_ready = target, 0, 0, False
        self.on_notebook_start, self.on_cell_start, self.on_cell_executed = self._begin, self._begin_cell, self.end_cell
        self.is_watched = sys.stdout.isatty()
        self.started, self.epochs, self.left = time.monotonic(), 0, ""  # of the cell
        self.rests = {"stdout": "", "stderr": ""}  # of lines whose end is still to come

    def save(self) -> None:
        """Writes the notebook as far as it is; whoever reads the file finds it whole."""
        scratch = self.target.with_name(f".{self.target.name}")
        nbformat.write(self.nb, scratch)
        scratch.replace(self.target)

    def output(self, outs: list[NotebookNode], msg: dict[str, Any], display_id: str | None, cell_index: int) -> Any:
        """Also shows the output."""
        output = super().output(outs, msg, display_id, cell_index)
        data = output.get("data", {}) if output else {}
        if output and output.output_type == "stream":
            *lines, self.rests[output.name] = (self.rests[output.name] + output.text).split("\n")
            for line in lines:
                self.show(line + self.time_left(line), output.name)
        elif "image/png" in data:
            self.show(f"[figure: {self.nb.cells[cell_index].metadata.get('alt', 'without a description')}]")
        elif "text/plain" in data:
            self.show(data["text/plain"])
        return output

    def show(self, text: str, name: str = "stdout") -> None:
        """Prints a line, in the place of that of the clock."""
        print(CLEAR + text if self.is_watched else text, file=getattr(sys, name), flush=True)

    def time_left(self, line: str) -> str:
        """What to add to a printed line: if it is of an epoch that does not say it itself, how long the others take."""
        if not (found := EPOCH.match(line)):
            return ""
        self.epochs += 1
        left = int(found[2]) - int(found[1])
        self.left = f"; {remaining(time.monotonic() - self.started, self.epochs, left)} left" if left else ""
        return "" if line.endswith(" left") else self.left

    def _begin(self, **_: Any) -> None:
        self.is_ready = True

    def _begin_cell(self, cell: NotebookNode, **_: Any) -> None:
        if self.signal:
            raise StopError
        self.started, self.epochs, self.left = time.monotonic(), 0, ""
        if cell.cell_type == "markdown" and cell.source.startswith("#"):
            heading = cell.source.partition("\n")[0]
            self.show(f"\n\x1b[1m{heading}\x1b[0m" if self.is_watched else f"\n{heading}")

    def end_cell(self, **_: Any) -> None:
        """Shows what is left of lines, and saves."""
        for name, rest in self.rests.items():
            if rest:
                self.show(rest, name)
        self.rests = dict.fromkeys(self.rests, "")
        self.save()

    async def async_start_new_kernel(self, **kwargs: Any) -> None:
        """Also takes signals from now on, and starts the clock."""
        with contextlib.suppress(NotImplementedError):  # on Windows, Ctrl-C ends the kernel
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, self._stop, number)
        if self.is_watched:
            self._clock = asyncio.ensure_future(self._show_clock())
        await super().async_start_new_kernel(**kwargs)

    async def _show_clock(self) -> None:
        """Shows that a cell is at work, and for how long, in a line that the next one overwrites."""
        while True:
            await asyncio.sleep(1)
            passed = datetime.timedelta(seconds=int(time.monotonic() - self.started))
            print(f"{CLEAR}{passed}{self.left}", end="\r", flush=True)

    def _stop(self, number: int) -> None:
        self.signal, self.requests = number, self.requests + 1
        if not self.is_ready or not self.km:  # the first cell will not begin
            return
        if self.requests < 3:
            self.show("stopping" + ("; once more stops at once" if self.requests == 1 else " at once"), "stderr")
            self._stopping = asyncio.ensure_future(ensure_async(self.km.interrupt_kernel()))
        else:
            self._stopping = asyncio.ensure_future(ensure_async(self.km.shutdown_kernel(now=True)))


def run(notebook: NotebookNode, target: Path) -> int:
    """Executes the notebook, saves it and a page of it beside it, and returns the exit status."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars, which only a person in front of the notebook can see
    client, started, fault = TerminalClient(notebook, target), time.monotonic(), ""
    try:
        client.execute()
    except CellExecutionError as error:
        in_the_cell = IN_THE_CELL.search(COLOURS.sub("", error.traceback))
        fault = f"{in_the_cell[0]}\n\n" if in_the_cell and not client.signal else ""
        fault += f"{error.ename}: {error.evalue}".rstrip(": ")
    except DeadKernelError:
        fault = "stopped, and the kernel with it" if client.signal else "the kernel was killed, or memory ran out"
    except (StopError, KeyboardInterrupt):
        fault = "stopped"
    finally:
        client.end_cell()
    page = target.with_suffix(".html")
    page.write_text(page_of(notebook, target.stem), encoding="utf-8")
    if fault:
        client.show(f"\n{fault}\n\nWhat was done until then is in {page} and {target}.", "stderr")
        return 128 + client.signal if client.signal else 1
    client.show(f"\nDone in {duration(time.monotonic() - started)}. Look at {page}, or open {target}.")
    return 0


def page_of(notebook: NotebookNode, title: str) -> str:
    """The notebook as HTML, whose figures are described by the key `alt` of their cell's metadata."""
    return HTMLExporter(raw_template=TEMPLATE).from_notebook_node(notebook, {"metadata": {"name": title}})[0]


def value_of(text: str) -> Any:
    """A parameter from the command line: None, True, False, a number, or else the text itself."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if value is None or isinstance(value, bool | int | float | str) else text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m machinery.notebook", description="Run a notebook top to bottom.")
    parser.add_argument("source", help="the notebook", type=Path)
    parser.add_argument("target", help="where the executed one goes, and a page of it beside it", type=Path)
    parser.add_argument(
        *("-p", "--parameter"),
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="in the place of what the notebook's cell with the tag `parameters` gives",
    )
    options = parser.parse_args(arguments)
    parameters = {name: value_of(text) for name, text in options.parameter}
    known = papermill.inspect_notebook(options.source)
    if unknown := parameters.keys() - known.keys():
        parser.error(f"{options.source} has no parameter {', '.join(sorted(unknown))}; it has {', '.join(known)}")
    options.target.parent.mkdir(parents=True, exist_ok=True)
    notebook = papermill.execute_notebook(options.source, None, parameters, prepare_only=True, progress_bar=False)
    return run(notebook, options.target)


if __name__ == "__main__":
    sys.exit(main())

"""`make run`: what a person sees of it, what is left of a run that fails or is stopped, and what it falls back to."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from machinery import notebook
from machinery.notebook import main, value_of
from machinery.words import duration, remaining

REPOSITORY = Path(__file__).parents[1]
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="


def write_notebook(*code: str, alt: str = "") -> Path:
    """source.ipynb: a heading, the parameters, another heading, and cells of this code."""
    cells = [
        nbformat.v4.new_markdown_cell("# A title\n\nand text"),
        nbformat.v4.new_code_cell("epochs = 20\nname = None", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_markdown_cell("## Training"),
        *(nbformat.v4.new_code_cell(part, metadata={"alt": alt} if alt else {}) for part in code),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = Path("source.ipynb")
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def outputs(path: Path) -> list[nbformat.NotebookNode]:
    return [o for cell in nbformat.read(path, as_version=4).cells for o in cell.get("outputs", [])]


def test_shows_headings_lines_and_the_time_left_and_describes_figures(capsys, caplog, monkeypatch):
    monkeypatch.setattr(notebook, "remaining", lambda seconds, done, left: f"time for {left} at the pace of {done}")
    source = write_notebook(
        f"import base64\nfrom IPython.display import Image\nImage(base64.b64decode('{PIXEL}'))",
        "for epoch in range(1, epochs + 1):\n"
        "    print(f'epoch {epoch}/{epochs}', end='')\n"
        "    print(': train 10.00 %')\n"
        "print(name, end='')",
        alt='a "dot" & no more',
    )
    assert main([str(source), "runs/target.ipynb", "-p", "epochs", "2", "-p", "name", "runs/x"]) == 0
    shown, errors = capsys.readouterr()
    headings, figure = ["", "# A title", "", "## Training"], '[figure: a "dot" & no more]'
    first = "epoch 1/2: train 10.00 %; time for 1 at the pace of 1 left"
    assert shown.splitlines()[:7] == [*headings, figure, first, "epoch 2/2: train 10.00 %"]
    assert "\nruns/x\n\nDone in " in shown
    assert "runs/target.html" in shown
    assert not errors
    tags = [cell.metadata.get("tags") for cell in nbformat.read("runs/target.ipynb", as_version=4).cells]
    assert tags.index(["injected-parameters"]) == tags.index(["parameters"]) + 1
    assert sorted(os.listdir("runs")) == ["target.html", "target.ipynb"]
    page = Path("runs/target.html").read_text()
    assert "No description has been provided" not in page
    assert "alt='a \"dot\" &amp; no more'" in page
    assert "Alternative text is missing" not in caplog.text


@pytest.mark.parametrize(
    ("line", "added"),
    [
        ("epoch 1/3: train 10.00 % (loss 2.3), test 10.00 % (loss 2.3), 9 s", "; 2 left"),
        ("epoch 2/3 (synthetic): train 10.00 %", "; 1 left"),
        ("epoch 3/3: train 10.00 %", ""),
        ("epoch 1/3: train 10.00 %; about 18 s left", ""),
        ("the epoch 1/3: train", ""),
    ],
)
def test_the_time_left_is_added_once_and_to_epochs_only(line, added, monkeypatch):
    monkeypatch.setattr(notebook, "remaining", lambda seconds, done, left: left)
    client = notebook.TerminalClient(nbformat.v4.new_notebook(), Path("target.ipynb"))
    assert client.time_left(line) == added


def test_what_was_done_before_a_cell_failed_is_saved_and_the_error_readable(capsys):
    source = write_notebook("print('before')\nvalue = 1\nvalue / 0", "print('never')")
    assert main([str(source), "target.ipynb"]) == 1
    shown, errors = capsys.readouterr()
    assert "before" in shown
    assert "never" not in shown
    assert "----> 3 value / 0" in errors
    assert "ZeroDivisionError: division by zero" in errors
    assert "\x1b" not in errors
    assert "Traceback" not in errors
    assert [output.output_type for output in outputs(Path("target.ipynb"))] == ["stream", "error"]
    assert "ZeroDivisionError" in Path("target.html").read_text()


def test_ctrl_c_reaches_the_cell_which_may_save_and_say_so():
    source = write_notebook(
        "import os, signal, time\n"
        "def stop(*args):\n    raise RuntimeError('saved after 3 steps\\ngo on with: --resume')\n"
        "signal.signal(signal.SIGINT, stop)\n"
        "print('training', flush=True)\n"
        "time.sleep(60)",
        "print('never')",
    )
    command = [sys.executable, "-m", "machinery.notebook", source.resolve(), Path("target.ipynb").resolve()]
    options: dict = {"cwd": REPOSITORY, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **options) as process:
        assert process.stdout
        assert "training\n" in iter(process.stdout.readline, "")
        process.send_signal(signal.SIGINT)
        shown, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "RuntimeError: saved after 3 steps\ngo on with: --resume" in errors
    assert "---->" not in errors
    assert "never" not in shown
    assert [output.output_type for output in outputs(Path("target.ipynb"))] == ["stream", "error"]


def test_a_parameter_that_the_notebook_lacks_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(notebook, "run", lambda *args: pytest.fail("was run"))
    with pytest.raises(SystemExit, match="2"):
        main([str(write_notebook()), "target.ipynb", "-p", "epoch", "1"])
    assert "no parameter epoch; it has epochs, name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("0.5", 0.5), ("None", None), ("True", True), ("runs/a b", "runs/a b"), ("[1]", "[1]"), ("'1'", "1")],
)
def test_parameters_are_values_where_they_can_be(text, value):
    assert value_of(text) == value
    assert type(value_of(text)) is type(value)


@pytest.mark.parametrize(
    ("seconds", "text"), [(40.4, "40 s"), (85, "1 min"), (59.7 * 60, "1 h 0 min"), (6000, "1 h 40 min")]
)
def test_durations_are_as_exact_as_needed(seconds, text):
    assert duration(seconds) == text


def test_the_time_left_is_in_proportion():
    assert remaining(seconds=85, done=1, left=19) == "about 27 min"
    assert remaining(seconds=30, done=100, left=50) == "about 15 s"


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
@pytest.mark.parametrize(
    ("given", "says", "parameters"),
    [
        (["EPOCHS=1"], "for 1 epoch.", "-p data synthetic -p epochs 1"),
        ([], "for 2 epochs.", "-p data synthetic -p epochs 2"),
        (["EPOCHS=3", "FOUND=0"], None, "-p epochs 3"),
        (["RESUME=runs/x", "FOUND=0"], None, "-p resume runs/x"),
        (["FOUND=1"], None, None),
    ],
)
def test_make_run_says_at_once_that_it_goes_on_with_drawn_pictures(tmp_path, given, says, parameters):
    python = tmp_path / "python"  # stands in for that of the environment: the data's status, then the arguments
    python.write_text('#!/bin/sh\ncase "$*" in *-p*|*S9_Final*) echo ran "$@";; *) exit ${FOUND:-3};; esac\n')
    python.chmod(0o755)
    command = ["make", "--no-print-directory", "-o", python, "run", f"BIN={tmp_path}", f"READY={python}", *given]
    made = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    said = [line.rpartition(", ")[2] for line in made.stdout.splitlines() if "CIFAR-10 is out of reach" in line]
    assert said == ([says] if says else [])
    if parameters is None:
        assert made.returncode != 0
        assert "ran" not in made.stdout
    else:
        line = f"ran -m machinery.notebook S9_Final.ipynb runs/S9_Final.ipynb {parameters}"
        assert made.stdout.splitlines()[-1].strip() == line

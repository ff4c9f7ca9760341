"""`make run`: what it prints, what is left of a run that fails or is stopped, and what it falls back to."""

import importlib
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from machinery import notebook
from machinery.data.cifar10 import SYNTHETIC_COUNTS
from machinery.errors import duration
from machinery.notebook import main

REPOSITORY = Path(__file__).parents[1]
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="


def write_notebook(*code: str, alt: str = "") -> Path:
    """source.ipynb: the parameters, and cells of this code."""
    cells = [
        nbformat.v4.new_code_cell("epochs = 20\nname = None", metadata={"tags": ["parameters"]}),
        *(nbformat.v4.new_code_cell(part, metadata={"alt": alt} if alt else {}) for part in code),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = Path("source.ipynb")
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def outputs(path: Path) -> list[nbformat.NotebookNode]:
    return [o for cell in nbformat.read(path, as_version=4).cells for o in cell.get("outputs", [])]


def test_the_notebook_runs_top_to_bottom_and_prints_its_epochs_without_bars(tiny_notebook, tmp_path, capfd):
    nbformat.write(tiny_notebook, tmp_path / "S9_Final.ipynb")
    assert main(["S9_Final.ipynb", "runs/S9_Final.ipynb", "-p", "seed", "1"]) == 0
    shown, errors = capfd.readouterr()
    assert "2,034,040 parameters" in shown
    assert "\nepoch 1/1: train" in shown
    assert "runs/S9_Final.html" in shown
    assert not errors
    assert "it/s" not in shown
    assert sum("image/png" in o.get("data", {}) for o in outputs(Path("runs/S9_Final.ipynb"))) >= 6


def test_what_was_done_before_a_cell_failed_is_saved_and_the_error_readable(capsys):
    source = write_notebook(
        f"import base64\nfrom IPython.display import Image\nprint(epochs, name)\nImage(base64.b64decode('{PIXEL}'))",
        "value = 1\nvalue / 0",
        "print('never')",
        alt='a "dot" & no more',
    )
    assert main([str(source), "runs/target.ipynb", "-p", "epochs", "[2, crop]", "-p", "name", "runs/a b"]) == 1
    shown, errors = capsys.readouterr()
    assert shown == "[2, 'crop'] runs/a b\n"
    assert "----> 2 value / 0" in errors
    assert "\nZeroDivisionError: division by zero\n" in errors
    assert "\x1b" not in errors
    assert "Traceback" not in errors
    assert [o.output_type for o in outputs(Path("runs/target.ipynb"))] == ["stream", "execute_result", "error"]
    page = Path("runs/target.html").read_text()
    assert "ZeroDivisionError" in page
    assert "alt='a \"dot\" &amp; no more'" in page


@pytest.mark.parametrize(
    ("name", "act", "status", "said"),
    [
        (
            "SIGTERM",
            "raise StoppedError('saved after 3 steps\\ngo on with: --resume')",
            143,
            "Error: saved after 3 steps",
        ),
        ("SIGINT", "os.kill(os.getppid(), signal.SIGINT)", 130, "stopped at once"),  # until the third one
    ],
)
def test_signals_reach_the_cell_which_may_save_before_it_ends(name, act, status, said, capsys):
    source = write_notebook(
        "import os, signal, time\n"
        "class StoppedError(Exception):\n    pass\n"
        f"def stop(*args):\n    {act}\n"
        "signal.signal(signal.SIGINT, stop)\n"
        f"os.kill(os.getppid(), signal.{name})\n"
        "print('training', flush=True)\n"
        "while True:\n    time.sleep(0.1)",
        "print('never')",
    )
    before = signal.getsignal(signal.SIGINT)
    assert main([str(source), "target.ipynb"]) == status
    shown, errors = capsys.readouterr()
    assert said in errors
    assert "---->" not in errors
    assert "never" not in shown
    assert signal.getsignal(signal.SIGINT) is before


def test_a_parameter_that_the_notebook_lacks_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(notebook, "run", lambda *args: pytest.fail("was run"))
    with pytest.raises(SystemExit, match="2"):
        main([str(write_notebook()), "target.ipynb", "-p", "epoch", "1"])
    assert "no parameter epoch; it has epochs, name" in capsys.readouterr().err


def test_what_cannot_be_written_is_said_in_a_sentence(capsys):
    Path("full.ipynb").symlink_to("/dev/full")
    with pytest.raises(SystemExit, match="1"):
        main([str(write_notebook("1")), "full.ipynb"])
    shown, errors = capsys.readouterr()
    assert errors.startswith("error: cannot write full.ipynb and its page: No space left")
    assert errors.count("\n") == 1
    assert not shown


def test_the_time_is_that_of_all_steps_and_of_evaluation(capsys, monkeypatch):
    how_long = importlib.import_module("benchmarks.how_long")
    clock = iter([0, 9, 0, 9, 0, 1.1, 0, 0.1])  # two rounds: a step, of which 0.1 s are the optimizer's
    monkeypatch.setattr(how_long, "IMAGES", 2)
    monkeypatch.setattr(how_long.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(sys, "argv", ["how_long", "-p", "epochs", "3", "-p", "data", "synthetic"])
    how_long.main()
    seconds = 0.5 * (SYNTHETIC_COUNTS[True] + SYNTHETIC_COUNTS[False] / 3) + 0.1 * SYNTHETIC_COUNTS[True] / 500
    assert f"{duration(seconds)} per epoch" in capsys.readouterr().out


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
@pytest.mark.parametrize(
    ("given", "parameters"),
    [
        (["EPOCHS=1"], "-p data synthetic -p epochs 1"),
        (["EPOCHS=3", "RESUME=runs/x", "FOUND=0"], "-p epochs 3 -p resume runs/x"),
        (["FOUND=1"], None),
    ],
)
def test_make_run_goes_on_with_synthetic_images_where_there_are_no_others(tmp_path, given, parameters):
    python = tmp_path / "python"  # stands in for that of the environment: the data's status, then the arguments
    python.write_text('#!/bin/sh\ncase "$*" in *machinery.data*) exit ${FOUND:-3};; *) echo ran "$@";; esac\n')
    python.chmod(0o755)
    command = ["make", "--no-print-directory", "-o", python, "run", f"BIN={tmp_path}", f"READY={python}", *given]
    made = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert ("synthetic" in made.stdout) == ("synthetic" in (parameters or ""))
    if parameters is None:
        assert made.returncode != 0
        assert "ran" not in made.stdout
    else:
        line = f"ran -m machinery.notebook S9_Final.ipynb runs/S9_Final.ipynb {parameters}"
        assert made.stdout.splitlines()[-1].strip() == line

"""The layout: imports point downwards, cost what they must, and no name at the root takes a user's own."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
ROOT = {"dataset", "export", "hubconf", "model", "predict", "train", "utils"}
FLOORS = 6  # from the ground to train.py


@functools.cache
def imported_by(module: Path) -> set[Path]:
    """The modules of this repository that a module imports at its top, or later."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = (REPOSITORY / f"{name.replace('.', '/')}.py" for name in names)
    return {file for file in files if file.exists()}


def floor_of(module: Path, above: tuple[Path, ...] = ()) -> int:
    assert module not in above, f"a circle of imports: {[path.stem for path in (*above, module)]}"
    return 1 + max((floor_of(below, (*above, module)) for below in imported_by(module)), default=0)


def test_the_root_holds_what_users_import_and_nothing_else():
    assert {path.stem for path in REPOSITORY.glob("*.py")} <= ROOT


def test_the_machinery_imports_nothing_of_the_root():
    for module in REPOSITORY.glob("machinery/**/*.py"):
        assert {path.relative_to(REPOSITORY).parts[0] for path in imported_by(module)} <= {"machinery"}, module


def test_imports_make_no_circles_and_few_floors():
    assert floor_of(REPOSITORY / "train.py") <= FLOORS


def test_imports_take_no_module_of_the_user_and_nothing_that_only_some_need(tmp_path):
    for name in ("config", "engine", "errors", "optim", "runs", "storage", "transforms", "checkpoint", "data", "files"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the module of the user was taken')")
    late = {"albumentations", "captum", "cv2", "matplotlib", "torchvision"}
    lines = [
        f"import sys\nsys.path.append({str(REPOSITORY)!r})",
        f"import train\nearly = {late!r} & set(sys.modules)\nassert not early, early",
        "import utils, predict",
    ]
    code = "\n".join(lines)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr

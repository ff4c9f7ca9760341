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
    for module in REPOSITORY.glob("machinery/*.py"):
        assert {path.parent.name for path in imported_by(module)} <= {"machinery"}, module


def test_imports_make_no_circles_and_few_floors():
    assert floor_of(REPOSITORY / "train.py") <= FLOORS


def run(code: str, folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr


def test_modules_of_the_user_with_common_names_do_no_harm(tmp_path):
    for name in ("config", "engine", "errors", "optim", "runs", "storage", "transforms", "checkpoint", "data", "files"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the module of the user was taken')")
    run(f"import sys; sys.path.append({str(REPOSITORY)!r}); import train, utils, predict", tmp_path)


def test_what_only_some_need_is_not_imported_before():
    late = {"albumentations", "captum", "cv2", "matplotlib", "torchvision"}
    run(f"import sys, train; late = {late!r} & set(sys.modules); assert not late, late", REPOSITORY)

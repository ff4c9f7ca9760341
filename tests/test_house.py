"""The layout: imports point downwards, cost what they must, and no name at the root takes a user's own."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "machinery"
ROOT = {"dataset", "export", "hubconf", "model", "predict", "train", "utils"}
LAYERS = 4  # of imports inside the package


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


def layer_of(module: Path, above: tuple[Path, ...] = ()) -> int:
    """How many modules stand on one another, down from this one."""
    assert module not in above, f"a circle of imports: {[path.stem for path in (*above, module)]}"
    return 1 + max((layer_of(below, (*above, module)) for below in imported_by(module)), default=0)


def test_the_root_holds_what_users_import_and_stands_on_the_package_without_circles():
    modules = list(REPOSITORY.glob("*.py"))
    assert {module.stem for module in modules} == ROOT
    assert max(map(layer_of, modules)) > 1


def test_the_package_imports_nothing_of_the_root_and_has_few_layers():
    for module in PACKAGE.rglob("*.py"):
        assert all(PACKAGE in below.parents for below in imported_by(module)), module
        assert layer_of(module) <= LAYERS, module


def test_the_network_and_the_reader_of_its_files_stand_alone():
    assert not imported_by(REPOSITORY / "model.py") | imported_by(PACKAGE / "weights.py")


def test_imports_take_no_module_of_the_user_and_nothing_that_only_some_need(tmp_path):
    for name in ("checkpoint", "checks", "config", "data", "device", "errors", "folder", "metrics", "optim", "weights"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the module of the user was taken')")
    late = {"albumentations", "captum", "cv2", "matplotlib", "torchvision"}
    lines = [
        f"import sys\nsys.path.append({str(REPOSITORY)!r})",
        f"import train\nearly = {late!r} & set(sys.modules)\nassert not early, early",
        "import utils, predict",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

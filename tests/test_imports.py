"""The direction of imports: experiments -> butterfly_opt -> triton_kernels -> torch, triton. Oracle: the source itself.

Every import statement counts, also inside functions and under ``if TYPE_CHECKING``.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = ("butterfly_opt.triton_kernels", "triton_kernels")
MATHEMATICS = {
    "rotation": set(),
    "sketch": set(),
    "pairs": set(),
    "diagonal": set(),
    "blocks": {"rotation"},
    "refit": {"rotation", "backend"},
}


def imported(file: Path) -> set[str]:
    """Dotted names of all modules a file imports; for ``from a import b`` both ``a`` and ``a.b``."""
    folder = file.parent.relative_to(ROOT).parts
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def starts_with(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def sources(folder: str) -> list[Path]:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"no sources in {folder}"
    return files


def offenders(files: list[Path], *packages: str) -> list[str]:
    return [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files
        for name in sorted(imported(file))
        if any(starts_with(name, package) for package in packages)
    ]


def test_the_walk_sees_what_is_there() -> None:
    names = imported(ROOT / "butterfly_opt" / "optimizer.py")
    assert {"warnings", "torch", "butterfly_opt.update", "butterfly_opt.update.TensorStep"} <= names
    assert {"experiments.config", "torch"} <= set().union(*map(imported, sources("experiments")))


def test_nothing_below_imports_experiments() -> None:
    assert not offenders(sources("butterfly_opt") + sources("triton_kernels"), "experiments", "tests")


def test_kernels_import_torch_and_triton_only() -> None:
    allowed = {"torch", "triton", "triton_kernels", *sys.stdlib_module_names}
    for file in sources("triton_kernels"):
        roots = {name.split(".")[0] for name in imported(file)}
        assert roots <= allowed, f"{file.name} imports {sorted(roots - allowed)}"


OPTIONAL = {"operators.py": {"scipy"}, "mixture.py": {"sklearn"}}
"""What a module may import beside torch and numpy: an export, an interface; never on ``import butterfly_opt``."""


def test_the_package_imports_torch_and_numpy_only() -> None:
    allowed = {"torch", "numpy", "butterfly_opt", *sys.stdlib_module_names}
    for file in sources("butterfly_opt"):
        roots = {name.split(".")[0] for name in imported(file)} - OPTIONAL.get(file.name, set())
        assert roots <= allowed, f"{file.name} imports {sorted(roots - allowed)}"


def test_optional_packages_are_not_imported_with_the_package() -> None:
    script = "import sys, butterfly_opt; print({'scipy', 'sklearn'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "scipy" not in found.stdout
    assert "sklearn" not in found.stdout


def test_only_the_backend_imports_the_kernels() -> None:
    files = [file for file in sources("butterfly_opt") if file.name != "backend.py"]
    assert not offenders(files, *KERNELS, "triton")


@pytest.mark.parametrize(("module", "allowed"), MATHEMATICS.items(), ids=MATHEMATICS.keys())
def test_mathematics_knows_no_optimizer(module: str, allowed: set[str]) -> None:
    names = {name for name in imported(ROOT / "butterfly_opt" / f"{module}.py") if starts_with(name, "butterfly_opt")}
    assert {name.split(".")[1] for name in names} <= allowed
    assert not any(starts_with(name, "torch.optim") for name in imported(ROOT / "butterfly_opt" / f"{module}.py"))


MIDDLE = ["estimate", "update", "layout", "basis", "operators", "secant", "backend", "options"]


@pytest.mark.parametrize("module", MIDDLE)
def test_the_optimizer_is_on_top(module: str) -> None:
    assert not offenders([ROOT / "butterfly_opt" / f"{module}.py"], "butterfly_opt.optimizer", "torch.optim")


def test_the_reference_imports_nothing_of_ours() -> None:
    roots = {name.split(".")[0] for name in imported(ROOT / "tests" / "reference.py")}
    assert roots <= {"numpy", "torch", *sys.stdlib_module_names}

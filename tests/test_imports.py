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
MATHEMATICS: dict[str, set[str]] = {
    "plan": set(),
    "rotation": {"plan"},
    "diagonal": set(),
    "rounding": set(),
    "basis": {"plan", "rotation"},
    "operators": {"basis", "rotation"},
}
"""The mathematics without an optimizer: a module, and what it may import of the package."""

LAYERS: dict[str, set[str]] = {
    "collectives": set(),
    "dtensor": set(),
    "layout": {"collectives", "dtensor"},
    "options": {"layout", "plan"},
    "sharding": {"collectives", "dtensor", "layout", "options", "plan", "rotation"},
    "stack": {"collectives", "dtensor", "layout", "plan", "rotation", "rounding", "sharding"},
    "step": {"stack", "diagonal", "dtensor", "options", "rounding", "rotation"},
    "estimate": {"collectives", "secant", "stack", "step", "diagonal", "rotation", "basis", "operators"},
    "diagnostics": {"dtensor", "stack", "estimate", "rotation"},
    "fused": {"step", "stack", "diagonal", "rotation", "plan", "triton_kernels"},
    "newton": {"layout", "options", "secant", "stack", "step"},
    "backend": {"collectives", "step", "newton", "stack", "options", "fused"},
}
"""From the bottom to the top, below the optimizer: no module imports one that stands after it."""


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
    assert {"warnings", "torch", "butterfly_opt.stack", "butterfly_opt.stack.Stack"} <= names
    assert {"experiments.config", "torch"} <= set().union(*map(imported, sources("experiments")))


def test_nothing_below_imports_experiments() -> None:
    assert not offenders(sources("butterfly_opt") + sources("triton_kernels"), "experiments", "tests")


def test_kernels_import_torch_and_triton_only() -> None:
    allowed = {"torch", "triton", "triton_kernels", *sys.stdlib_module_names}
    for file in sources("triton_kernels"):
        roots = {name.split(".")[0] for name in imported(file)}
        assert roots <= allowed, f"{file.name} imports {sorted(roots - allowed)}"


OPTIONAL = {"operators.py": {"scipy"}, "mixture.py": {"sklearn"}, "fused.py": {"triton_kernels"}}
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


def test_only_the_fused_step_imports_the_kernels_and_only_the_backend_imports_it() -> None:
    assert not offenders([file for file in sources("butterfly_opt") if file.name != "fused.py"], *KERNELS, "triton")
    assert not offenders(
        [file for file in sources("butterfly_opt") if file.name != "backend.py"], "butterfly_opt.fused"
    )


def test_kernels_are_not_imported_with_the_package() -> None:
    script = "import sys, butterfly_opt; print({'triton', 'butterfly_opt.fused'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def of_the_package(module: str) -> set[str]:
    names = imported(ROOT / "butterfly_opt" / f"{module}.py")
    return {name.split(".")[1] for name in names if starts_with(name, "butterfly_opt") and name != "butterfly_opt"}


@pytest.mark.parametrize(("module", "allowed"), [*MATHEMATICS.items(), *LAYERS.items()])
def test_imports_run_one_way(module: str, allowed: set[str]) -> None:
    assert of_the_package(module) <= allowed
    assert not any(starts_with(name, "torch.optim") for name in imported(ROOT / "butterfly_opt" / f"{module}.py"))


def test_there_is_no_circle() -> None:
    graph = {file.stem: of_the_package(file.stem) for file in sources("butterfly_opt") if file.stem != "__init__"}
    done: set[str] = set()
    while graph:
        free = {module for module, below in graph.items() if not below & graph.keys()}
        assert free, f"a circle among {sorted(graph)}"
        done |= free
        graph = {module: below for module, below in graph.items() if module not in free}
    assert {"plan", "rotation", "stack", "step", "optimizer"} <= done


def test_a_plain_step_is_in_few_files() -> None:
    """One matrix and one bias, on the torch path: optimizer, stack, step, layout, rotation and what they ask."""
    script = """
import sys, torch
from butterfly_opt import Butterfly
params = [torch.nn.Parameter(torch.ones(300, 200)), torch.nn.Parameter(torch.ones(300))]
opt = Butterfly(params)
for p in params: p.grad = torch.randn_like(p)
for _ in range(3): opt.step()
seen = set()
def note(frame, event, argument):
    name = frame.f_code.co_filename.replace("\\\\", "/")
    if "butterfly_opt/" in name and "triton" not in name: seen.add(name.split("butterfly_opt/")[-1])
sys.setprofile(note)
opt.step()
sys.setprofile(None)
print(*sorted(seen))
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert set(found.stdout.split()) <= {
        "optimizer.py", "backend.py", "stack.py", "step.py", "layout.py", "rotation.py", "plan.py", "collectives.py",
        "dtensor.py",
    }  # fmt: skip


def test_the_reference_imports_nothing_of_ours() -> None:
    roots = {name.split(".")[0] for name in imported(ROOT / "tests" / "reference.py")}
    assert roots <= {"numpy", "torch", *sys.stdlib_module_names}

"""The Python blocks of the pages run as they stand; those of a package that is not installed are skipped.

Oracle: that nothing is raised, and the assertions in the blocks.
"""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "butterfly_opt/README.md", "experiments/README.md", "experiments/FRAMEWORKS.md")
OPTIONAL = ("transformers", "lightning", "accelerate", "timm", "skorch", "peft", "deepxde")


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """The heading above each Python block, and the block."""
    heading = ""
    text = (ROOT / page).read_text(encoding="utf-8")
    for title, code in re.findall(r"^#+ ([^\n]+)$|^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        heading = title or heading
        if code:
            yield heading, code


BLOCKS = [pytest.param(code, id=f"{page}, {heading}") for page in PAGES for heading, code in blocks(page)]


def roots(code: str) -> set[str]:
    """The packages a block imports."""
    nodes = list(ast.walk(ast.parse(code)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty folder, no network, and the threads and the global generator as they were."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "WANDB_DISABLED"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("DDE_BACKEND", "pytorch")
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("code", BLOCKS)
def test_block(code: str) -> None:
    if "deepxde" in roots(code) and torch.cuda.is_available():
        pytest.skip("DeepXDE makes the GPU torch's default device, for all tests")
    for package in sorted(roots(code) & set(OPTIONAL)):
        pytest.importorskip(package)
    exec(compile(code, "block", "exec"), {"__name__": "block"})


def test_the_blocks_are_found() -> None:
    assert len(BLOCKS) >= 12
    assert {package for param in BLOCKS for package in roots(str(param.values[0]))} >= set(OPTIONAL)

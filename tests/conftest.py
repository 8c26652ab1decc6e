"""Runs Triton in its interpreter where there is no GPU; must happen before triton is imported."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The tensors here are small: a second thread only waits for the first.
torch.set_num_threads(1)


def patch_the_language_once() -> None:
    """The interpreter patches ``triton.language`` again at each call of a function in a kernel: a third of its time.

    While a kernel runs, the functions of a module find the language as the first of them left it.
    """
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    def patch_once(fn: Any) -> Any:
        if id(fn.__globals__) in patched:
            return interpreter._LangPatchScope()
        scope = patch(fn)
        patched.add(id(fn.__globals__))
        restore = scope.restore
        scope.restore = lambda: (patched.clear(), restore())
        return scope

    interpreter._patch_lang = patch_once


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    patch_the_language_once()


@pytest.fixture
def suite_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes a suite of ``experiments.compare`` into an empty folder, which becomes the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> Path:
        path = tmp_path / "tiny.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write

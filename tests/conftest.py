"""Runs Triton in its interpreter where there is no GPU; must happen before triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The tensors here are small: a second thread only waits for the first.
torch.set_num_threads(1)

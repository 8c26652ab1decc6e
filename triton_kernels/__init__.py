"""Triton kernels of one optimizer step with wide butterflies; ``butterfly_opt.fused`` puts them together."""

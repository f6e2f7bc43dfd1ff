"""Kernels, each beside its plain-torch reference. Knows only torch and triton."""

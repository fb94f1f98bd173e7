"""Quantized models in integers: codes, kernels, modules and files."""

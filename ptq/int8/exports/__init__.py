"""Quantized models as files: what runs in integers, and what comes back simulated."""

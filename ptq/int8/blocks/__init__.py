"""Transformer blocks of many rows in integers."""

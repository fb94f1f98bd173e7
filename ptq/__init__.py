"""Post-training quantization of autoregressive image generators. Knows no model: adapters describe
models to it."""

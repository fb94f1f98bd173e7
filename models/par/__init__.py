"""PAR (Wang et al., 2024): parallelized autoregressive image generation over LlamaGen VQ tokens."""

"""RAR (Yu et al., 2024): randomized autoregressive image generation over MaskGIT-VQGAN tokens."""

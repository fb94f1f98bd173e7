"""MAR (Li et al., 2024): masked autoregressive image generation over continuous latents with a
diffusion head."""

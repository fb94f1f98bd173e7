"""VAR (Tian et al., 2024): next-scale prediction over the token maps of a multi-scale VQVAE."""

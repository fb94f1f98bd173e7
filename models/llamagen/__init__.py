"""LlamaGen (Sun et al., 2024): the LLaMA architecture, one VQ token after the other."""

"""A decoding step of one token a row, in integers: the kernels between one token and the next.

Per transformer block, with B rows of C channels, H heads of D channels and F hidden channels:

    residual x (B, C) ──► 1 norm ──► codes (B, C) ──► 2 qkv product ──► q, k, v (B, 3 C)
        ▲                                                                  │
        │  parts of the block before                cache of codes ◄──► 3 attention
        │                                                                  │ codes (B, C)
        │        ┌── codes (B, C) ◄── 5 norm ◄── parts (P, B, C) ◄── 4 proj product
        │        ▼
        │   6 fc1 product, GELU ──► codes (B, F) ──► 7 fc2 product ──► parts (P, B, C)
        └─────────────────────────────────────────────────────────────────┘

1, 5  `norms.py`      adds the parts of the product before, with its scales, bias and gate, to the
                      residual; LayerNorm, modulation, rounding, and the sum of the row's codes
2, 4, 6, 7
      `products.py`   integer products of few rows; those that would leave most of a GPU idle split
                      K, and their parts are added up by the next norm, exactly in any order
3     `attention.cu`  norms of q and k, codes of k and v into the cache, softmax over the whole row,
                      its rounding, the average of values, and codes (`attention.py` has the formula
                      and the plain PyTorch); `float_attention.py` where attention is not quantized

Every kernel looks the scales of the step's position up by itself, so that one recorded graph serves
many positions. On Hopper a kernel, but for attention's, starts while the one before it ends
(programmatic launch), and loads what does not depend on it. `blocks.py` runs the kernels in a row
and says where it can.
"""

"""A transformer block of many rows in integers: the kernels from one residual stream to the next.

M rows (a token of an image each) of C channels, F hidden ones:

    stream x (M, C) ──► 1 norm ──► codes (M, C) ──► 2 qkv product ──► q, k, v (M, 3 C)
        │                                                                │
        │                    branch (M, C) ◄── 4 proj product ◄── codes (M, C) ◄── 3 attention
        ▼                          │
    5 residual and norm ◄──────────┘
        ├──► codes (M, C) ──► 6 fc1 product, GELU ──► codes (M, F) ──► 7 fc2 product ──┐
        └──► stream x (M, C) ──────────────────► 8 residual ◄── branch (M, C) ◄────────┘

1, 5        `norms.py`, `norm_kernel.py`: residual, LayerNorm, modulation and rounding
2, 4, 6, 7  `../gemm.py`: integer products; 6 with GELU (`gelu.py`), scales of fc2's
            input if there are any, and rounding in its epilogue
3           `attention.py`, `attention_kernel.py`: norms of queries and keys, softmax, average of
            values, in half precision, and rounding. Where both products of attention are in
            integers, `../attention.py` or `../numerators.py` runs, and kernel 1 rounds
8           elementwise, once behind the last block: in all others kernel 1 of the next block adds
            the branch (`layers.chain_blocks`). In the epilogue of 7 it would take 140 us where it
            takes 80 by itself (25,600 x 4,096 x 1,024 on an H200,
            `experiments/results/raw/kernels-h200.json`)
(a cache)   `keys_kernel.py` normalises keys for it, `attention_kernel.py` those without one

Before them comes AdaLN's projection: in integers, kernel 1 with SiLU and a product like 2.

Everything that writes codes (1, 3, 5, 6) writes the sums of their rows too, so that weights with
zero points cost no pass of their own; everything that reads or writes them looks their scales up by
itself, by the positions of the tokens. `operators.py` makes operators of PyTorch of the kernels,
with plain PyTorch for devices without them, and `layers.py` runs them in a row and says where it
can. A decoding step of one token has kernels of its own.
"""

"""The compiled kernels, where the library was built at install; `dijiang_model.serving` runs whole steps in them.

- `library`: finds the kernels built for this CPU; there are none where no compiler was at hand.
- `choose`, `draw`: greedy and sampled tokens.
- `digest`: which sources a library was built from.

What the kernels promise beyond speed: a token's logits and state are the same bit for bit in any batch, for any
number of threads, and however its prompt is cut. `src/` keeps that by writing out the order of every sum.
"""

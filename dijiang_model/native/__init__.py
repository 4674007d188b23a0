"""Steps in C++: one call for all layers and all rows, where the library was built at install.

- `library`: finds the kernels built for this processor; there are none where no compiler was at hand.
- `weights`: a model's tensors as the kernels want them, in place.
- `decoder`: runs steps, decode rows and prefill segments alike; chosen once, when a model is prepared.
- `int8`: weight-only quantisation.

What the kernels promise beyond speed: a token's logits and state are the same bit for bit in any company, for any
number of threads, and however its prompt is cut. `src/` keeps that by writing out the order of every sum.
"""

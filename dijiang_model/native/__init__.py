"""The decode step in C++: one call for all layers and all rows, where the library was built at install.

- `library`: finds the kernels built for this processor; there are none where no compiler was at hand.
- `weights`: a model's tensors as the kernels want them, in place.
- `decoder`: runs the decode rows of a step; `decoder_for` chooses it once, when a model is prepared.
- `int8`: weight-only quantisation, used by the kernels and by prefill alike.
"""

"""What an engine runs steps with: a frozen model, for which compiled kernels, Triton or torch were chosen once.

- `network`: chooses, and is all that an engine sees of a model.
- `decoder`: whole steps in the compiled kernels, decode rows and prefill segments alike.
- `decoding`: steps prepared once for sequences that decode.
- `weights`: a model's tensors as the compiled kernels want them, in place.
"""

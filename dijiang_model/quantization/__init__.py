"""Weights in few bits: int8 with a scale per row, int4 with a scale (and perhaps a minimum) per group of columns.

- `config`: which kind, as `config.json` says it.
- `rounding`: from weights to codes and back.
- `weight`: codes as a part of a network, which multiplies and looks up.
- `modules`: where they stand in a network.
- `tensors`: a checkpoint's tensors, rounded while they are read.
- `folder`, `cli`: a saved model rounded into another folder.

Projections take the kind asked for. Token embeddings and the output head are int8 in both: their rounding to int4
costs as much likelihood as that of all projections together (`docs/quantization.md`). Norms, biases, position
embeddings and everything of the kernel stay as they are.
"""

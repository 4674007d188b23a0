"""Measurements: `dijiang bench`, and scripts for what it does not cover.

- `machine`: the device's name, memory bandwidth and matrix rate; interleaved timing.
- `costs`: bytes and operations of a step, and the time that they take at those rates at least: the floor.
- `decode`, `prefill`, `serve`, `train`: the commands. `report` shows and keeps what they found, `plots` draws it.
- `transformers_twin`, `llama_cpp`: the same base weights in what users would run instead.
"""

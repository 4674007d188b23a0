"""The whole CUDA path on a machine without a GPU: tensors without memory on a device that only keeps the rules.

- `guard.cpp`: lets a CPU build of torch have tensors on `cuda`.
- `machine`: the device. Watches every operation for what a real one would refuse or wait for, and counts launches.
- `triton_stand_in`: kernels that check their arguments and compute nothing.
- `engines`: engines of real shapes on that device, and requests of every kind.
- `faults`: mistakes that must be found.
- `drive`: runs it all in a process of its own; `tests/server/engine/test_cuda_without_a_gpu.py` reads what it prints.
"""

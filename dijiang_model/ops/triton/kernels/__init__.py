"""Device code alone, in Triton; everything around it is in the package above. Letters as in `ops.linear`.

Every kernel has its naive twin in `dijiang_model.reference` by way of the whole operator, which the tests compare
with `ops.torch_attention` and with the reference. Rules that only a GPU can break:
    - offsets that grow with slots or tokens are 64 bits wide;
    - what a program reads and later overwrites is read before a barrier and written behind it, for threads may
      load copies of one element at different times;
    - a program reads no element that another program of the same launch writes.
"""

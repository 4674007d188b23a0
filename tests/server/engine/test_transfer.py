"""Lists come over as they were, whatever the order they were added in."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from server.engine.transfer import Transfer

CPU = torch.device("cpu")
integers = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5)
reals = st.lists(st.floats(allow_nan=False), max_size=5)


@given(lists=st.lists(integers.map(lambda values: (False, values)) | reals.map(lambda values: (True, values))))
def test_every_list_arrives_unchanged(lists: list[tuple[bool, list[float]]]) -> None:
    transfer = Transfer()
    fields = [
        transfer.reals(values) if is_real else transfer.integers(int(value) for value in values)
        for is_real, values in lists
    ]
    arrived = transfer.send(CPU)
    for field, (is_real, values) in zip(fields, lists, strict=True):
        assert arrived[field].tolist() == values
        assert arrived[field].dtype == (torch.float64 if is_real else torch.int64)

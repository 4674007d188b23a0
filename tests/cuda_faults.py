"""A pytest plugin for GPUs: a fault that a kernel leaves behind ends its worker, not every test that comes after.

After an illegal access, say, each later call to the device fails in that process. With xdist a worker that ends is
replaced by a fresh one, which goes on behind the test that was running: `-p tests.cuda_faults -n 8`. Without workers
nothing ends. What the test said before is told at once, for it goes with the worker.
"""

import os
from collections.abc import Generator

import pytest
import torch

FAULTED = 70
"""Exit status of a worker whose device can no longer be used."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: "pytest.CallInfo[None]"
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Looks at the device after each failure."""
    report = yield
    if report.failed and "PYTEST_XDIST_WORKER" in os.environ and (fault := device_fault()) is not None:
        told = f"\n{item.nodeid} left the device unusable: {fault}\n{report.longreprtext}\n"
        os.write(2, told.encode(errors="replace"))
        os._exit(FAULTED)
    return report


def device_fault() -> str | None:
    """What every call to the device says from now on; None: it works, or there is none."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None

"""What holds for every test: the same random numbers in any order, and Triton's interpreter where there is no GPU.

pytest-randomly shuffles the tests and prints its seed (`-p no:randomly` keeps their order); what a test draws does not
depend on it. `--hypothesis-profile=explore` tries new examples instead of the same ones.
"""

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

settings.register_profile(
    "repeatable",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],  # of a loaded machine it says nothing
)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)

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


def pytest_configure(config: pytest.Config) -> None:
    config.option.randomly_reset_seed = False  # by itself it would seed with the number that shuffles


def pytest_sessionstart(session: pytest.Session) -> None:
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    seed = getattr(session.config.option, "randomly_seed", None)
    if terminal is not None and seed is not None:
        terminal.write_line(f"Using --randomly-seed={seed}")  # its own line is one of those that -q leaves out


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [
        report for report in terminalreporter.stats.get("skipped", []) if "needs Chromium" in str(report.longrepr)
    ]
    if skipped:
        terminalreporter.section("the page was NOT tried in a real browser", sep="*", red=True, bold=True)
        terminalreporter.write_line(
            f"{len(skipped)} tests did not run, for want of Chromium: make browser, or see docs/playground.md"
        )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)

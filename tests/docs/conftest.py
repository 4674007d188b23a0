"""Names every snippet that was run and every one that was not, at the end of the run."""

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.stats.get("passed", [])
    said = [value for report in reports for name, value in report.user_properties if name == "snippet"]
    if said:
        terminalreporter.section("snippets of the documentation")
        for line in sorted(said):
            terminalreporter.write_line(str(line))

import sys
from pathlib import Path

TESTS = Path(__file__).parent
sys.path[:0] = map(str, (TESTS.parent, TESTS / "tools", TESTS / "experiments"))

import tiny  # noqa: E402, F401 (sets the number of threads, before torch is imported)


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")

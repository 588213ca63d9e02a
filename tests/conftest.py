import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import tiny  # noqa: E402, F401 (sets the number of threads, before torch is imported)


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")

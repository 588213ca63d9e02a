import signal
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
sys.path[:0] = map(str, (TESTS.parent, TESTS / "tools", TESTS / "experiments"))

import tiny  # noqa: E402 (sets the number of threads, before torch is imported)

import common  # noqa: E402
import prepare_blizzard  # noqa: E402

# A job in the background, or below nohup, ignores these, and so would every process started here.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An HDF5 file of twelve tiny recordings."""
    path = tmp_path_factory.mktemp("data") / "tiny.h5"
    tiny.write_tiny_data(path)
    return path


@pytest.fixture(scope="module")
def short_samples():
    """A tenth of a second of speech in place of ten."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "write_samples", tiny.write_short_samples)
        yield


@pytest.fixture
def without_filter(monkeypatch):
    """No adaptive filter among the yardsticks: it takes a step for every sample of a recording."""
    monkeypatch.setattr(prepare_blizzard, "fitted_filter", lambda corpus: None)

"""What every test shares: one thread, one seed, a working directory of its own (pytest.ini sets the path)."""

import pytest
import torch


def pytest_configure(config):
    """Gymnasium warns that v4 is old and that actions are not of its own kind; the tests use both on purpose."""
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:gymnasium.*")
    config.addinivalue_line("filterwarnings", "ignore::UserWarning:gymnasium.*")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small tensors: more threads only cost time."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """Seeds torch, and keeps what MuJoCo logs to the working directory out of the repository."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)

"""What every test shares: one thread, one seed, a working directory of its own (pytest.ini sets the path)."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
    """Seeds torch, takes back the precision that a program before has set, and keeps what MuJoCo logs to the working
    directory out of the repository."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    monkeypatch.chdir(tmp_path)


class NoHostReads(TorchDispatchMode):
    """Fails on what makes the host wait for a GPU: a tensor's value read, or a shape that depends on values."""

    NAMES = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.NAMES, f"{name} reads a value on the host"
        if name in ("index", "index_put_"):
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), "a boolean index reads its count"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_host_reads():
    return NoHostReads()


class NoFloat64(TorchDispatchMode):
    """Fails on an operation that gives a float64 tensor: Apple's MPS has none. (On the host, NumPy has.)"""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            assert getattr(tensor, "dtype", None) != torch.float64, f"{func} gives a float64 tensor"
        return result


@pytest.fixture
def no_float64():
    return NoFloat64()

import pytest
import torch

# The tests' tensors are tiny, and some tests fork.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits most comes first, for the rest to run beside it."""
    items.sort(key=lambda item: item.path.name != "test_services.py")

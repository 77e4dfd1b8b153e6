import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits most comes first, for the rest to run beside it."""
    items.sort(key=lambda item: item.path.name != "test_services.py")

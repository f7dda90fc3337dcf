"""What all tests share: on several workers, a file's tests stay together, since they share what the file set up."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group by file for ``--dist loadgroup``; a test that names a group of its own goes there."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(str(item.path)))

"""One browser for all pages."""

from collections.abc import Iterator

import pytest

from tests.report.browser import Browser


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """A real browser."""
    found = Browser()
    yield found
    found.close()

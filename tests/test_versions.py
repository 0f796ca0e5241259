"""Hosts in versions that an integration works with, and in others."""

import pytest

from v05.integrations.versions import check_version, installed


def test_versions_in_range() -> None:
    for found in ("1.16.0", "1.16.3", "1.99.0", "1.17.0rc1"):
        check_version("trl", "1.16.0", "2", found)
    check_version("verl", "0.9.1", "0.10", "0.9.2")


@pytest.mark.parametrize("found", ["1.15.2", "0.29.0", "2.0.0", "2.0.0rc1", "2.0.0.dev0", "3.1", "1.16.0rc1"])
def test_versions_out_of_range(found: str) -> None:
    with pytest.raises(ImportError, match=rf"trl is {found}; v05.integrations.trl works with trl>=1.16.0,<2: pip"):
        check_version("trl", "1.16.0", "2", found)


def test_what_is_not_installed() -> None:
    assert installed("a package that nobody has") is None
    with pytest.raises(ImportError, match=r"needs verl>=0\.9\.1,<0\.10; install it: pip install 'v05\[verl\]'"):
        check_version("verl", "0.9.1", "0.10", None)

"""Which verl this works with."""

from importlib.metadata import PackageNotFoundError, version
from typing import Final

from packaging.version import Version

LOWEST, BELOW = "0.9.1", "0.10"
REQUIRED: Final = f"verl>={LOWEST},<{BELOW}"


def check_verl() -> None:
    """Raise ImportError unless a supported verl is installed; tested with 0.9.1."""
    try:
        found = version("verl")
    except PackageNotFoundError:
        raise ImportError(f"v05.integrations.verl needs {REQUIRED}; install it: pip install 'v05[verl]'") from None
    if not Version(LOWEST) <= Version(found) < Version(BELOW):
        raise ImportError(f"verl is {found}; v05.integrations.verl works with {REQUIRED}: pip install 'v05[verl]'")

"""Which TRL this works with."""

from importlib.metadata import PackageNotFoundError, version
from typing import Final

from packaging.version import Version

LOWEST: Final = "1.16.0"
BELOW: Final = 2  # major version
REQUIRED: Final = f"trl>={LOWEST},<{BELOW}"


def check_version(found: str | None) -> None:
    """Raise ImportError unless a version of TRL is supported.

    `V05Trainer` overrides methods that TRL does not promise to keep (their names begin with an underscore), so the
    range is narrow. Tested with 1.16.0.

    Args:
        found: what is installed, or None.
    """
    if found is None:
        raise ImportError(f"v05.integrations.trl needs {REQUIRED}; install it: pip install 'v05[trl]'")
    if Version(found) < Version(LOWEST) or Version(found).major >= BELOW:
        raise ImportError(f"trl is {found}; v05.integrations.trl works with {REQUIRED}: pip install 'v05[trl]'")


def installed() -> str | None:
    """Return the version of TRL that is installed, or None."""
    try:
        return version("trl")
    except PackageNotFoundError:
        return None

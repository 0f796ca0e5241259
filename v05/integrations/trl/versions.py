"""Which TRL this works with."""

from importlib.metadata import PackageNotFoundError, version
from typing import Final

from packaging.version import Version

LOWEST, BELOW = "1.16.0", "2"
REQUIRED: Final = f"trl>={LOWEST},<{BELOW}"


def check_trl() -> None:
    """Raise ImportError unless a supported TRL is installed.

    `V05Trainer` overrides methods that TRL does not promise to keep (those that begin with an underscore), so the range
    is narrow: tested with 1.16.0.
    """
    try:
        found = version("trl")
    except PackageNotFoundError:
        raise ImportError(f"v05.integrations.trl needs {REQUIRED}; install it: pip install 'v05[trl]'") from None
    if not Version(LOWEST) <= Version(found) < Version(BELOW):
        raise ImportError(f"trl is {found}; v05.integrations.trl works with {REQUIRED}: pip install 'v05[trl]'")

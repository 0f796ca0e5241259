"""Which versions of a host an integration works with."""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version


def installed(host: str) -> str | None:
    """Return the version of a package that is installed, or None."""
    try:
        return version(host)
    except PackageNotFoundError:
        return None


def check_version(host: str, lowest: str, below: str, found: str | None) -> None:
    """Raise ImportError unless a version of a host is supported.

    Args:
        host: name of the package, of the extra that installs it and of the integration.
        lowest: version that works.
        below: first version that is not known to; what comes before its release counts as that version.
        found: what is installed, or None.
    """
    required, where = f"{host}>={lowest},<{below}", f"v05.integrations.{host}"
    if found is None:
        raise ImportError(f"{where} needs {required}; install it: pip install 'v05[{host}]'")
    if not Version(lowest) <= Version(found) < Version(f"{below}.dev0"):
        raise ImportError(f"{host} is {found}; {where} works with {required}: pip install 'v05[{host}]'")

"""The version of this program."""

from importlib.metadata import PackageNotFoundError, version


def site_version() -> str:
    """Return the version of the installed package; 0 if there is none."""
    try:
        return version("umbel")
    except PackageNotFoundError:  # run from a folder, without having been installed
        return "0"

"""The ``adaptive`` command, from outside of its package: on PyPI another package is named ``adaptive`` as well.

Installed beside this one, it replaces ``adaptive/__init__.py`` or hides an editable installation as a whole; removed,
it takes that file along. What lies inside ``adaptive`` cannot tell of it then.
"""

from __future__ import annotations

import sys
from importlib import metadata


def main(arguments: list[str] | None = None) -> None:
    """Run the command; where another package stands in its place, end the process with 1 and one line that says so."""
    try:
        from adaptive.commands.main import main as command
    except Exception as error:  # whatever the other package raises
        try:
            version = metadata.version("adaptive")
        except metadata.PackageNotFoundError:
            raise error from None
        sys.exit(
            f"adaptive: error: Adaptive cannot be imported ({type(error).__name__}: {error}): another package of the "
            f"name, adaptive {version} of PyPI, is installed in its place; pip uninstall -y adaptive, and then install "
            "Adaptive anew: pip install --force-reinstall --no-deps adaptive-training (or -e CHECKOUT)"
        )
    command(arguments)


if __name__ == "__main__":
    main()

"""The command line `peculium`: each verb parses, calls one function elsewhere, and prints."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from peculium_server.cli.verbs import run  # noqa: PLC0415 - to say what is missing, if it is
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("peculium"):
            raise
        sys.exit(
            f"The command line needs {error.name}, which only comes with the server:"
            " pip install 'peculium[server,embedded]'"
        )
    sys.exit(run())

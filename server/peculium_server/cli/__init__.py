"""The command line `peculium`: each verb parses, calls one function elsewhere, and prints."""

from __future__ import annotations

import sys

from peculium_server.config import quieten_grpc


def main() -> None:
    """Run the command line."""
    # Before gRPC is imported, which is when it reads that.
    quieten_grpc()
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

"""The command line, as `python -m peculium_server`."""

from __future__ import annotations

from peculium_server.cli import main

if __name__ == "__main__":
    main()

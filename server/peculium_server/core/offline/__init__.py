"""Whether an export holds together, by what is written in it and nothing else: no database, no server."""

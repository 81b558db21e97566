"""The ledger's tables, and the only code that speaks to the database."""

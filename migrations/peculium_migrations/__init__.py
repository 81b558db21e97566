"""The ledger's schema, as steps. Run by `peculium migrate`, or by `peculium_server.store.migrate`."""

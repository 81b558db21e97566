"""The Peculium server: pure rules, the ledger's store, lanes, gRPC and the command line."""

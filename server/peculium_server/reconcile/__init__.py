"""A provider's bill against the calls of a ledger: pure rules, which read streams and entries given to them."""

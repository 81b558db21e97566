"""What a server tells those who run it: what is counted, what is traced, and what is logged."""

"""Token and record shards, order, packing, loader, ledger. Everything but the loader works without torch."""

"""Token and record shards, order, packing, loader, ledger."""

"""Every joule: counters of vendors, the sampler of a node, the ledger, and the facility around it."""

"""Which plan answers a query at least cost: the cost of plans here, keys needed, the choice."""

"""The coordinating server: rounds, aggregation, consensus, the shared pruning mask."""

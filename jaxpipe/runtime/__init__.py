"""Runs a schedule: lowers it to tables, executes them inside one shard_map."""

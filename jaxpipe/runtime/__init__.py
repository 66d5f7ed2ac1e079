"""Runs a schedule: lowers it to tables, and executes these inside one shard_map.

Nothing here is public; all modules below are internal and may change without notice.
"""

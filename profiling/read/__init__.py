"""Readers: files of profilers, and schedules, as traces; internal."""

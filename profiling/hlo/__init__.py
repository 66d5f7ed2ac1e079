"""Compiled programs: their text, collectives, costs, schedules, and chips to compile for; internal."""

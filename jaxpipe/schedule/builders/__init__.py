"""One schedule a file, each a `jaxpipe.schedule.Builder`.

Nothing here is public; `jaxpipe.schedule` has the builders.
"""

"""Memory and time of a pipeline before it runs: `jaxpipe.plan`, `jaxpipe.Chip` and `jaxpipe.Achieved`.

Nothing here is public; all modules below are internal and may change without notice.
"""

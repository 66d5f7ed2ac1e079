"""Memory and time of a pipeline before it runs: `jaxpipe.plan`; all modules here are internal."""

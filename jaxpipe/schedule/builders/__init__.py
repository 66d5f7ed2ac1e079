"""Schedules, one builder a module, with the steps of their sources; internal, `jaxpipe.schedule` exports them."""

"""Which expert goes to which slot: policies, what they are made of, and what plans are worth. Internal."""

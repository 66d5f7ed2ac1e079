"""What a kernel or an operation does, told by its names; internal."""

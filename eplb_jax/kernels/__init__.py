"""What runs on the chip: grouped matrix products, moved rows, the gate's gradient; internal."""

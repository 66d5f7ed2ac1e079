"""What runs on the chip: grouped matrix products, moves of rows, the gradient of the gate, precision. Internal."""

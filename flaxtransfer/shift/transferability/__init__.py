"""How well features suit labels, beside what chance alone makes of it."""

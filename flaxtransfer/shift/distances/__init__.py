"""How far two samples of features are apart, beside what chance alone makes of it."""

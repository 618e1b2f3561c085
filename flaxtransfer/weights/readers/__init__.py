"""Readers of weight files: bytes to named arrays, without running code from the file."""

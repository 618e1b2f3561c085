"""Readers of weight files: from bytes to named arrays, without running code from the file."""

"""Fault injection: kills, damaged files, races. Samples run with the suite; see ``kills.py``."""

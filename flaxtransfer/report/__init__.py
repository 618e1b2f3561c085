"""Figures, terminal tables and HTML pages of results; the only room that imports matplotlib."""

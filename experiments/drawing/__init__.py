"""Procedurally drawn images: glyphs of many scripts and coloured fractals, never a decimal digit."""

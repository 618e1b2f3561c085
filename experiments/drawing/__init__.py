"""Procedurally drawn images: glyphs of many scripts and coloured fractals, no decimal digit."""

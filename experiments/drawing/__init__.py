"""Procedurally drawn images: glyphs of many scripts and colored fractals, no decimal digit."""

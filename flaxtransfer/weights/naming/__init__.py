"""Naming tables: the keys of other programs and the paths of ours, in both directions."""

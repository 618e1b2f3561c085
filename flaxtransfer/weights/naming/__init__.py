"""Naming tables: keys of other programs and our paths, in both directions."""

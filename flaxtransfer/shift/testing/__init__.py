"""Statistical tests of whether a target differs from its source, and in what."""

"""From logits to probabilities that mean what they say, and how far they are from it."""

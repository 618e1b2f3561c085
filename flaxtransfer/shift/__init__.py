"""Domain shift: which kind it is, what of it can be corrected, and what cannot be known.

Arrays in, values out: features, logits, probabilities and labels of any model, of numpy or JAX.
Names are looked up when they are used, so that nobody waits for what is not.
"""

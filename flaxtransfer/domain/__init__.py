"""A network in another domain than it was trained for: adapted to unlabelled images, guarded."""

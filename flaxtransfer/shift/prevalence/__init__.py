"""How common each class is in a target without labels, and predictions corrected for it."""

"""What was found, drawn and written for a person."""

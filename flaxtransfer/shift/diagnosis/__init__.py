"""Which kind of shift a target has, as far as the data tell, and what to do."""

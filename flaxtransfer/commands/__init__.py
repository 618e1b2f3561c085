"""The commands of the terminal: each a frozen dataclass of options and a function that runs it."""

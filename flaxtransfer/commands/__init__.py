"""Subcommands of the command line: their options, and one function each that runs them."""

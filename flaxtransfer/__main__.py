"""``python -m flaxtransfer``: the command line."""

from flaxtransfer.cli import main

main()

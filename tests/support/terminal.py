"""What the tests of the commands share."""

SIZE = 16
"""Of the images, px."""


def only_line(capsys) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]

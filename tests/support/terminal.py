"""What the tests of the commands share."""

SIZE = 16
"""Of the images, px."""


def train(folder, weights, run, *options) -> list[str]:
    """The words of ``flaxtransfer train``, without the comparison."""
    places = ["--data", f"folder:{folder}", "--weights", str(weights), "--run", str(run)]
    return ["train", *places, "--compare", "no", *map(str, options)]


def only_line(capsys) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]

"""``flaxtransfer explain``: pictures and a verdict, of a run and of weights."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from flaxtransfer.cli import run
from flaxtransfer.report.figures import plot_frequency, plot_saliency
from tests.support.terminal import only_line


def test_explains_the_test_images_of_a_run(finished, tmp_path, capsys):
    out = tmp_path / "new" / "explained"
    assert run(["explain", str(finished), "--out", str(out), "--most-images", "6"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Grad-CAM at layer" in text or "exact CAM at layer" in text
    assert "random blobs" in text
    assert "rank correlation" in text
    report = json.loads((out / "explanation.json").read_text())
    assert len(report["images"]) == len(report["saliency"]["maps"]) == 6
    assert report["faithfulness"]["images"] == 6
    assert sorted(path.name for path in out.iterdir()) == ["explanation.json", "page1.png"]
    page = np.asarray(Image.open(out / "page1.png").convert("RGB"))
    assert page.std() > 10
    # Again: the folder is an earlier explanation, which is replaced.
    assert run(["explain", str(finished), "--out", str(out), "--most-images", "2"]) == 0
    assert len(json.loads((out / "explanation.json").read_text())["images"]) == 2


def test_explains_weights_on_a_folder(weights, folder, tmp_path, capsys):
    out = tmp_path / "explained"
    arguments = ["explain", str(weights), "--data", f"folder:{folder}", "--out", str(out)]
    assert run([*arguments, "--layer", "layer1", "--method", "hires_cam"]) == 0
    assert "HiResCAM at layer1: 16 maps" in capsys.readouterr().out
    # Two pages of twelve; names are paths below the folder.
    assert (out / "page2.png").exists()
    report = json.loads((out / "explanation.json").read_text())
    assert "dark/0.png" in report["images"]
    assert report["saliency"]["method"] == "hires_cam"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["WEIGHTS"], "--data must name images"),
        (["RUN", "--layer", "layr1"], "did you mean 'layer1'"),
        (["RUN", "--method", "cam", "--layer", "layer1"], "'cam' must be at layer4"),
        (["RUN", "--out", "FULL"], "which holds other files"),
        (["RUN", "--data", "scans"], "unknown data source"),
    ],
)
def test_what_cannot_be_explained(words, text, weights, finished, tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("kept")
    places = {"WEIGHTS": str(weights), "RUN": str(finished), "FULL": str(full)}
    words = [places.get(word, word) for word in words]
    out = [] if "--out" in words else ["--out", str(tmp_path / "explained")]
    assert run(["explain", *words, *out]) == 2
    assert text in only_line(capsys)
    assert not (tmp_path / "explained").exists()


def test_pictures_of_one_image_and_of_many_bands():
    random = np.random.default_rng(0)
    for count, bands in ((1, 3), (5, 1), (13, 4)):
        images = random.integers(0, 255, (count, 8, 8, bands), np.uint8)
        drawn = io.BytesIO()
        titles = ["$x$ [red]"] * count
        plot_saliency(drawn, images, random.random((count, 8, 8)), titles, "better than blobs")
        assert drawn.getvalue().startswith(b"\x89PNG")


@pytest.mark.parametrize("maps", [np.zeros((2, 4, 4)), np.zeros((1, 8, 8))])
def test_maps_that_do_not_fit_the_images(maps):
    with pytest.raises(ValueError, match="a map and a title for each image"):
        plot_saliency(io.BytesIO(), np.zeros((2, 8, 8, 3), np.uint8), maps, ["a", "b"], "")


def test_the_picture_of_a_frequency_response(tmp_path):
    import jax

    import flaxtransfer as ft
    from flaxtransfer.analysis import frequency_response

    model = ft.resnet(ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=2, classes=3))
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    found = frequency_response(
        model, model.init(jax.random.key(0)), images, random_weights=True, segments=["stem"]
    )
    plot_frequency(tmp_path / "response.png", found)
    assert np.asarray(Image.open(tmp_path / "response.png").convert("RGB")).std() > 10
    with pytest.raises(ValueError, match="must end in"):
        plot_frequency(tmp_path / "response.txt", found)

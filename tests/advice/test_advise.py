"""Targets that are made so that the right advice is known, and what is said of them."""

import json
from dataclasses import replace

import jsonschema
import numpy as np
import pytest

import flaxtransfer as ft
from flaxtransfer.advice.advise import SCHEMA, decide
from flaxtransfer.analysis.profile import LearningCurve
from flaxtransfer.cli import run
from flaxtransfer.report.pages import render_advice
from tests.support.targets import pretrained, source

KNOWN = {
    "colors": {"depth"},
    "fine gratings": {"early"},
    "random labels": {"nothing"},
    "coarse gratings": {"ceiling", "level"},
}
"""A hue is known at the stem and lost behind it; a grating as fine as the pixels gets through no
stage; labels that were drawn have nothing to be known; and coarse gratings are known everywhere."""


@pytest.fixture(scope="module")
def advice():
    return {name: ft.advise(pretrained(), source(name, 20, 0)) for name in KNOWN}


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_known_of_a_target_is_said(advice, name):
    assert advice[name].verdict in KNOWN[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_it_is_said_of_every_draw(name):
    found = [ft.advise(pretrained(), source(name, 20, seed), seed=seed) for seed in range(100, 120)]
    assert [each.verdict for each in found if each.verdict not in KNOWN[name]] == []


def test_the_plan_is_of_what_is_recommended(advice):
    colors, fine = advice["colors"], advice["fine gratings"]
    # What this network is known to gain by training comes before the head that costs nothing.
    assert colors.best.strategy == "early_layers"
    assert str(colors.candidates[1]) == "depth_head (segment stem)"
    assert "a head there is the one to beat" in colors.summary
    assert "points over such a head by early_layers" in "\n".join(colors.reasons)
    plan = colors.candidates[1].plan(pretrained().variables["params"])
    assert plan.ends_at == colors.evidence.best.name == "stem"
    assert plan.phases[0].only_solves
    assert fine.best.strategy == "early_layers"
    assert {"discriminative", "batch_norm_only"} == {
        one.strategy for one in fine.candidates if not one.tried
    }
    assert advice["random labels"].plan is None
    assert advice["random labels"].best is None
    # Of depths that are level the last, if it is one of them: it leaves the network whole.
    coarse = advice["coarse gratings"]
    assert coarse.best.skill >= coarse.evidence.best.skill - 0.01
    assert coarse.best.cost == 0
    for found in advice.values():
        assert len(found.challengers) <= 4


def test_each_reason_has_a_number_and_what_follows(advice):
    for found in advice.values():
        text = str(found)
        assert max(map(len, text.splitlines())) <= 80
        assert found.summary.split(".")[0][:40] in text
        for reason in found.reasons:
            assert any(character.isdigit() for character in reason)
    colors = "\n".join(advice["colors"].reasons)
    assert "points above layer4 on the same images" in colors
    assert "the head should read there" in colors
    assert "no more than luck" in advice["random labels"].reasons[0]
    fine = "\n".join(advice["fine gratings"].reasons)
    assert "> 1/4 cycles per pixel" in fine
    # Mirrored, a grating is of another class, and a hue is not.
    assert "train with --flip no" in fine
    assert "train with --augment none" in fine
    assert "--flip" not in colors
    assert "--augment" not in colors


def test_json_follows_its_schema_and_the_page_holds_everything(advice):
    for name, found in advice.items():
        content = json.loads(json.dumps(found.to_json(), allow_nan=False))
        jsonschema.validate(content, SCHEMA)
        page = render_advice(found, data=f"{name}<script>", weights="w")
        assert "<script>" not in page
        for text in (*found.reasons, *found.unknown):
            assert text.split(":")[0].replace("'", "&#x27;").replace(">", "&gt;") in page
        assert page.count("data:image/png;base64") == 1


NONE = (0.0, 0.0)


def curve(labels, at_hand=0.1, floor=0.05, variance=0.0):
    """Of an error, ``floor`` of which no label mends, and ``at_hand`` of which goes with labels."""
    slope, sizes = at_hand * np.sqrt(labels), (labels / 4, labels / 2, labels)
    return LearningCurve(
        sizes, tuple(floor + slope / np.sqrt(sizes)), (0.01, 0.01, 0.0), floor, slope,
        (NONE, (0.0, variance)),
    )  # fmt: skip


def test_labels_are_to_be_collected_first_where_training_is_not_known_to_gain_as_much(advice):
    """By the law, 0.1 / sqrt(1 + x) = 0.08 at x = 9 / 16 of the 160 labels: 90 more."""
    known = advice["colors"].evidence
    evidence = replace(known, network="of somebody", curve=curve(160))
    params = pretrained().variables["params"]
    found, plain = (decide(one, params) for one in (evidence, replace(evidence, curve=None)))
    assert found.collect == 90
    assert found.summary == f"{plain.summary} Collect labels first: about 90 more for 2 points."
    # Beside the law, 1.5 points of error per doubling.
    error = 1.5 * np.log2(25 / 16)
    assert found.reasons[-1] == (
        f"90 more labels would gain 2.0 ± {error:.1f} points (threshold: 1 standard error), and "
        "training, of which nothing is known with this network, is expected to gain 0.0 "
        "(threshold: 2): collect labels first, unless a race (`--strategy auto`) shows that "
        "training gains more."
    )
    # What is recommended stays.
    assert (found.verdict, found.candidates) == (plain.verdict, plain.candidates)
    jsonschema.validate(json.loads(json.dumps(found.to_json())), SCHEMA)
    assert found.to_json()["collect"] == 90
    row = {"mean": 0.019, "deviation": 0.1, "targets": 10}
    gains = {"network": known.network, "gains": {"all": {"early_layers": row}}}
    evidence = replace(evidence, network=known.network)
    assert "training is expected to gain 1.9 " in decide(evidence, params, gains).reasons[-1]
    # What they do not cover is said.
    (left,) = (
        text for text in decide(evidence, params, gains).unknown if "gained elsewhere" in text
    )
    assert "high_rate_fine_tuning" in left
    assert "fewer than 8 kinds of images of it; 0 ± 6 points are assumed" in left
    assert not any("gained elsewhere" in text for text in decide(evidence, params).unknown)
    row["mean"] = 0.021
    assert decide(evidence, params, gains).collect is None


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("colors", {"curve": curve(160, 0.0)}),
        ("colors", {"curve": curve(160, 0.039)}),  # 2 points are beyond 4 times as many
        ("colors", {"curve": curve(160, 0.05)}),  # within, and beyond what the law is sure of
        ("colors", {"curve": curve(160, variance=4.0)}),
        ("colors", {"curve": replace(curve(160), errors=(0.5, 0.1, 0.4))}),  # no law fits
        ("colors", {"curve": None}),
        ("colors", {"curve": curve(160), "available": 10_000}),  # there are more at hand
        ("fine gratings", {"curve": curve(120)}),  # early layers have to move
        ("random labels", {"curve": curve(160)}),
    ],
)
def test_labels_are_not_to_be_collected_first(advice, name, changed):
    evidence = replace(advice[name].evidence, network="of somebody", **changed)
    found = decide(evidence, pretrained().variables["params"])
    assert found.collect is None
    assert "ollect labels first" not in f"{found.summary} {found.reasons}"


def test_images_that_say_nothing_get_no_advice():
    gray = np.full((40, 32, 32, 3), 128, np.uint8)
    gray[:, 0, 0, 0] = np.arange(40)  # Else they were one image.
    found = ft.advise(pretrained(), ft.ArraySource(gray, np.arange(40) % 2, ["a", "b"]))
    assert found.verdict == "nothing"


def test_many_classes_with_two_images_each():
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(50), 2)
    images = random.integers(0, 255, (100, 32, 32, 3)).astype(np.uint8)
    names = [f"class {n}" for n in range(50)]
    found = ft.advise(pretrained(), ft.ArraySource(images, labels, names))
    assert found.verdict == "nothing"
    assert "which has 2 images to learn and to judge by" in "\n".join(found.unknown)
    assert found.evidence.curve is None


def written(folder, family, per_class):
    from PIL import Image

    drawn = source(family, per_class, 4)
    for number, (image, label) in enumerate(zip(drawn.images, drawn.labels(), strict=True)):
        place = folder / f"class{label}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number}.png")
    return folder


def test_in_the_terminal(tmp_path, capsys):
    folder = written(tmp_path / "images", "colors", 8)
    out = [tmp_path / name for name in ("a.json", "a.html", "plan.yaml")]
    files = [
        word for pair in zip(("--json", "--html", "--plan"), out, strict=True) for word in pair
    ]
    gains = tmp_path / "gains.json"
    assert run(["advise", "--data", f"folder:{folder}", *map(str, files)]) == 0
    printed = capsys.readouterr().out
    assert "Recommended: early_layers." in printed
    jsonschema.validate(json.loads(out[0].read_text()), SCHEMA)
    assert "Recommended" in out[1].read_text()
    plan = ft.training.load_plan(out[2])
    assert plan.phases[0].steps == 300
    # Of a network of which something else is known, something else is said; of another, nothing.
    row = {"mean": -0.1, "deviation": 0.05, "targets": 10}
    names = ("early_layers", "high_rate_fine_tuning", "discriminative", "from_scratch")
    known = {"network": "resnet18w32", "gains": {"all": dict.fromkeys(names, row)}}
    gains.write_text(json.dumps(known))
    words = ["advise", "--data", f"folder:{folder}", "--gains", str(gains)]
    assert run(words) == 0
    assert "Recommended: depth_head (segment stem)." in capsys.readouterr().out
    gains.write_text(json.dumps(known | {"network": "resnet50"}))
    assert run(words) == 2
    assert "gains.json must be of the network that is advised on, resnet18w32, got gains of " in (
        capsys.readouterr().err
    )


def test_a_head_that_leaves_nothing_to_gain_is_where_train_ends_by_itself(tmp_path, capsys):
    folder = written(tmp_path / "images", "coarse gratings", 20)
    everything = ["--data", f"folder:{folder}", "--test-fraction", "0"]
    train = ["train", *everything, "--run", str(tmp_path / "run")]
    assert run(train) == 0
    printed = capsys.readouterr().out
    assert "so that nothing is trained; --strategy head_then_fine_tune trains all the same" in (
        " ".join(printed.split())
    )
    model = (tmp_path / "run" / "model.safetensors").read_bytes()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert [phase["steps"] for phase in config["phases"].values()] == [0]
    # The same head as of the strategy that solves it.
    alone = ["--run", str(tmp_path / "alone"), "--strategy", "solved_head"]
    assert run(["train", *everything, *alone]) == 0
    assert (tmp_path / "alone" / "model.safetensors").read_bytes() == model
    # A finished run is found again without a look at the images through the network.
    assert run([*train, "--resume"]) == 0
    (tmp_path / "run" / "summary.json").unlink()
    assert run([*train, "--resume"]) == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == model
    # Whoever says how long to train wants to train.
    assert (
        run(
            [
                "train",
                *everything,
                "--run",
                str(tmp_path / "b"),
                "--head-steps",
                "1",
                "--fine-tune-steps",
                "0",
                "--compare",
                "no",
            ]
        )
        == 0
    )
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert [phase["steps"] for phase in config["phases"].values()] == [1]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--json", "a.txt"], "--json: its name must end in .json"),
        (["--plan", "nowhere/plan.yaml"], "nowhere"),
        (["--data", "folder:nowhere"], "nowhere"),
        (["--gains", "nowhere.json"], "--gains must name a file; nowhere.json does not exist"),
    ],
)
def test_what_cannot_be_advised_is_one_line(words, text, capsys):
    assert run(["advise", *words]) == 2
    printed = capsys.readouterr().err
    assert text in printed
    assert "Traceback" not in printed

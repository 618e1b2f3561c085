"""Pictures of domain shift: that what was given is drawn, and what is refused."""

import io

import numpy as np
import pytest
from PIL import Image

from flaxtransfer.report.shift_figures import (
    plot_prevalence,
    plot_projection,
    plot_reliability,
    plot_tests,
)
from flaxtransfer.shift.prevalence import Prevalence
from flaxtransfer.shift.statistics import HypothesisTest, holm

BLUE, RED, GREEN, GRAY = (0, 114, 178), (213, 94, 0), (0, 158, 115), (89, 89, 89)


def drawn(draw, *arguments, **options):
    """The pixels of the PNG, int64 ``[height, width, 3]``."""
    file = io.BytesIO()
    draw(file, *arguments, **options)
    assert file.getvalue().startswith(b"\x89PNG")
    return np.asarray(Image.open(file).convert("RGB"), np.int64)


def places(pixels, color):
    """Of all pixels of the color: rows and columns."""
    return np.argwhere(np.abs(pixels - np.array(color)).sum(-1) < 12)


def prevalence(estimate, low=None, high=None, **options):
    shares = np.asarray(estimate, float)
    nothing = np.full(len(shares), np.nan)
    return Prevalence(
        "method",
        shares,
        nothing if low is None else np.asarray(low),
        nothing if high is None else np.asarray(high),
        0.95,
        np.full(len(shares), 1 / len(shares)),
        (50, 60),
        **options,
    )


def asked(p, **options):
    why = {} if p is not None else {"not_testable": "one class has no example"}
    return HypothesisTest("a test", "H0", 1.0, p, 0.7, "AUC", 0.6, (9, 9), **why | options)


FEATURES = np.random.default_rng(0).normal(size=(2, 40, 6))
LABELS = np.arange(40) % 3


def test_domains_lie_where_their_features_are():
    """A shift along the first component: the sides of the picture are the domains'."""
    source, target = FEATURES[0], FEATURES[1] + 20
    pixels = drawn(plot_projection, source, target, source_labels=LABELS, target_labels=LABELS)
    # Points are transparent: blue and red ones are told by which channel is the largest.
    inside = pixels[:, : int(0.8 * pixels.shape[1])]
    blue = np.argwhere(inside[..., 2] - inside[..., 0] > 60)[:, 1]
    red = np.argwhere(inside[..., 0] - inside[..., 2] > 60)[:, 1]
    assert max(blue) < min(red) or max(red) < min(blue)
    assert pixels.shape[1] >= 800


@pytest.mark.parametrize(
    ("labels", "markers"), [(None, False), (LABELS, True), (np.arange(40), False)]
)
def test_classes_have_markers_while_there_are_at_most_10(labels, markers):
    pixels = drawn(plot_projection, *FEATURES, source_labels=labels)
    # Text is smoothed, and has some gray in any case.
    assert (len(places(pixels, GRAY)) > 400) == markers


def test_more_features_than_examples_and_more_examples_than_points():
    wide = np.random.default_rng(0).normal(size=(2, 9, 300))
    assert drawn(plot_projection, *wide).std() > 0
    many = np.random.default_rng(0).normal(size=(5000, 3))
    assert drawn(plot_projection, many, FEATURES[0][:, :3]).std() > 0


@pytest.mark.parametrize(
    ("source", "target", "options", "text"),
    [
        (
            FEATURES[0],
            FEATURES[1][:, :3],
            {},
            r"must have shapes \[n, D\] and \[m, D\], got \[40, 6\] and \[40, 3\]",
        ),
        (FEATURES[0][:, :1], FEATURES[1][:, :1], {}, "must be finite and have >= 2 columns"),
        (FEATURES[0], np.full((4, 6), np.nan), {}, "must be finite and have >= 2 columns"),
        (
            *FEATURES,
            {"target_labels": [0, 1]},
            r"target labels must have shape \[40\], got \[2\]",
        ),
        (
            *FEATURES,
            {"source_labels": LABELS, "class_names": ["a"]},
            "must have a name, got class_names=",
        ),
    ],
)
def test_what_has_no_projection(source, target, options, text):
    with pytest.raises(ValueError, match=text):
        plot_projection(io.BytesIO(), source, target, **options)


def test_each_method_has_its_color_and_its_interval():
    one = prevalence([0.3, 0.7], [0.2, 0.6], [0.4, 0.8])
    plain, narrow = prevalence([0.3, 0.7]), prevalence([0.3, 0.7], [0.29, 0.69], [0.31, 0.71])
    lengths = []
    for estimate in (one, plain, narrow):
        pixels = drawn(plot_prevalence, [estimate, prevalence([0.5, 0.5])])
        inside = pixels[:, : int(0.7 * pixels.shape[1])]
        assert len(places(inside, RED))
        assert not len(places(inside, GREEN))
        first = places(inside[: inside.shape[0] // 2], BLUE)[:, 1]
        lengths.append(np.ptp(first))
    assert lengths[0] > 100 > 60 > lengths[1]
    assert lengths[1] <= lengths[2] < lengths[0]


def test_methods_stand_one_above_the_other():
    # The same estimate twice: points of both colors, in the order given, and none hides another.
    pixels = drawn(plot_prevalence, [prevalence([0.4])] * 2)
    inside = pixels[: int(0.8 * pixels.shape[0]), : int(0.7 * pixels.shape[1])]
    above, below = (places(inside, color)[:, 0] for color in (BLUE, RED))
    assert max(above) < min(below)


def test_what_is_not_identifiable_is_hollow():
    full = drawn(plot_prevalence, [prevalence([0.7, 0.3])])
    hollow = drawn(plot_prevalence, [prevalence([0.7, 0.3], identifiable=False, reason="singular")])
    assert len(places(hollow, BLUE)) < 0.7 * len(places(full, BLUE))


def test_of_many_classes_those_that_changed_most_are_drawn():
    shares = np.full(60, 1 / 60)
    shares[[3, 40]] += [0.01, -0.01]
    few = drawn(plot_prevalence, [prevalence(np.full(20, 0.05))])
    many = drawn(plot_prevalence, [prevalence(shares)])
    assert many.shape[0] == few.shape[0]


@pytest.mark.parametrize(
    ("estimates", "names", "text"),
    [
        ([], None, "must have 1 to 6 entries, got 0"),
        ([prevalence([0.5, 0.5])] * 7, None, "must have 1 to 6 entries, got 7"),
        (
            [prevalence([0.5, 0.5]), prevalence([1.0, 0, 0])],
            None,
            r"must have the same classes, got \[2, 3\]",
        ),
        ([prevalence([0.5, 0.5])], ["a"], r"got \[2\] classes and 1 names"),
    ],
)
def test_prevalences_that_do_not_belong_together(estimates, names, text):
    with pytest.raises(ValueError, match=text):
        plot_prevalence(io.BytesIO(), estimates, class_names=names)


def test_over_confidence_lies_below_the_diagonal_and_empty_bins_are_left_out():
    sure = np.array([0.2, 0.4, 0.6, 0.8])
    none = np.full(4, np.nan)
    below = drawn(plot_reliability, sure, sure - 0.1, [9, 9, 9, 9], sure - 0.1, sure - 0.1)
    above = drawn(plot_reliability, sure, sure + 0.1, [9, 9, 9, 9], sure + 0.1, sure + 0.1)
    assert places(below, BLUE)[:, 0].mean() > places(above, BLUE)[:, 0].mean() + 50
    right = np.where(sure < 0.5, np.nan, sure)
    half = drawn(plot_reliability, sure, right, [0, 0, 9, 9], none, none)
    assert places(half, BLUE)[:, 1].min() > places(above, BLUE)[:, 1].min() + 100


def test_the_title_has_the_error_of_bins_by_their_examples():
    # |0.8 - 0.9| in 9 of 10 and |0.8 - 0.3| in one is 0.14, and so is |0.8 - 0.66| in all.
    def title(right, count):
        ends = np.zeros(2), np.ones(2)
        picture = drawn(plot_reliability, [0.8, 0.8], right, count, *ends)
        return picture[: picture.shape[0] // 16]

    weighed = title([0.9, 0.3], [9, 1])
    assert weighed.std() > 0
    np.testing.assert_array_equal(weighed, title([0.66, 0.66], [1, 1]))
    assert (weighed != title([0.9, 0.3], [1, 1])).any()


@pytest.mark.parametrize(
    ("bins", "text"),
    [
        (([0.5], [0.5], [0], [0.4], [0.6]), "must be > 0 in >= 1 bin"),
        (([0.5], [0.5, 0.6], [3], [0.4], [0.6]), "must have shape \\[bins\\], got"),
    ],
)
def test_bins_that_cannot_be_drawn(bins, text):
    with pytest.raises(ValueError, match=text):
        plot_reliability(io.BytesIO(), *bins)


@pytest.mark.parametrize(("p", "red"), [(0.3, False), (0.05, True), (1e-30, True)])
def test_rejections_have_a_color_of_their_own(p, red):
    pixels = drawn(plot_tests, [asked(p)])
    assert bool(len(places(pixels, RED))) == red
    assert bool(len(places(pixels, BLUE))) != red


def test_small_p_values_stand_left_of_large_ones_and_correction_moves_them_right():
    left, right = (places(drawn(plot_tests, [asked(p)]), RED)[:, 1].mean() for p in (0.006, 0.04))
    assert left < right - 50
    alone = places(drawn(plot_tests, [asked(0.01)] * 3), RED)[:, 1].max()
    adjusted = places(drawn(plot_tests, holm([asked(0.01)] * 3)), RED)[:, 1].max()
    assert adjusted > alone + 20


def test_what_could_not_be_tested_says_so_without_a_point():
    pixels = drawn(plot_tests, [asked(None), asked(0.01)])
    assert not len(places(pixels[: pixels.shape[0] // 3], RED))
    with pytest.raises(ValueError, match="tests must have >= 1 entry, got none"):
        plot_tests(io.BytesIO(), [])


def test_files_are_checked_before_anything_is_drawn(tmp_path):
    plot_tests(tmp_path / "tests.svg", [asked(0.2)])
    assert (tmp_path / "tests.svg").read_text().startswith("<?xml")
    with pytest.raises(ValueError, match=r"name must end in .png, .pdf, .svg, got"):
        plot_tests(tmp_path / "tests.txt", [asked(0.2)])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        plot_prevalence(str(tmp_path / "no" / "p.png"), [prevalence([0.5, 0.5])])

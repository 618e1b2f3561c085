"""What is said of a network and a data set where the answer is known."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import flaxtransfer as ft
from flaxtransfer.advice import source_distance, understand
from flaxtransfer.analysis import error_split, label_suspects
from flaxtransfer.cli import run
from flaxtransfer.models.config import ResNetConfig

PREPROCESSING = ft.weights.Preprocessing((0.5,) * 3, (0.25,) * 3, size=32, resize=32)


def clusters(count: int, apart: float, *, classes: int = 4, dims: int = 6, seed: int = 0):
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    return random.normal(size=(count, dims)) + apart * np.eye(dims)[labels], labels


class TestErrorSplit:
    def test_noise_of_labels_stays_and_a_small_sample_comes_and_goes(self):
        """Redrawn labels are wrong for every head; few labels in many dimensions make heads
        differ.
        """
        features, labels = clusters(400, 8.0)
        random = np.random.default_rng(1)
        noisy = labels.copy()
        chosen = random.random(len(labels)) < 0.2
        noisy[chosen] = (labels[chosen] + random.integers(1, 4, chosen.sum())) % 4
        found = error_split(features, noisy)
        assert found.bias == pytest.approx(chosen.mean(), abs=0.01)
        assert found.variance < 0.02
        few, of_few = clusters(40, 2.0, dims=60)
        assert error_split(few, of_few).variance > 2 * found.variance
        assert error_split(few, of_few).variance > 0.1

    def test_a_head_is_right_where_it_agrees_with_a_vote_that_is(self):
        """For two classes, whoever differs from a wrong vote is right (Domingos, theorem 2)."""
        features, labels = clusters(80, 1.5, classes=2)
        found = error_split(features, labels, draws=8)
        assert found.draws == 8
        assert abs(found.error - found.bias) <= found.variance + 1e-12

    @pytest.mark.parametrize(
        ("draws", "count", "said"),
        [(5, 40, "`draws` must be even and >= 4, got 5"), (20, 7, "got 1 of class 3")],
    )
    def test_what_cannot_be_halved_is_refused(self, draws, count, said):
        features, labels = clusters(count, 3.0)
        with pytest.raises(ValueError, match=said):
            error_split(features, labels, draws=draws)


class TestLabelSuspects:
    def test_labels_that_were_changed_are_found(self):
        features, labels = clusters(400, 6.0)
        random = np.random.default_rng(2)
        changed = np.sort(random.choice(400, 20, replace=False))
        given = labels.copy()
        given[changed] = (labels[changed] + 1) % 4
        found = label_suspects(features, given)
        assert set(found.rows.tolist()) <= set(changed.tolist())
        assert len(found.rows) >= 18
        truth = dict(zip(changed.tolist(), labels[changed].tolist(), strict=True))
        assert [truth[row] for row in found.rows.tolist()] == found.instead.tolist()
        assert found.share == len(found.rows) / 400
        right = np.bincount(given[np.setdiff1d(np.arange(400), changed)]) / np.bincount(given)
        np.testing.assert_allclose(found.agreement, right)

    def test_features_without_information_accuse_nobody_much(self):
        """Of shuffled labels three quarters are wrong, and a head that knows nothing cannot say
        which.
        """
        features, labels = clusters(400, 0.0)
        assert label_suspects(features, labels).share < 0.02


@pytest.fixture(scope="module")
def network():
    model = ft.resnet(ResNetConfig(depths=(1, 1, 1, 1), width=4, classes=2))
    return ft.Classifier(model, model.init(jax.random.key(0)), PREPROCESSING)


def source(count: int = 48, shift: int = 0, seed: int = 0) -> ft.ArraySource:
    """Dark and bright images."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    images = (
        60 + shift + 60 * labels[:, None, None, None] + random.integers(0, 40, (count, 32, 32, 3))
    )
    return ft.ArraySource(images.astype(np.uint8), labels, class_names=("dark", "bright"))


class TestSourceDistance:
    def test_images_of_training_are_near_and_brighter_ones_farther(self, network):
        batches = ft.eval_batches(source(), np.arange(48), PREPROCESSING, batch_size=16)
        stats = ft.training.recalibrate(network, batches)
        known = network.with_variables({**network.variables, "batch_stats": stats})
        near = source_distance(known, source(), np.arange(48))
        assert list(near) == ["stem", "layer1", "layer2", "layer3", "layer4"]
        # Means of three batches, each normalized by its own statistics.
        assert max(near.values()) < 0.05
        other = source_distance(known, source(seed=1), np.arange(48))
        far = source_distance(known, source(shift=80), np.arange(48))
        assert max(other.values()) < 0.3 < min(far.values())

    def test_a_network_without_statistics_has_none(self):
        model = ft.resnet(ResNetConfig(depths=(1, 1, 1, 1), width=32, classes=2, norm="group"))
        plain = ft.Classifier(model, model.init(jax.random.key(0)), PREPROCESSING)
        assert source_distance(plain, source(8), np.arange(8)) == {}


def test_it_says_which_labels_look_wrong_and_speaks_json(network):
    images = source()
    labels = images.labels().copy()
    labels[5] = 1 - labels[5]
    pixels = np.stack([images[i]["image"] for i in range(48)])
    found = understand(network, ft.ArraySource(pixels, labels, class_names=("dark", "bright")))
    assert found.suspected()[0][:3] == ("5", "dark", "bright")
    assert json.loads(json.dumps(found.to_json()))["suspects"]["rows"] == [5]
    assert found.evidence.best.skill > 0.9
    text = str(found)
    assert max(map(len, text.splitlines())) <= 80
    assert "1 of 48 labels (2.1 %) are contradicted with confidence" in " ".join(text.split())


def test_in_the_terminal(tmp_path, capsys):
    words = [*("understand", "--data", "digits"), *("--json", str(tmp_path / "a.json"))]
    words += [*("--html", str(tmp_path / "a.html")), *("--suspects", str(tmp_path / "a.csv"))]
    assert run(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "A head on layer4 has accuracy" in said
    assert len(json.loads((tmp_path / "a.json").read_text())["findings"]) >= 5
    page = (tmp_path / "a.html").read_text()
    assert "What was found" in page
    assert "\\x0a" not in page
    assert (tmp_path / "a.csv").read_text().startswith("image,label,instead,margin\n")
    assert run([*words[:3], "--suspects", str(tmp_path / "a.txt")]) == 2
    assert ".csv" in capsys.readouterr().err

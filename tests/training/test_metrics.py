"""Metrics survive kills; means agree with scikit-learn's."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, log_loss

import flaxtransfer as ft
from flaxtransfer.training.console import METRICS_FILE, MetricsWriter, read_metrics


def test_lines_are_json_and_not_a_number_becomes_null(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write("train", 10, {"loss": 0.5, "gradient_norm": float("nan")})
    (line,) = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert json.loads(line) == {"kind": "train", "step": 10, "loss": 0.5, "gradient_norm": None}


def test_a_resumed_run_drops_what_was_written_after_its_checkpoint(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (10, 20):
            writer.write("train", step, {"loss": 1.0})
        written = writer.written  # what a checkpoint holds of it
        writer.write("train", 30, {"loss": 1.0})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"kind": "train", "st')  # what a kill leaves
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20, 30]
    with MetricsWriter(tmp_path, written=written, step=20) as writer:
        writer.write("train", 30, {"loss": 0.5})
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [
        (10, 1.0),
        (20, 1.0),
        (30, 0.5),
    ]


def test_a_new_run_starts_with_an_empty_file(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write("train", 10, {})
    with MetricsWriter(tmp_path):
        assert read_metrics(tmp_path) == []


def test_tensorboard_events_hold_the_numbers(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.write("train", 10, {"phase": "head", "loss": 0.25})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_means_agree_with_scikit_learn():
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, (50, 4)).astype(np.float32)
    labels = random.integers(0, 4, 50)
    result = ft.training.Predictions(logits, labels).evaluation()
    shifted = np.exp(logits.astype(np.float64))
    probabilities = shifted / shifted.sum(axis=1, keepdims=True)
    assert result.accuracy == pytest.approx(accuracy_score(labels, logits.argmax(axis=1)))
    assert result.loss == pytest.approx(log_loss(labels, probabilities, labels=range(4)))
    assert result.examples == 50


@pytest.mark.parametrize("name", [f".{METRICS_FILE}.tmp", METRICS_FILE])
def test_metrics_are_not_written_through_a_planted_link(tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text('{"kind": "train", "step": 1}\n')
    (tmp_path / name).symlink_to(victim)
    with MetricsWriter(tmp_path) as writer:
        writer.write("train", 10, {"loss": 0.5})
    assert victim.read_text() == '{"kind": "train", "step": 1}\n'
    assert [row["step"] for row in read_metrics(tmp_path)] == [10]

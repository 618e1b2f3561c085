"""The head for raw features is scikit-learn's on standardized ones."""

import numpy as np
import pytest
from sklearn.preprocessing import StandardScaler

import flaxtransfer as ft
from flaxtransfer.features import fit_linear_probe, logistic_path, standardization, sweep_head
from flaxtransfer.features.sweep import fit_label_probes, fit_target_probe
from tests.support.peers import logistic_regression
from tests.support.small import PREPROCESSING, batch, network

RANDOM = np.random.default_rng(0)
LABELS = np.arange(60) % 3
FEATURES = (10 * RANDOM.normal(size=(60, 12)) + 3 + 15 * np.eye(12)[LABELS]).astype(np.float32)


def strength(text: str) -> float:
    return float(text.split("strength ")[1].split(";")[0].split(",")[0])


def test_it_is_scikit_learns_at_the_same_strength():
    head = fit_linear_probe(FEATURES, LABELS, 3)
    scaled = StandardScaler().fit_transform(FEATURES.astype(np.float64))
    peer = logistic_regression(scaled, LABELS, 1 / strength(head.text))
    logits = FEATURES @ head.kernel + head.bias
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    # The strength is printed with three digits, and the fit is in float32.
    np.testing.assert_allclose(probs, peer.predict_proba(scaled), atol=5e-3)


def test_a_network_with_it_gives_the_fitted_heads_logits():
    model, variables = network()
    batches = [batch(n) for n in range(6)]
    features, labels = ft.features.pooled_features(
        ft.Classifier(model, variables, PREPROCESSING), batches
    )
    head = fit_linear_probe(features, labels, 3)
    new = {"kernel": head.kernel.astype(np.float32), "bias": head.bias.astype(np.float32)}
    params = variables["params"] | {"fc": new}
    logits = ft.predict(
        ft.Classifier(model, variables | {"params": params}, PREPROCESSING), batches
    ).logits
    fitted = logistic_path(standardization(features)(features), labels, strength(head.text))
    # Both fits end within a millionth of the optimal loss, and the strength was printed.
    np.testing.assert_allclose(logits, fitted.logits[0], rtol=0.02, atol=0.1)
    np.testing.assert_allclose(
        logits, sweep_head(features, labels).scores(features), rtol=1e-4, atol=1e-4
    )


def test_one_example_a_class():
    head = fit_linear_probe(FEATURES[:3], LABELS[:3], 3)
    assert "because each class has one example" in head.text
    assert ((FEATURES[:3] @ head.kernel + head.bias).argmax(axis=1) == LABELS[:3]).all()


def test_the_only_example_of_a_class_is_learned_from():
    labels = np.where(np.arange(20) == 7, 2, LABELS[:20] % 2)
    head = fit_linear_probe(FEATURES[:20], labels, 3)
    assert "held-out accuracy" in head.text
    assert (FEATURES[7] @ head.kernel + head.bias).argmax() == 2


def test_two_examples_of_one_class_are_enough_for_two_folds():
    labels = np.array([0] * 10 + [1] * 2)
    assert "held-out accuracy" in fit_linear_probe(FEATURES[:12], labels, 2).text


def test_a_class_without_examples():
    with pytest.raises(ValueError, match="class"):
        fit_linear_probe(FEATURES, LABELS, 4)


def patients(seed: int, each: int = 6, count: int = 20):
    """Images of a patient are alike, and labels are drawn by patient: there is nothing to learn."""
    random = np.random.default_rng(seed)
    groups = np.repeat(np.arange(count), each)
    features = random.normal(size=(count, 40))[groups] + 0.3 * random.normal(size=(len(groups), 40))
    labels = random.permutation(np.arange(count) % 2)[groups]
    return features, labels, [f"patient {group}" for group in groups]


def held_out(text: str) -> float:
    return float(text.split("held-out ")[1].split("accuracy ")[-1].split("R2 ")[-1].split()[0][:5])


@pytest.mark.parametrize("kind", ["logistic", "ridge"])
def test_groups_are_held_out_whole(kind):
    """Else the head of a patient is judged on the same patient, and everything looks right."""
    alone, together = [], []
    for seed in range(3):
        features, labels, groups = patients(seed)
        alone.append(held_out(fit_linear_probe(features, labels, 2, kind=kind).text))
        head = fit_linear_probe(features, labels, 2, kind=kind, groups=groups)
        assert head.text.endswith("%, 20 groups held out whole")
        together.append(held_out(head.text))
    assert min(alone) > 95
    assert np.mean(together) < 75


def test_strengths_of_labels_and_targets_are_chosen_by_groups():
    """An analytic case: of a new patient nothing can be known, of a known one everything."""
    features, labels, groups = patients(3)
    heads = [
        fit_label_probes(features, labels[:, None].astype(float), kind="ridge", groups=given)
        for given in (None, groups)
    ]
    assert heads[1].text.endswith("20 groups held out whole")
    # Nothing can be learned of a new patient, so that the penalty shrinks the head.
    assert np.abs(heads[1].kernel).sum() < 0.5 * np.abs(heads[0].kernel).sum()
    values = (labels - 0.5)[:, None]
    alone, together = (fit_target_probe(features, values, groups=each) for each in (None, groups))
    assert held_out(alone.text) > 0.8
    assert held_out(together.text) < 0.3


def test_where_no_group_can_be_held_out_the_strength_is_fixed_and_said():
    features, labels, _ = patients(0)
    head = fit_linear_probe(features, labels, 2, groups=labels.tolist())
    assert "because no group can be held out without its class" in head.text
    with pytest.raises(ValueError, match="no group can be held out without its class"):
        sweep_head(features, labels, groups=labels.tolist())
    one = fit_target_probe(features, labels[:, None].astype(float), groups=["a"] * len(labels))
    assert "R2" not in one.text


def test_a_run_solves_its_head_by_the_groups_of_its_source(tmp_path):
    class Grouped(ft.ArraySource):
        def groups(self):
            return [f"patient {i // 3}" for i in range(len(self))]

    model, variables = network()
    images = np.random.default_rng(0).integers(0, 255, (36, 32, 32, 3), np.uint8)
    source = Grouped(images, np.arange(36) // 3 % 3, ("a", "b", "c"))
    splits = ft.data.Splits.of(range(30), (), range(30, 36))
    start = ft.Classifier(model, variables, PREPROCESSING)
    data = ft.loaders(source, splits, PREPROCESSING, batch_size=8)
    plan = ft.recipes.solved_head(variables["params"])
    fitted = ft.fit(start, plan, data, tmp_path)
    assert "10 groups held out whole" in fitted.notes[0]
    pooled, labels = ft.features.pooled_features(start, data.calibration())
    head = fit_linear_probe(pooled, labels, 3, groups=source.groups()[:30], kind="ridge")
    np.testing.assert_allclose(fitted.variables["params"]["fc"]["kernel"], head.kernel, rtol=1e-5)

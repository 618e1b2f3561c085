"""NNX: the way there and back, BatchNorm modes, masks on other people's modules, training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flaxtransfer as ft
from flaxtransfer.models import lax_conv
from flaxtransfer.paths import flatten, unflatten

TINY = ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=4, classes=3)
GROUPED = ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=32, classes=3, norm="group")
DEEP = ft.models.ResNetConfig(
    "bottleneck",
    (1, 1, 1, 1),
    width=4,
    classes=3,
    stem="deep",
    stem_width=8,
    shortcut="average",
    attention="se",
    adapter=ft.models.Adapter(2),
)
IMAGES = jnp.asarray(np.random.default_rng(0).standard_normal((4, 16, 16, 3)), jnp.float32)
TARGETS = jnp.array([0, 1, 2, 1])


def random_variables(config, seed=0):
    """Random numbers in every leaf; variances positive."""
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        values = random.standard_normal(leaf.shape) * 0.3
        return jnp.asarray(np.abs(values) + 0.5 if path.endswith("var") else values, leaf.dtype)

    abstract = ft.resnet(config).abstract()
    flat = {path: draw(path, leaf) for path, leaf in flatten(abstract).items()}
    return {"params": {}, "batch_stats": {}, **unflatten(flat)}


def same_bits(one, other):
    one, other = flatten(one), flatten(other)
    return one.keys() == other.keys() and all(
        one[p].dtype == other[p].dtype
        and np.asarray(one[p]).tobytes() == np.asarray(other[p]).tobytes()
        for p in one
    )


def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, TARGETS).mean()


@pytest.mark.parametrize("config", [TINY, GROUPED, DEEP], ids=lambda config: config.name)
def test_there_and_back_is_bit_identical_under_the_same_paths(config):
    model, variables = ft.resnet(config), random_variables(config)
    network = ft.nnx.ResNet(model, variables)
    back = ft.nnx.variables(network)
    assert same_bits(back, variables)
    assert back.keys() == variables.keys()
    paths = {"/".join(keys) for keys, _ in nnx.to_flat_state(nnx.state(network))}
    assert paths == set(flatten(variables["params"])) | set(flatten(variables["batch_stats"]))
    graph, state = nnx.split(network)
    assert same_bits(ft.nnx.variables(nnx.merge(graph, state)), variables)


def test_a_loaded_network_is_saved_and_loaded_bit_for_bit(tmp_path):
    variables = random_variables(TINY)
    network = ft.nnx.ResNet(ft.resnet(TINY), variables)
    preprocessing = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, 32, 32)
    checkpoint = ft.Pretrained(ft.nnx.variables(network), network.model.config, preprocessing)
    ft.save(tmp_path / "w.safetensors", checkpoint)
    assert same_bits(ft.load(tmp_path / "w.safetensors").variables, variables)


def test_outputs_and_statistics_are_those_of_the_pure_function():
    model, variables = ft.resnet(TINY, convolution=lax_conv), random_variables(TINY)
    network = ft.nnx.ResNet(model, variables)
    logits, _ = model.apply(variables, IMAGES)
    np.testing.assert_array_equal(network(IMAGES), logits)
    assert same_bits(ft.nnx.variables(network), variables)

    network.train()
    logits, statistics = model.apply(variables, IMAGES, norm="batch")
    np.testing.assert_array_equal(network(IMAGES), logits)
    after = ft.nnx.variables(network)
    assert same_bits(after["batch_stats"], statistics)
    assert not same_bits(after["batch_stats"], variables["batch_stats"])
    assert same_bits(after["params"], variables["params"])

    network.eval()
    maps, _ = model.apply(after, IMAGES, stop="pool")
    np.testing.assert_array_equal(network(IMAGES, stop="pool"), maps)
    assert same_bits(ft.nnx.variables(network), after)


def test_without_batch_norm_train_changes_nothing():
    model, variables = ft.resnet(GROUPED), random_variables(GROUPED)
    network = ft.nnx.ResNet(model, variables)
    network.train()
    logits = model.apply(variables, IMAGES[:1], stop="layer1")[0]
    np.testing.assert_array_equal(network(IMAGES[:1], stop="layer1"), logits)
    assert same_bits(ft.nnx.variables(network), variables)


def test_a_policy_says_what_train_means_and_a_view_shares_the_numbers():
    model, variables = ft.resnet(TINY), random_variables(TINY)
    policy = ft.batchnorm.policy(variables["params"], ft.stage(4))
    network = ft.nnx.ResNet(model, variables, policy=policy)
    training = nnx.view(network, use_running_average=False)
    _, statistics = model.apply(variables, IMAGES, norm=policy)
    training(IMAGES)
    after = ft.nnx.variables(network)["batch_stats"]
    assert same_bits(after, statistics)
    moved = {
        path
        for path, leaf in flatten(after).items()
        if not np.array_equal(leaf, flatten(variables["batch_stats"])[path])
    }
    assert moved
    assert {path.rpartition("/")[0] for path in moved} == policy


def test_the_callers_arrays_survive_donation():
    variables = random_variables(TINY)
    network = ft.nnx.ResNet(ft.resnet(TINY), variables)
    nnx.jit(lambda net: net.train(), donate_argnums=0)(network)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(variables))


def test_segments_that_do_not_run_may_be_absent():
    variables = random_variables(TINY)
    headless = variables | {"params": {k: v for k, v in variables["params"].items() if k != "fc"}}
    model = ft.resnet(TINY)
    network = ft.nnx.ResNet(model, headless)
    maps, _ = model.apply(variables, IMAGES, stop="head")
    np.testing.assert_array_equal(network(IMAGES, stop="head"), maps)
    with pytest.raises(ValueError, match="fc/bias, fc/kernel"):
        network(IMAGES)


# A network that is not ours -------------------------------------------------------------------


class Block(nnx.Module):
    def __init__(self, features, rngs):
        self.conv = nnx.Conv(features, features, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(features, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.bn(self.conv(x)))


class Theirs(nnx.Module):
    def __init__(self, rngs, rate=0.0):
        self.stem = nnx.Conv(3, 4, (3, 3), strides=4, rngs=rngs)
        self.blocks = nnx.List([nnx.List([Block(4, rngs)]) for _ in range(2)])
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.decoder = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for stage in self.blocks:
            for block in stage:
                x = block(x)
        return self.decoder(self.dropout(x.mean((1, 2))))


RULES = {
    "new": "glob('decoder/**')",
    "late": "glob('blocks/1/**') - batch_norm()",
    "frozen": ft.rest(),
}
GROUPS = {
    "new": ft.Group(optax.adamw, 1e-2, weight_decay=1e-1),
    "late": ft.Group(optax.sgd, 1e-1, weight_decay=1e-2),
    "frozen": ft.FROZEN,
}


def test_masks_labels_and_the_table_see_an_nnx_module():
    """Also one without numbers: names are resolved before arrays exist."""
    abstract = nnx.eval_shape(lambda: Theirs(nnx.Rngs(0), rate=0.5))
    variables = ft.nnx.variables(abstract)
    labels = flatten(ft.label(variables["params"], RULES))
    assert labels["decoder/bias"] == "new"
    assert labels["blocks/1/0/conv/kernel"] == "late"
    assert labels["blocks/1/0/bn/scale"] == labels["blocks/0/0/conv/bias"] == "frozen"
    assert sum(label == "late" for label in labels.values()) == 2
    resolved = ft.masks.resolve("batch_norm()", variables["params"])
    assert sum(jax.tree.leaves(resolved)) == 4
    table = ft.parameter_table(variables, unflatten(labels), GROUPS)
    rows = {row.path: row for row in table.rows}
    assert rows["blocks/1/0/conv/kernel"].weight_decay == 1e-2
    assert rows["blocks/0/0/bn/scale"].norm == "running"
    assert len(table.rows) == len(labels)
    moving = ft.nnx.where(unflatten(labels), abstract, GROUPS)
    assert moving.paths == {path for path, name in labels.items() if name != "frozen"}


def trained(network, wrt, tx, steps=3):
    """The network after some steps of NNX's own optimizer; what it holds, and that optimizer."""
    network.train()
    optimizer = nnx.Optimizer(network, tx, wrt=wrt)

    @nnx.jit
    def step(network, optimizer):
        def loss(network):
            return cross_entropy(network(IMAGES))

        grads = nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(network)
        optimizer.update(network, grads)
        return grads

    for _ in range(steps):
        grads = step(network, optimizer)
    return ft.nnx.variables(network), optimizer, grads


def test_a_partition_trains_an_nnx_module_as_plain_optax_trains_the_dict():
    before = ft.nnx.variables(Theirs(nnx.Rngs(0)))
    labels = ft.label(before["params"], RULES)
    tx = ft.nnx.partition(GROUPS, labels, clip=0.5)
    network = Theirs(nnx.Rngs(0))
    moving = ft.nnx.where(labels, network, GROUPS)
    after, optimizer, grads = trained(network, moving, tx)
    whole, _, _ = trained(Theirs(nnx.Rngs(0)), nnx.Param, tx)

    # The same on nested dicts: README's loop, with a pure function made of the module.
    graph, state = nnx.split(Theirs(nnx.Rngs(0)))
    keys = {"/".join(map(str, path)): path for path, _ in nnx.to_flat_state(state)}
    bound = ft.ParamGroups(labels, GROUPS)
    plain = bound.optimizer(clip=0.5)
    still, mine = bound.frozen(before["params"]), bound.trainable(before["params"])

    @jax.jit
    def step(mine, stats, plain_state):
        def loss(mine):
            network = nnx.merge(graph, state, copy=True)
            network.train()
            flat = flatten(bound.merge(still, mine)) | flatten(stats)
            nnx.update(network, nnx.from_flat_state({keys[p]: v for p, v in flat.items()}))
            value = cross_entropy(network(IMAGES))
            return value, ft.nnx.variables(network)["batch_stats"]

        grads, stats = jax.grad(loss, has_aux=True)(mine)
        updates, plain_state = plain.update(grads, plain_state, mine)
        return optax.apply_updates(mine, updates), stats, plain_state

    stats, plain_state = before["batch_stats"], plain.init(mine)
    for _ in range(3):
        mine, stats, plain_state = step(mine, stats, plain_state)

    pure = flatten(bound.merge(still, mine))
    for path, name in flatten(labels).items():
        start, end = flatten(before["params"])[path], flatten(after["params"])[path]
        assert np.array_equal(start, end) == (name == "frozen"), path
        if name == "frozen":
            assert np.asarray(start).tobytes() == np.asarray(end).tobytes()
            still_there = flatten(whole["params"])[path]
            assert np.asarray(start).tobytes() == np.asarray(still_there).tobytes()
        np.testing.assert_allclose(end, pure[path], rtol=1e-5, atol=1e-6, err_msg=path)
        np.testing.assert_allclose(
            end, flatten(whole["params"])[path], rtol=1e-5, atol=1e-6, err_msg=path
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), after["batch_stats"], stats
    )
    # What does not move has neither a gradient nor a state of the optimizer.
    assert set(flatten(ft.nnx.variables(grads)["params"])) == moving.paths
    moments = [str(path) for path, _ in nnx.to_flat_state(nnx.state(optimizer))]
    assert any("decoder" in path for path in moments)
    assert not any("stem" in path for path in moments)


def test_our_network_trains_inside_theirs():
    class Segmenter(nnx.Module):
        def __init__(self, rngs):
            self.encoder = ft.nnx.ResNet(ft.resnet(TINY), random_variables(TINY))
            self.decoder = nnx.Linear(32, 3, rngs=rngs)

        def __call__(self, x):
            return self.decoder(self.encoder(x, stop="pool").mean((1, 2)))

    network = Segmenter(nnx.Rngs(0))
    before = ft.nnx.variables(network)
    rules = {"new": ft.glob("{decoder,encoder/layer4}/**"), "frozen": ft.rest()}
    labels = ft.label(before["params"], rules)
    groups = {"new": ft.Group(optax.adamw, 1e-2), "frozen": ft.FROZEN}
    moving = ft.nnx.where(labels, network, groups)
    start = cross_entropy(network(IMAGES))
    after, _, _ = trained(network, moving, ft.nnx.partition(groups, labels), steps=5)
    for path, leaf in flatten(after["params"]).items():
        assert np.array_equal(leaf, flatten(before["params"])[path]) == (path not in moving.paths)
    assert network.encoder.use_running_average is False
    network.encoder.eval()
    assert cross_entropy(network(IMAGES)) < start
    # Its part is a checkpoint of ours again.
    model, encoder = network.encoder.model, ft.nnx.variables(network.encoder)
    maps, _ = model.apply(encoder, IMAGES, stop="pool")
    np.testing.assert_array_equal(network.encoder(IMAGES, stop="pool"), maps)


def test_train_with_a_policy_leaves_the_statistics_of_what_is_frozen():
    class Both(Theirs):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.encoder = ft.nnx.ResNet(ft.resnet(TINY), random_variables(TINY))

        def __call__(self, x):
            return super().__call__(x) + self.encoder(x, stop="layer2").mean()

    network = Both(nnx.Rngs(0))
    before = ft.nnx.variables(network)
    mask = ft.glob("{blocks/1,encoder/layer1}/**")
    policy = ft.batchnorm.policy(before["batch_stats"], ft.masks.resolve(mask, before["params"]))
    ft.nnx.train(network, policy)
    network(IMAGES)
    after = flatten(ft.nnx.variables(network)["batch_stats"])
    moved = {p for p, leaf in flatten(before["batch_stats"]).items() if (leaf != after[p]).any()}
    assert (
        {path.rpartition("/")[0] for path in moved}
        == policy
        == {
            "blocks/1/0/bn",
            "encoder/layer1/0/bn1",
            "encoder/layer1/0/bn2",
        }
    )
    ft.nnx.train(network, "running")
    network(IMAGES)
    assert same_bits(ft.nnx.variables(network)["batch_stats"], unflatten(after))
    with pytest.raises(ValueError, match="did you mean 'blocks/1/0/bn'"):
        ft.nnx.train(network, frozenset({"blocks/1/0/bnn"}))


def test_constants_of_a_module_are_no_variables():
    class Shifted(nnx.Module):
        def __init__(self):
            self.shift, self.scale = nnx.data(jnp.ones(3)), nnx.Param(jnp.ones(3))

    assert set(flatten(ft.nnx.variables(Shifted()))) == {"params/scale"}


def test_equal_filters_compile_once():
    network, tx, traces = nnx.Linear(2, 3, rngs=nnx.Rngs(0)), optax.sgd(0.1), []

    @nnx.jit
    def step(network, optimizer):
        traces.append(optimizer.wrt)

    for mask in ("biases()", ft.biases(), ft.kernels()):
        step(network, nnx.Optimizer(network, tx, wrt=ft.nnx.where(mask, network)))
    assert [trace.paths for trace in traces] == [{"bias"}, {"kernel"}]


def test_variables_are_put_back_by_path_and_random_keys_stay():
    network, other = Theirs(nnx.Rngs(0), rate=0.5), Theirs(nnx.Rngs(1), rate=0.5)
    keys = nnx.state(network, nnx.RngState)
    variables = ft.nnx.variables(other)
    assert not any("dropout" in path for path in flatten(variables))
    ft.nnx.update(network, variables)
    assert same_bits(ft.nnx.variables(network), variables)
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b: (
                bool((jax.random.key_data(a) == jax.random.key_data(b)).all())
                if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key)
                else bool(a == b)
            ),
            keys,
            nnx.state(network, nnx.RngState),
        )
    )


def mutated():
    network = ft.nnx.ResNet(ft.resnet(TINY), random_variables(TINY))
    network.fc.kernel = nnx.Param(jnp.zeros((32, 7)))
    return network(IMAGES)


def foreign_optimizer():
    network = Theirs(nnx.Rngs(0))
    labels = ft.label(ft.nnx.variables(network)["params"], RULES)
    tx = ft.nnx.partition(GROUPS, labels)
    return nnx.Optimizer(network, tx, wrt=ft.nnx.where("glob('decoder/*')", network))


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (mutated, ValueError, r"fc/kernel must be \(32, 3\), got \(32, 7\)"),
        (
            lambda: ft.nnx.ResNet(ft.resnet(TINY), ft.nnx.variables(Theirs(nnx.Rngs(0)))),
            ValueError,
            "unexpected: params/stem/kernel",
        ),
        (lambda: ft.nnx.ResNet(ft.resnet(TINY), {"params": {}}), ValueError, "got params"),
        (
            lambda: ft.nnx.ResNet(ft.resnet(TINY), random_variables(DEEP)),
            ValueError,
            "missing: params/conv1/kernel",
        ),
        (
            lambda: ft.nnx.ResNet(ft.resnet(TINY), random_variables(TINY), policy="bacth"),
            ValueError,
            "did you mean 'batch'",
        ),
        (lambda: ft.nnx.where("glob('decodr/**')", Theirs(nnx.Rngs(0))), ValueError, "decoder/"),
        (lambda: ft.nnx.where("head()", Theirs(nnx.Rngs(0))), ValueError, "no segment of a ResNet"),
        (lambda: ft.nnx.where({"fc": True}, Theirs(nnx.Rngs(0))), ValueError, "unknown: fc"),
        (
            lambda: ft.nnx.where({"bias": "new"}, nnx.Linear(2, 2, rngs=nnx.Rngs(0))),
            TypeError,
            "labels with their groups",
        ),
        (
            lambda: ft.nnx.where(
                {"bias": False, "kernel": False}, nnx.Linear(2, 2, rngs=nnx.Rngs(0))
            ),
            ValueError,
            "every leaf",
        ),
        (lambda: ft.nnx.where("head()", Theirs(nnx.Rngs(0)), GROUPS), TypeError, "labels"),
        (lambda: ft.nnx.variables({"kernel": 1}), TypeError, "got dict"),
        (
            lambda: ft.nnx.variables(nnx.as_pure(nnx.state(Theirs(nnx.Rngs(0))))),
            TypeError,
            "holds arrays instead",
        ),
        (lambda: ft.nnx.variables(nnx.Dict({"a/b": nnx.Param(jnp.ones(1))})), ValueError, "a/b"),
        (
            lambda: ft.nnx.variables(nnx.Dict({"a": nnx.Param({"b": jnp.ones(1)})})),
            TypeError,
            "these hold more: a",
        ),
        (
            lambda: ft.nnx.update(Theirs(nnx.Rngs(0)), {"params": {"decoder": {"kernle": 1}}}),
            ValueError,
            "did you mean 'params/decoder/kernel'",
        ),
        (
            lambda: ft.nnx.update(
                Theirs(nnx.Rngs(0)), {"params": {"decoder": {"bias": jnp.ones(4)}}}
            ),
            ValueError,
            r"params/decoder/bias must be float32\[3\], got float32\[4\]",
        ),
        (foreign_optimizer, ValueError, "missing: blocks/0/0/bn/bias"),
    ],
)
def test_errors_name_what_is_wrong(call, kind, text):
    with pytest.raises(kind, match=text):
        call()

"""Hessians, eigenpairs, traces and densities against dense matrices, recorded by another program.

tests/golden/curvature.npz has inputs, weights, products and spectra of three small networks, from
PyTorch's dense Hessians in float64 (curvlinops agrees). If a number differs, the code is wrong.
"""

import functools
import inspect
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from sgd_sparse_jax import measure, train
from sgd_sparse_jax.measure import Operator, top_eigenpairs
from sgd_sparse_jax.types import Batch, Network, Outputs

pytestmark = pytest.mark.usefixtures("quick_compilation")
GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "curvature.npz", allow_pickle=False))
KEY = jr.key(0)
trace, density = measure.trace, measure.spectral_density


def tensors(net):
    return [
        jnp.asarray(GOLDEN[name]) for name in sorted(GOLDEN) if name.startswith(f"{net}/params")
    ]


def mlp(params, stats, x, *, train=False):
    for layer in range(0, 6, 2):
        x = (jnp.tanh(x) if layer else x) @ params[layer] + params[layer + 1][None]
    return Outputs(x, {}, stats)


def cnn(params, stats, x, *, train=False):
    """Two convolutions, with BatchNorm where there are statistics, the mean over space, logits."""
    at, moments, shape = 0, [], ("NHWC", "HWIO", "NHWC")
    for block in range(2):
        x = jax.lax.conv_general_dilated(x, params[at], (1, 1), "SAME", dimension_numbers=shape)
        x, at = x + params[at + 1].reshape(1, 1, 1, -1), at + 2
        if stats:
            mean, var = (x.mean((0, 1, 2)), x.var((0, 1, 2))) if train else stats["moments"][block]
            moments.append((mean, var))
            wide = [v.reshape(1, 1, 1, -1) for v in (mean, var, params[at], params[at + 1])]
            x, at = wide[2] * (x - wide[0]) / jnp.sqrt(wide[1] + 1e-5) + wide[3], at + 2
        x = jax.nn.relu(x)
    stats = {"moments": moments} if stats and train else stats
    return Outputs(x.mean((1, 2)) @ params[at] + params[at + 1][None], {}, stats)


START = {"moments": [(jnp.zeros(size), jnp.ones(size)) for size in (6, 8)]}
IMAGES = Batch(jnp.asarray(GOLDEN["cnn/images"]), jnp.asarray(GOLDEN["cnn/labels"]))
POINTS = Batch(jnp.asarray(GOLDEN["mlp_tanh/x"]), jnp.asarray(GOLDEN["mlp_tanh/y"]))
NETS = {  # network, parameters, statistics, loss, data, mode
    "mlp_tanh": (mlp, tensors("mlp_tanh"), {}, train.half_squared, POINTS, None),
    "cnn": (cnn, tensors("cnn"), {}, train.cross_entropy, IMAGES, None),
    "cnn_bn_train": (cnn, tensors("cnn_bn_train"), START, train.cross_entropy, IMAGES, "train"),
    "cnn_bn_eval": (cnn, tensors("cnn_bn_train"), START, train.cross_entropy, IMAGES, "eval"),
}
every_net = pytest.mark.parametrize("net", list(NETS))
precisions = pytest.mark.parametrize(("dtype", "tol"), [(jnp.float64, 1e-10), (jnp.float32, 1e-5)])


@functools.cache
def objective_of(apply, loss, mode):
    network = measure.in_mode(Network(lambda key, x: ((), {}), apply), mode)
    return network, train.make_objective(network, loss)


def operators(net, dtype=jnp.float64, **change):
    """The Hessian and the Gauss-Newton matrix of a recorded network."""
    names = ("apply", "params", "stats", "loss", "data", "mode")
    at = dict(zip(names, NETS[net], strict=True)) | change
    cast = lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
    given = jax.tree.map(cast, (at["params"], at["stats"], at["data"]))
    network, objective = objective_of(at["apply"], at["loss"], at["mode"])
    of_loss = measure.hessian(objective, *given, linearize=net in ("mlp_tanh", "cnn_bn_train"))
    return of_loss, measure.gauss_newton(network.apply, at["loss"], *given)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def like(operator, vector):
    flat_like, unravel = ravel_pytree(operator.like)
    return unravel(jnp.asarray(vector, flat_like.dtype))


def matrix_operator(matrix):
    return Operator(lambda v: matrix @ np.asarray(v), jnp.zeros(len(matrix)))


def random_symmetric(seed, size=60, rank=60):
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(size, rank)))[0]
    return q * (rng.normal(size=rank) ** 3)[None] @ q.T


@every_net
@precisions
def test_products_match_dense_matrices(net, dtype, tol):
    of = net.replace("eval", "train") + "/probe"
    for operator, name in zip(operators(net, dtype), ("hvp", "ggnvp"), strict=True):
        error = flat(operator.matvec(like(operator, GOLDEN[of]))) - GOLDEN[f"{net}/{name}"]
        assert np.linalg.norm(error) < tol * np.linalg.norm(GOLDEN[f"{net}/{name}"])


@every_net
@precisions
def test_top_eigenvalues_match_dense_spectra(net, dtype, tol):
    tops = [GOLDEN.get(f"{net}/hessian_top", GOLDEN.get(f"{net}/hessian_spectrum"))]
    for operator, top in zip(operators(net, dtype), [*tops, GOLDEN[f"{net}/ggn_top"]], strict=True):
        pairs = top_eigenpairs(operator, 5, KEY, tol=max(1e-7, 10 * tol))
        assert pairs.converged.all() and pairs.residuals.max() < max(1e-7, 10 * tol)
        np.testing.assert_allclose(pairs.values, top[:5], rtol=tol)


def test_all_three_ends_of_a_spectrum_are_found_in_order():
    operator, spectrum = operators("mlp_tanh")[0], GOLDEN["mlp_tanh/hessian_spectrum"]
    find = functools.partial(top_eigenpairs, operator, key=KEY, tol=1e-6)
    np.testing.assert_allclose(find(k=10).values, spectrum[:10], rtol=1e-10)
    np.testing.assert_allclose(find(k=3, which="smallest").values, spectrum[:-4:-1], rtol=1e-10)
    by_size = spectrum[np.argsort(-np.abs(spectrum))]
    np.testing.assert_allclose(find(k=6, which="magnitude").values, by_size[:6], rtol=1e-10)
    top = flat(find(k=1).vectors)
    np.testing.assert_allclose(top, GOLDEN["mlp_tanh/hessian_top_vector"], atol=1e-6)


def test_single_precision_reaches_its_digits():
    operator, spectrum = operators("mlp_tanh", jnp.float32)[0], GOLDEN["mlp_tanh/hessian_spectrum"]
    pairs = top_eigenpairs(operator, 4, KEY, tol=1e-4)
    assert pairs.converged.all() and pairs.vectors[0].dtype == jnp.float32
    np.testing.assert_allclose(pairs.values, spectrum[:4], rtol=1e-5)
    assert not top_eigenpairs(operator, 1, KEY, tol=1e-9, max_matvecs=60).converged.any()


def test_the_modes_of_batch_norm_are_three_hessians():
    apply, params, stats, loss, data, _ = NETS["cnn_bn_train"]
    batch_moments = apply(params, stats, data.x, train=True).stats
    top = lambda net, **change: top_eigenpairs(operators(net, **change)[0], 1, KEY).values[0]
    found = top("cnn_bn_train"), top("cnn_bn_eval"), top("cnn_bn_eval", stats=batch_moments)
    np.testing.assert_allclose(found, [0.974, 10.139, 7.117], rtol=1e-3)
    frozen = objective_of(apply, loss, "eval")[1](params, batch_moments, data)[0]
    np.testing.assert_allclose(frozen, GOLDEN["cnn_bn_train/loss"], rtol=1e-12)
    with pytest.raises(ValueError, match="give mode='train'"):
        operators("cnn_bn_train", mode=None)
    operators("cnn", mode=None)  # a network without statistics has one mode
    with pytest.raises(ValueError, match="'training'"):  # unwrapped: without checks of types
        inspect.unwrap(measure.in_mode)(Network(lambda key, x: ((), {}), apply), "training")


def test_a_mean_over_chunks_is_the_whole_and_uses_one_program():
    apply, params, stats, loss, data, _ = NETS["mlp_tanh"]
    traced = []

    def counted(params, stats, batch):
        traced.append(len(batch.x))
        return objective_of(apply, loss, None)[1](params, stats, batch)

    part = lambda chunk: measure.hessian(counted, params, stats, chunk)
    cut = lambda *ends: [Batch(data.x[a:b], data.y[a:b]) for a, b in itertools.pairwise(ends)]
    v = like(part(data), GOLDEN["mlp_tanh/probe"])
    for ends in ((0, 10, 20, 30, 40), (0, 16, 32, 40)):
        mean = measure.mean_over(part, cut(*ends))
        for _ in range(2):
            np.testing.assert_allclose(flat(mean.matvec(v)), GOLDEN["mlp_tanh/hvp"], atol=1e-12)
    # Twice for each shape: to detect changed statistics, and for the product.
    assert sorted(traced) == [8, 8, 10, 10, 16, 16, 40]
    with pytest.raises(TypeError, match="give a list"):
        measure.mean_over(part, iter(cut(0, 40)))
    with pytest.raises(ValueError, match="0 chunks"):
        measure.mean_over(part, [])
    ragged = measure.mean_over(lambda pair: part(Batch(*pair)), [*map(tuple, cut(0, 16, 32, 40))])
    np.testing.assert_allclose(flat(ragged.matvec(v)), GOLDEN["mlp_tanh/hvp"], atol=1e-12)


def test_a_mean_over_chunks_of_coupled_examples_is_refused():
    apply, params, stats, loss, data, _ = NETS["cnn_bn_train"]
    network, objective = objective_of(apply, loss, "train")
    chunks = [data, data]
    for part in (
        lambda chunk: measure.hessian(objective, params, stats, chunk),
        lambda chunk: measure.gauss_newton(network.apply, loss, params, stats, chunk),
    ):
        with pytest.raises(ValueError, match="BatchNorm in training mode"):
            measure.mean_over(part, chunks)
        assert measure.mean_over(part, chunks[:1]).coupled
    for mode in ("train", "eval"):
        compiled = jax.jit(jax.checkpoint(objective_of(apply, loss, mode)[1]))
        assert measure.hessian(compiled, params, stats, data).coupled == (mode == "train")


def test_chunks_without_examples_are_left_out_and_each_other_one_has_a_weight():
    part = lambda chunk: measure.hessian(lambda p, x: p**2 * x.mean(), jnp.array(1.0), chunk)
    chunks = [jnp.array([1.0, 2.0]), jnp.zeros(0), jnp.array([6.0])]
    np.testing.assert_allclose(measure.mean_over(part, chunks).matvec(jnp.array(1.0)), 6.0)
    with pytest.raises(ValueError, match="3 chunks have 2 weights"):
        measure.mean_over(part, chunks, [1.0, 1.0])


def test_a_batch_that_is_split_over_devices_gives_the_same_product():
    apply, params, stats, loss, data, _ = NETS["mlp_tanh"]
    mesh = train.data_mesh()
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    data = jax.device_put(data, split)
    operator = measure.hessian(objective_of(apply, loss, None)[1], params, stats, data)
    actual = flat(operator.matvec(like(operator, GOLDEN["mlp_tanh/probe"])))
    np.testing.assert_allclose(actual, GOLDEN["mlp_tanh/hvp"], rtol=1e-9, atol=1e-12)
    assert top_eigenpairs(operator, 1, KEY).converged.all()


def test_blocks_have_the_traces_and_sharpness_of_their_tensors():
    whole = operators("mlp_tanh")[0]
    for i, expected in enumerate(GOLDEN["mlp_tanh/hessian_trace_per_tensor"]):
        block = measure.restrict(whole, lambda name, i=i: name == str(i))
        size = whole.like[i].size
        exact = size * density(block, KEY, probes=size, steps=1).moment(1).value
        np.testing.assert_allclose(exact, expected, rtol=1e-10)
        top = top_eigenpairs(block, 1, KEY, tol=1e-6)
        np.testing.assert_allclose(top.values, GOLDEN["mlp_tanh/hessian_top_per_tensor"][i : i + 1])
    with pytest.raises(ValueError, match="there are 0, 1, 2"):
        measure.restrict(whole, lambda name: name == "kernel")


# Outputs of ReLU networks are piecewise linear in each parameter alone, unless batches couple them:
# then H_ii = G_ii, and the traces of all blocks are equal.
@pytest.mark.parametrize("net", ["cnn", "cnn_bn_train", "cnn_bn_eval"])
def test_hessian_and_gauss_newton_of_relu_nets_have_one_trace(net):
    small = {str(i): i for i, leaf in enumerate(NETS[net][1]) if leaf.size <= 32}
    traces = []
    for operator, name in zip(operators(net), ("hessian", "ggn"), strict=True):
        block = measure.restrict(operator, lambda path: path in small)
        size = len(flat(block.like))
        traces.append(size * density(block, KEY, probes=size, steps=1).moment(1).value)
        expected = GOLDEN[f"{net}/{name}_trace_per_tensor"][[*small.values()]].sum()
        np.testing.assert_allclose(traces[-1], expected, rtol=1e-10)
    assert np.isclose(*traces, rtol=1e-10) == (net != "cnn_bn_train")


def test_hutchinsons_trace_is_within_its_exact_error():
    operator, exact = operators("mlp_tanh")[0], GOLDEN["mlp_tanh/hessian_spectrum"].sum()
    variance = GOLDEN["mlp_tanh/hessian_frobenius2"] - GOLDEN["mlp_tanh/hessian_diagonal2"]
    found = trace(operator, KEY, probes=400)
    assert abs(found.value - exact) < 3 * np.sqrt(2 * variance / 400)
    np.testing.assert_allclose(found.standard_error, np.sqrt(2 * variance / 400), rtol=0.15)
    sketched = trace(operator, KEY, probes=100, sketch=100)
    assert abs(sketched.value - exact) < 4 * sketched.standard_error
    assert sketched.standard_error < 0.6 * found.standard_error  # with fewer products
    early = trace(operator, KEY, probes=400, tol=0.1)
    assert early.converged and early.samples < 400 and early.standard_error <= 0.1 * early.value
    assert not trace(operator, KEY, probes=20, tol=1e-4).converged
    np.testing.assert_allclose(
        trace(matrix_operator(random_symmetric(0, rank=5)), KEY, probes=2, sketch=5).value,
        np.trace(random_symmetric(0, rank=5)),
    )


def test_densities_have_the_moments_of_the_spectrum():
    operator, spectrum = operators("mlp_tanh")[0], GOLDEN["mlp_tanh/hessian_spectrum"]
    moments = [(spectrum**order).mean() for order in range(1, 5)]
    whole = density(operator, KEY, probes=len(spectrum), steps=3)
    some = density(operator, KEY, probes=48, steps=12)
    for order, exact in enumerate(moments, 1):
        np.testing.assert_allclose(whole.moment(order).value, exact, rtol=1e-9)
        found = some.moment(order)
        assert abs(found.value - exact) < 4 * found.standard_error < 3 * abs(exact)
    np.testing.assert_allclose(some.weights.sum(1), 1.0)
    grid = np.linspace(-5, 7, 600)
    exact = np.exp(-(((grid[:, None] - spectrum[None]) / 0.3) ** 2) / 2).mean(1) / 0.3 / 2.5066
    values, errors = some.smoothed(grid, 0.3)
    assert (np.abs(values - exact) < 5 * errors + 1e-3).all()
    np.testing.assert_allclose(np.trapezoid(values, grid), 1.0, rtol=1e-3)
    zero = density(matrix_operator(np.zeros((4, 4))), KEY, probes=2, steps=3)
    assert zero.moment(1).value == 0 and (zero.weights.sum(1) == 1).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_residuals_are_those_of_the_returned_pairs(seed, which):
    matrix, exact = random_symmetric(seed), np.linalg.eigvalsh(random_symmetric(seed))
    order = {"largest": -exact, "smallest": exact, "magnitude": -np.abs(exact)}[which]
    exact = exact[np.argsort(order)]
    for budget in (5, 12, 25, 200):
        options = {"which": which, "max_matvecs": budget, "basis": 12, "tol": 1e-6}
        pairs = top_eigenpairs(matrix_operator(matrix), 4, jr.key(seed), **options)
        V = np.asarray(pairs.vectors)
        rest = np.linalg.norm(V @ matrix - pairs.values[:, None] * V, axis=1)
        np.testing.assert_allclose(pairs.residuals, rest / np.abs(pairs.values), atol=1e-9)
        np.testing.assert_allclose(V @ V.T, np.eye(4), atol=1e-10)
        assert (pairs.converged == (pairs.residuals <= 1e-6)).all() and pairs.matvecs <= budget
    assert pairs.converged.all()  # with four restarts or more
    np.testing.assert_allclose(pairs.values, exact[:4], rtol=1e-9)


def test_a_short_budget_is_flagged():
    pairs = top_eigenpairs(operators("mlp_tanh")[0], 10, KEY, max_matvecs=12)
    assert pairs.matvecs == 12 and not pairs.converged.all()
    assert (pairs.residuals[~pairs.converged] > 1e-3).all()


def test_a_warm_start_saves_products_and_finds_a_new_largest_eigenvalue():
    matrix = np.diag(np.r_[40.0, 38.0, np.linspace(-1, 30, 400)])
    cold = top_eigenpairs(matrix_operator(matrix), 1, KEY)
    moved = matrix_operator(matrix + 0.05 * random_symmetric(3, 402, 40))
    warm = top_eigenpairs(moved, 1, jr.key(1), start=cold.vectors)
    assert warm.converged.all()
    assert warm.matvecs < 0.75 * top_eigenpairs(moved, 1, jr.key(1)).matvecs
    second = jnp.zeros((1, 2002)).at[0, 1].set(1.0)  # exactly an eigenvector: residual 0
    operator = matrix_operator(np.diag(np.r_[40.0, 39.0, np.linspace(-1, 8, 2000)]))
    for seed in range(5):
        found = top_eigenpairs(operator, 1, jr.key(seed), start=second)
        np.testing.assert_allclose(found.values, 40.0, rtol=1e-5)


def test_repeated_eigenvalues_and_whole_spectra_are_found():
    few, many = np.diag([3.0, 3, 3, 1, 1]), np.kron(np.diag(np.arange(17.0)), np.eye(3))
    for matrix, values in ((few, [3] * 3), (few, [3, 3, 3, 1, 1]), (many, [16, 16, 16, 15])):
        pairs = top_eigenpairs(matrix_operator(matrix), len(values), KEY, tol=1e-6)
        np.testing.assert_allclose(pairs.values, values, rtol=1e-10)
        assert pairs.converged.all()


def test_scalars_are_parameters():
    loss = lambda params: params[0] ** 2 * 3 + params[1] ** 2 / 2
    found = top_eigenpairs(measure.hessian(loss, [jnp.array(1.0), jnp.array(2.0)]), 2, KEY)
    np.testing.assert_allclose(found.values, [6.0, 1.0])


def test_where_the_loss_has_no_curvature_nothing_is_converged():
    collapsed = lambda p: ((jax.nn.relu(jnp.ones((5, 3)) @ p[0]) @ p[1] - 1.0) ** 2).mean()
    dead = [-jnp.ones((3, 4)), jnp.ones((4, 1))]  # no unit is active
    for loss, at in ((collapsed, dead), (lambda p: jnp.abs(p).sum(), jnp.zeros(4))):
        assert not top_eigenpairs(measure.hessian(loss, at), 1, KEY).converged.any()
    with pytest.raises(FloatingPointError, match="second derivatives"):
        top_eigenpairs(measure.hessian(lambda p: jnp.linalg.norm(p), jnp.zeros(4)), 1, KEY)


def test_bad_input_is_named_and_a_zero_operator_flagged():
    operator = matrix_operator(np.diag(np.arange(1.0, 31.0)))
    for k, options, words in (
        (31, {}, "dimension 30"),
        (0, {}, "k = 0"),
        (4, {"max_matvecs": 3}, "need 4 products"),
        (4, {"basis": 5}, "basis of 6"),
    ):
        with pytest.raises(ValueError, match=words):
            top_eigenpairs(operator, k, KEY, **options)
    nan = matrix_operator(np.full((3, 3), np.nan))
    for probe in (lambda: top_eigenpairs(nan, 1, KEY), lambda: trace(nan, KEY)):
        with pytest.raises(FloatingPointError, match="isn't finite"):
            probe()
    for start, words in ((jnp.ones(30), "any"), (jnp.zeros((2, 30)), "zero"), (nan.like, "any")):
        with pytest.raises(ValueError, match=words):
            top_eigenpairs(operator, 1, KEY, start=start)
    with pytest.raises(ValueError, match="largest, smallest"):
        inspect.unwrap(top_eigenpairs)(operator, 1, KEY, which="LA")
    for leaves in ({}, {"w": jnp.arange(3)}, {"w": jnp.ones(2), "z": jnp.ones(2, complex)}):
        with pytest.raises(TypeError, match="real floating-point"):
            top_eigenpairs(Operator(lambda v: v, leaves), 1, KEY)
        with pytest.raises(TypeError, match="real floating-point"):
            inspect.unwrap(measure.hessian)(lambda params: jnp.array(0.0), leaves)
    for wrong in ({"probes": 31}, {"steps": 0}):
        with pytest.raises(ValueError, match="1 to 30"):
            density(operator, KEY, **wrong)
    with pytest.raises(ValueError, match="sketch is -1"):
        trace(operator, KEY, sketch=-1)
    zero = top_eigenpairs(matrix_operator(np.zeros((4, 4))), 2, KEY)
    assert not zero.converged.any() and np.isinf(zero.residuals).all()


def test_lanczos_inside_a_program_finds_the_largest_eigenvalue_of_each_of_many():
    matrices = np.stack([random_symmetric(seed, 40, 40) for seed in range(3)])
    matrices = np.concatenate([matrices, -np.eye(40)[None], np.diag(np.arange(40) % 2.0)[None]])
    sharpness = lambda matrix, start: measure.lanczos_sharpness(
        lambda v: matrix @ v, start, steps=30
    )
    starts = np.random.default_rng(0).normal(size=(5, 40))
    values, residuals = jax.jit(jax.vmap(sharpness))(matrices, starts)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrices)[:, -1], rtol=1e-6)
    assert (residuals[:3] < 1e-3).all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_lanczos_inside_a_program_has_no_scale(scale):
    """Also in float32, where squares are below or above 1e38, and in lower precision."""
    A = lambda v: jnp.arange(1, 7, dtype=v.dtype) * v
    start = jnp.ones(6, jnp.float32)
    scaled = [lambda v: scale * A(v), A], [start, scale * start]
    for (matvec, at), exact in zip(zip(*scaled, strict=True), (6 * scale, 6.0), strict=True):
        value, _ = measure.lanczos_sharpness(matvec, at)
        np.testing.assert_allclose(value, exact, rtol=1e-5)
    half, _ = measure.lanczos_sharpness(A, start.astype(jnp.bfloat16))
    np.testing.assert_allclose(half, 6.0, rtol=2e-2)

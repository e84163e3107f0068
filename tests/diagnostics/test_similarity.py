from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.spatial
import scipy.stats
import timm
import torch
import torch.distributed as dist
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import NearestNeighbors

import vitscope as vs
from tests.diagnostics.test_cka import normal, probe_of
from tests.fixtures.oracles.result_checks import check_result
from tests.fixtures.programs.processes import on_ranks
from vitscope.core.undefined_values import NullWarning
from vitscope.diagnostics.cka._comparisons import PENALTIES, LinearRegression, MutualKNN, Pair, Procrustes
from vitscope.diagnostics.cka._representations import Representation
from vitscope.diagnostics.cka.plot import similarity as draw
from vitscope.runtime import progress
from vitscope.stats.jackknife import group_numbers, jackknife_half_width

ALL = ("procrustes", "mutual_knn", "rsa", "linear_regression", "cka")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "enabled", False)


def compared(measure: str | list[str] = "procrustes", size: int = 16, **arguments) -> vs.Result:
    options = {
        name: arguments.pop(name) for name in ("features", "n_neighbors", "n_permutations", "seed") if name in arguments
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NullWarning)  # few images: no intervals
        return vs.similarity(probe_of(size, **arguments), measure=measure, **{"n_permutations": 2} | options)


def pooled(x: torch.Tensor) -> np.ndarray:
    return x.mean((2, 3)).numpy()


def flat(x: torch.Tensor) -> np.ndarray:
    return x.flatten(1).numpy()


@pytest.mark.parametrize(("features", "rows"), [("pooled", pooled), ("flattened", flat)])
def test_values_equal_independent_implementations(features: str, rows) -> None:
    """Flattened maps have 45 and 54 features of 24 images, so that they are compared through their Gram matrices."""
    x = normal(24, 5, 3, 3) + 0.5
    z = 0.5 * torch.cat([x, x[:, :1] ** 2], dim=1) + normal(24, 6, 3, 3, seed=1)
    found = compared(
        ["procrustes", "mutual_knn", "rsa", "linear_regression"], features=features, n_neighbors=5, x=x, z=z
    )
    a, b = rows(x), rows(z)
    width = max(a.shape[1], b.shape[1])
    wide = [np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in (a, b)]
    disparity = scipy.spatial.procrustes(*wide)[2]
    # 1e-7: small singular values go through the Gram matrix, whose rounding is 1e-16 of the largest squared
    assert found.of("procrustes")[0, 1] == pytest.approx(np.sqrt(1 - disparity), abs=1e-7)
    neighbors = [
        NearestNeighbors(n_neighbors=6, metric="cosine").fit(part).kneighbors(part, return_distance=False)[:, 1:]
        for part in (a, b)
    ]
    shared = np.mean([len(set(i) & set(j)) / 5 for i, j in zip(*neighbors)])
    assert found.of("mutual_knn")[0, 1] == pytest.approx(shared, abs=1e-12)
    distances = [scipy.spatial.distance.pdist(part, "correlation") for part in (a, b)]
    assert found.of("rsa")[0, 1] == pytest.approx(scipy.stats.spearmanr(*distances).statistic, abs=1e-6)
    assert found.of("linear_regression")[0, 1] == pytest.approx(cross_validated(a, b), abs=1e-7)
    assert found.of("linear_regression")[1, 0] == pytest.approx(cross_validated(b, a), abs=1e-7)
    assert found.features == (features,) * 4


def cross_validated(a: np.ndarray, b: np.ndarray) -> float:
    """Return R^2 of b from a with scikit-learn: each image predicted by the regression on the others, the best penalty."""
    n = len(a)
    others = (b.sum(0) - b) / (n - 1)
    squares = np.square(np.linalg.svd(a - a.mean(0), compute_uv=False))
    values = []
    for penalty in PENALTIES:
        model = Ridge(alpha=penalty * squares.mean(), solver="svd")  # centers the images of each regression itself
        predicted = cross_val_predict(model, a, b, cv=LeaveOneOut())
        values.append(1 - np.square(b - predicted).sum() / np.square(b - others).sum())
    return max(values)


def test_cka_is_that_of_its_own_measure() -> None:
    x, z = normal(40, 5, 2, 2), normal(40, 6, 2, 2, seed=1)
    probe = probe_of(16, x=x, z=z + x[:, :1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NullWarning)
        np.testing.assert_allclose(vs.similarity(probe, measure="cka").similarity, vs.cka(probe).similarity, atol=1e-12)
        mapped = {name: value.mean((2, 3), keepdim=True) for name, value in (("x", x), ("z", z + x[:, :1]))}
        of_means = vs.similarity(probe, measure="cka", features="pooled")
        np.testing.assert_allclose(of_means.similarity, vs.cka(probe_of(16, **mapped)).similarity, atol=1e-12)


def test_procrustes_and_rsa_do_not_change_under_rotation_scale_and_shift() -> None:
    x = normal(30, 6, 1, 1)
    rotation = torch.linalg.qr(normal(6, 6, seed=3))[0]
    moved = 3.0 * (x.flatten(1) @ rotation)[:, :, None, None] + 5.0
    assert compared(x=x, moved=moved).similarity == pytest.approx(np.ones((2, 2)), abs=1e-9)
    scaled = compared("rsa", x=x, scaled=4.0 * x + 7.0)  # a shift common to all features of an image
    assert scaled.similarity == pytest.approx(np.ones((2, 2)), abs=1e-9)
    assert compared("linear_regression", x=x, moved=moved).similarity == pytest.approx(
        np.ones((2, 2)), abs=1e-3
    )  # the penalty


def test_each_measure_is_one_with_itself_and_at_its_null_with_noise() -> None:
    parts = {"x": normal(200, 12, 1, 1), "z": normal(200, 12, 1, 1, seed=1)}
    found = compared(list(ALL), size=50, n_permutations=19, n_neighbors=20, **parts)
    for name in ("procrustes", "mutual_knn", "rsa", "cka"):
        assert np.diagonal(found.of(name)) == pytest.approx(np.ones(2), abs=1e-9)
    null = dict(zip(found.measures, found.null_means[:, 0, 1]))
    assert null["mutual_knn"] == pytest.approx(20 / 199, abs=0.01)  # k / (n - 1)
    assert found.of("mutual_knn")[0, 1] == pytest.approx(20 / 199, abs=0.02)
    assert null["procrustes"] > 0.15  # not 0: the rotation fits noise
    assert found.of("procrustes")[0, 1] == pytest.approx(null["procrustes"], abs=0.05)
    for name in ("rsa", "linear_regression", "cka"):
        assert abs(found.of(name)[0, 1]) < 0.08
        assert abs(null[name]) < 0.03
    assert found.p_values[:, 0, 0] == pytest.approx(np.full(5, 0.05))  # the least that 19 permutations give
    assert (found.p_values[:, 0, 1] > 0.05).all()


def test_many_features_of_few_images_do_not_predict_noise() -> None:
    found = compared("linear_regression", features="flattened", x=normal(24, 100, 2, 2), z=normal(24, 3, 2, 2, seed=1))
    assert found.similarity[0, 1] < 0.1  # fitted and predicted on the same images it is 1


def test_two_models_of_other_widths_and_grids() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, 32, 32), torch.zeros(8, dtype=torch.long)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=2, num_classes=5)
    resnet = timm.create_model("resnet18", num_classes=5)
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    first, second = vs.Probe(vit, [(x, y)]), vs.Probe(resnet, [(2 * x + 1, y)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NullWarning)
        options = {"measure": list(ALL), "n_neighbors": 2, "n_permutations": 1}
        found, alone = vs.similarity(first, second, **options), vs.similarity(first, **options)
        assert vs.one_pass(first, {"similarity": options})["similarity"] == alone
    assert found.similarity.shape == (5, len(first.taps), len(second.taps))
    assert np.isfinite(found.similarities).all()
    assert "normalization" in found.card.solver["images_of_other"]
    assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())
    shuffled = vs.Probe(resnet, [(x.flip(0), y)])
    with pytest.raises(ValueError, match="Expected the same images in the same batches of both probes"):
        vs.similarity(first, shuffled, n_permutations=0)


def test_what_does_not_vary_or_is_not_finite_is_null_and_named() -> None:
    x = normal(16, 6, 2, 2)
    broken = x.clone()
    broken[3, 0, 0, 0] = float("nan")
    with pytest.warns(
        NullWarning, match=r"constant \(it does not vary between images\); broken \(its activations are not finite"
    ):
        found = vs.similarity(probe_of(8, x=x, constant=torch.ones(16, 3, 2, 2), broken=broken), n_permutations=1)
    assert np.isfinite(found.similarity).tolist() == [[True, False, False], [False] * 3, [False] * 3]
    with pytest.warns(NullWarning, match="the intervals"):
        found = vs.similarity(probe_of(8, x=x, z=x**2), measure="rsa", n_permutations=0)
    assert np.isnan(found.half_widths).all()
    assert np.isnan(found.p_values).all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"measure": "rtd"}, "received 'rtd': no package on PyPI that is kept up"),
        ({"measure": "svcca"}, "one of procrustes, mutual_knn, rsa, linear_regression, cka, received 'svcca'"),
        ({"measure": []}, "Expected different measures"),
        ({"measure": ["rsa", "rsa"]}, "Expected different measures"),
        ({"features": "mean"}, "'pooled', 'flattened' or None, received 'mean'"),
        (
            {"measure": "mutual_knn", "n_neighbors": 15},
            "n_neighbors from 1 to below 15.*received 15: use n_neighbors=3",
        ),
        (
            {"features": "flattened", "max_memory": 1000},
            "needs .* GiB for the features of 16 images.*features='pooled'",
        ),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text) as error:
        vs.similarity(probe_of(8, x=normal(16, 6, 2, 2)), **options)
    assert "\n" not in str(error.value)


def test_intervals_leave_enough_neighbors() -> None:
    x, z = normal(130, 6, 1, 1), normal(130, 6, 1, 1, seed=1)
    with pytest.raises(ValueError, match="n_neighbors from 1 to below 116"):
        compared("mutual_knn", size=65, n_permutations=0, n_neighbors=116, x=x, z=z)
    found = compared("mutual_knn", size=65, n_permutations=0, n_neighbors=115, x=x, z=z)
    assert np.isfinite(found.half_widths).all()


def test_images_without_activation_have_no_neighbors_in_common() -> None:
    """Equal distances were ordered by the images' numbers, which gave two unrelated layers the same neighbors."""
    x, z = normal(60, 5, 1, 1), normal(60, 5, 1, 1, seed=1)
    silent = torch.arange(60)[:, None, None, None] % 2 == 0
    found = compared("mutual_knn", size=30, n_permutations=0, n_neighbors=5, x=x.where(silent, 0), z=z.where(silent, 0))
    # the mean over random draws of the neighbors among equally near images, from an independent count
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(300):
        sets = []
        for rows in (x, z):
            rows = rows.where(silent, 0).flatten(1).numpy()
            length = np.linalg.norm(rows, axis=1, keepdims=True)
            rows = np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)
            cosines = np.round(rows @ rows.T, 10)
            np.fill_diagonal(cosines, -np.inf)
            order = np.lexsort((rng.random((60, 60)), -cosines))[:, :5]
            sets.append([set(row) for row in order.tolist()])
        shares.append(np.mean([len(a & b) / 5 for a, b in zip(*sets)]))
    assert found.similarity[0, 1] == pytest.approx(np.mean(shares), abs=4 * np.std(shares) / np.sqrt(300))
    assert found.similarity[0, 1] < 0.2


def test_dissimilarities_of_two_features_are_ranked_without_their_rounding() -> None:
    """Of two features all correlations are 1 or -1."""
    x, z = normal(40, 2, 1, 1), normal(40, 2, 1, 1, seed=1)
    z = torch.where(torch.arange(40)[:, None, None, None] < 30, x * normal(40, 1, 1, 1, seed=2).abs(), z)
    signs = [torch.sign(part[:, 0] - part[:, 1]).flatten().numpy() for part in (x, z)]
    pairs = [np.outer(part, part)[np.triu_indices(40, 1)] for part in signs]
    found = compared("rsa", size=20, n_permutations=0, x=x, z=z)
    assert found.similarity[0, 1] == pytest.approx(scipy.stats.spearmanr(*pairs).statistic, abs=1e-9)


def test_a_null_tap_of_one_model_leaves_that_of_the_same_name_in_the_other() -> None:
    x = normal(16, 6, 2, 2)
    first, second = (probe_of(8, x=x, z=x**2) for _ in range(2))
    first.model.parts["z"].register_forward_hook(lambda module, args, out: 0 * out)
    with pytest.warns(NullWarning, match=r"z \(it does not vary"):
        found = vs.similarity(first, second, n_permutations=0)
    assert np.isfinite(found.similarity).tolist() == [[True, True], [False, False]]


def test_a_tap_that_one_measure_cannot_compare_is_named() -> None:
    x = normal(16, 6, 2, 2)
    with pytest.warns(NullWarning, match=r"rsa at single \(it does not vary enough"):
        found = vs.similarity(probe_of(8, x=x, single=x[:, :1]), measure=["procrustes", "rsa"], n_permutations=0)
    with pytest.warns(NullWarning, match="the intervals of cka"):
        vs.similarity(probe_of(130, x=normal(130, 3, 1, 1)), measure=["procrustes", "cka"], n_permutations=0)
    assert np.isfinite(found.of("procrustes")).all()
    assert np.isnan(found.of("rsa")[:, 1]).all()


def test_fewer_than_four_images_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4 images, received 3"):
        vs.similarity(probe_of(3, x=normal(3, 6, 2, 2)))


@pytest.mark.slow
def test_intervals_are_calibrated() -> None:
    """The variance of the jackknife over groups is that of the similarity over samples of images, on average."""
    n, draws, quantile = 130, 60, 2.262  # of Student with 9 degrees of freedom
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(6, 8))
    for comparison in (Procrustes(), MutualKNN(10), LinearRegression()):
        values, squares = [], []
        for _ in range(draws):
            a = rng.normal(size=(n, 6)) * 0.8 ** np.arange(6)
            b = a @ mixing + rng.normal(size=(n, 8))
            sides = [Representation(*[torch.from_numpy(part)] * 2) for part in (a, b)]
            pair = Pair(sides[:1], sides[1:], within=False)
            values.append(comparison.similarities(pair, [torch.arange(n)])[0, 0, 0])
            left_out = comparison.without_groups(pair, group_numbers(n))
            squares.append((jackknife_half_width(left_out)[0, 0] / quantile) ** 2)
        # the ratio of variances from 60 samples of each has a standard deviation of about 0.2
        assert 0.55 < np.mean(squares) / np.var(values, ddof=1) < 1.8, type(comparison).__name__


def test_intervals_of_every_measure_are_given_from_128_images_on() -> None:
    x = normal(130, 6, 1, 1)
    found = compared(list(ALL), size=40, n_permutations=0, x=x, z=x + normal(130, 6, 1, 1, seed=1))
    assert (found.half_widths[:, 0, 1] > 0).all()
    assert (found.half_widths[:, 0, 1] < 0.3).all()


def measured() -> vs.Result:
    x, z = normal(20, 4, 2, 2), normal(20, 3, 2, 2, seed=1)
    return compared(list(ALL), size=7, n_neighbors=4, n_permutations=3, x=x, z=z + x[:, :1])


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(measured(), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_give_the_numbers_of_one(tmp_path: Path) -> None:
    on_ranks(_rank, str(tmp_path))
    alone = measured()
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=False)
        for field in ("similarities", "null_means", "p_values"):
            np.testing.assert_allclose(getattr(found, field), getattr(alone, field), atol=1e-12)


def test_table_file_and_figure(tmp_path: Path) -> None:
    found = compared(list(ALL), n_neighbors=3, x=normal(16, 4, 1, 1), z=normal(16, 4, 1, 1, seed=1))
    check_result(found, tmp_path)
    table = found.to_dataframe()
    row = table[
        (table.quantity == "similarities") & (table.measure == "rsa") & (table.tap == "x") & (table.other_tap == "z")
    ]
    assert row.value.item() == found.of("rsa")[0, 1]
    with pytest.raises(ValueError, match="received 'svcca'"):
        found.of("svcca")
    one = compared("rsa", x=normal(16, 4, 1, 1), z=normal(16, 4, 1, 1, seed=1))
    assert one.similarity.shape == (2, 2)
    figure = draw({"a": found, "b": one}, minus_null=True)
    drawn = [ax for ax in figure.axes if ax.images]
    assert len(drawn) == 5 + 1

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from vitscope import Probe, Tap
from vitscope.core.undefined_values import NullWarning
from vitscope.diagnostics.rank.effective_rank import effective_rank
from vitscope.diagnostics.rank.plot import effective_rank as draw
from vitscope.runtime import progress


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "enabled", False)


class Maps(nn.Module):
    """Hands its input to an identity that is the tap."""

    def __init__(self) -> None:
        super().__init__()
        self.tap = nn.Identity()
        self.register_buffer("like", torch.zeros((), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tap(x).mean((2, 3))


def probe_of(x: torch.Tensor, size: int = 16) -> Probe:
    model = Maps()
    y = torch.zeros(len(x), dtype=torch.long)
    return Probe(model, list(zip(x.split(size), y.split(size))), taps=[Tap("t", "conv", 1, 0.0, model.tap)])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whitened(n: int, channels: int) -> torch.Tensor:
    """Return features (n, channels) with mean 0 and a covariance of exactly the identity."""
    x = normal(n, channels)
    return torch.linalg.qr(x - x.mean(0))[0] * np.sqrt(n - 1)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_equal_eigenvalues_count_the_directions(rank: int) -> None:
    mixing = torch.linalg.qr(normal(8, 8, seed=2))[0][:rank]
    x = (whitened(64, 8)[:, :rank] @ mixing)[:, :, None, None] + 100.0
    result = effective_rank(probe_of(x))
    # float64, features of size 100 with deviation 1
    assert result.effective_rank[0] == pytest.approx(rank, abs=1e-5)
    assert result.participation_ratio[0] == pytest.approx(rank, abs=1e-9)
    np.testing.assert_allclose(result.spectrum[0], np.repeat([1 / rank, 0], [rank, 8 - rank]), atol=1e-10)
    assert (result.channels[0], result.n_samples[0], result.n_images) == (8, 64, 64)


def test_unequal_eigenvalues_by_hand() -> None:
    x = whitened(32, 2) * torch.tensor([3.0, 1.0])
    result = effective_rank(probe_of(x[:, :, None, None]))
    p = np.array([0.75, 0.25])
    assert result.effective_rank[0] == pytest.approx(np.exp(-(p * np.log(p)).sum()), abs=1e-10)
    assert result.participation_ratio[0] == pytest.approx(100 / 82, abs=1e-10)


def test_all_positions_equal_the_covariance_of_numpy_whatever_the_batches() -> None:
    x = normal(20, 5, 3, 4) * torch.arange(1, 6)[:, None, None] + 7
    values = np.linalg.eigvalsh(np.cov(x.permute(1, 0, 2, 3).reshape(5, -1).numpy()))[::-1]
    for size in (20, 7, 1):
        result = effective_rank(probe_of(x, size), positions=None)
        np.testing.assert_allclose(result.spectrum[0], values / values.sum(), rtol=1e-10)
        assert result.n_samples[0] == 20 * 12


@pytest.mark.parametrize("images", [5, 11, 12, 31])
def test_fewer_samples_than_channels_and_more_equal_the_covariance_of_numpy(images: int) -> None:
    x = (
        normal(images, 12, 1, 1) * torch.arange(1, 13)[:, None, None] + 7
    )  # 12 channels: Gram matrix below, scatter from there
    values = np.linalg.eigvalsh(np.cov(x[:, :, 0, 0].T.numpy()))[::-1]
    result = effective_rank(probe_of(x, 4))
    # eigenvalues of a 12 x 12 float64 matrix, relative to the largest
    np.testing.assert_allclose(result.spectrum[0], values / values.sum(), atol=1e-14)
    assert result.n_samples[0] == images
    assert (result.spectrum[0] > 1e-14).sum() == min(images - 1, 12)


def test_positions_are_few_and_of_all_rows_and_columns() -> None:
    x = normal(20, 5, 4, 4)
    few, all_ = (effective_rank(probe_of(x), positions=p) for p in (4, 16))
    assert (few.n_samples[0], all_.n_samples[0]) == (80, 320)
    np.testing.assert_array_equal(all_.spectrum[0], effective_rank(probe_of(x), positions=None).spectrum[0])
    rows, columns = (t[None].expand(4, -1, -1).double() for t in torch.meshgrid(*[torch.arange(32)] * 2, indexing="ij"))
    result = effective_rank(probe_of(torch.stack([rows, columns], dim=1)))  # two channels: the row and the column
    assert result.participation_ratio[0] > 1.5


def test_what_does_not_vary_or_is_not_finite_is_null_and_named() -> None:
    with pytest.warns(NullWarning, match=r"t \(its features do not vary\)"):
        constant = effective_rank(
            probe_of(torch.full((7, 3, 2, 2), 0.1, dtype=torch.float64))
        )  # 7 x 0.1 / 7 is not 0.1
    broken = normal(8, 3, 2, 2)
    broken[5, 1, 0, 0] = float("inf")
    with pytest.warns(NullWarning, match=r"t \(its activations are not finite\)"):
        infinite = effective_rank(probe_of(broken))
    for result in (constant, infinite):
        assert np.isnan(result.effective_rank[0])
        assert result.scalars() == {}


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least one position, received 0"):
        effective_rank(probe_of(normal(4, 3, 2, 2)), positions=0)
    with pytest.raises(ValueError, match="at least two feature vectors at tap 't', received 1"):
        effective_rank(probe_of(normal(1, 3, 1, 1)))
    probe = probe_of(normal(4, 3, 2, 2))
    probe.taps.append(Tap("never", "conv", 1, 1.0, nn.Identity()))
    with pytest.raises(ValueError, match="feature vectors at tap 'never', received 0"):
        effective_rank(probe)


def test_of_a_model_and_its_plot() -> None:
    from vitscope.models import vit

    model = vit(num_classes=4, image_size=8, depth=2)
    result = effective_rank(Probe(model, [(normal(6, 3, 8, 8).float(), torch.zeros(6, dtype=torch.long))]))
    assert result.kinds == ("stem", "msa", "mlp", "msa", "mlp")
    assert (result.participation_ratio <= result.effective_rank + 1e-9).all()  # always: the larger ones weigh more
    figure = draw({"ViT": result})
    np.testing.assert_allclose(np.asarray(figure.axes[0].lines[0].get_ydata()), result.effective_rank / 192)
    assert len(draw({"a": result, "b": result}, share=False).axes[0].lines) == 2

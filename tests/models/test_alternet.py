from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitscope import models
from vitscope.models.alternet import MSABlock
from vitscope.models.alternet_layout import BLOCKS, build_up, feature_map_sizes, stage_blocks, valid_window_sizes
from vitscope.models.layers.window_attention import FixedMixing, WindowAttention, box_blur, merge, partition


def count(**options) -> int:
    with torch.device("meta"):
        model = models.alternet(**options)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "n"),
    [  # docs/paper.md section 2
        ({"depth": 18}, 9_499_063),
        ({"depth": 34}, 22_362_954),
        ({"depth": 50}, 34_062_538),
        ({"depth": 101}, 53_054_666),
        ({"depth": 50, "n_msa": (0, 1, 1, 2)}, 33_012_840),
        ({"depth": 50, "n_msa": (0, 1, 1, 2), "dim_head": 32}, 26_647_656),
        ({"depth": 50, "n_msa": (0, 0, 0, 0)}, 28_160_164),
        ({"depth": 50, "mixer": "conv"}, 28_160_164),
    ],
)
def test_parameter_counts(options: dict, n: int) -> None:
    assert count(num_classes=100, **options) == n


@pytest.mark.parametrize(("depth", "millions"), [(18, 9.97), (34, 22.83), (50, 35.92), (101, 54.91)])
def test_parameter_counts_for_imagenet(depth: int, millions: float) -> None:
    n = count(depth=depth, num_classes=1000, image_size=224, window_size=7, stem="imagenet")
    assert round(n / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("n_msa", "millions"), [((0, 0, 0, 1), 30.26), ((0, 0, 0, 2), 32.36), ((0, 0, 1, 2), 32.88), ((0, 1, 2, 2), 33.54)]
)
def test_parameter_counts_along_the_build_up_path(n_msa: tuple, millions: float) -> None:
    assert round(count(depth=50, num_classes=100, n_msa=n_msa) / 1e6, 2) == millions


def test_build_up_is_the_papers_path() -> None:
    assert build_up(50) == [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 2), (0, 0, 1, 2), (0, 1, 1, 2)]
    assert build_up(50, overshoot=True)[-1] == (0, 1, 2, 2)
    assert build_up(18, overshoot=True) == [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 1), (0, 1, 1, 1)]


@pytest.mark.parametrize("depth", [pytest.param(d, marks=pytest.mark.slow) if d > 50 else d for d in BLOCKS])
def test_every_step_of_the_build_up_path_builds(depth: int) -> None:
    for step in build_up(depth, overshoot=True):
        with torch.device("meta"):
            model = models.alternet(depth, n_msa=step)
        assert [sum(isinstance(b, MSABlock) for b in stage) for stage in model.stages] == list(step)


def test_block_order() -> None:
    assert stage_blocks((3, 4, 6, 4), (0, 1, 3, 2)) == ("CCC", "CCCM", "CMCMCM", "CMCM")
    assert stage_blocks((3, 4, 6, 4), (0, 1, 1, 2)) == ("CCC", "CCCM", "CCCCCM", "CMCM")
    assert stage_blocks((3, 4, 6, 4), (0, 1, 1, 2), "stage_start") == ("CCC", "CMCC", "CMCCCC", "CMCM")
    assert stage_blocks((3, 4, 6, 4), (0, 1, 1, 2), "late") == ("CCC", "CCCC", "CCCCCM", "CMMM")
    assert stage_blocks((3, 4, 6, 4), (0, 1, 1, 2), "alternating") == ("CCC", "CCCC", "CCCMCM", "CMCM")
    assert stage_blocks((3, 3), (0, 2), "official") == ("CCC", "CMC")


@pytest.mark.parametrize(
    ("n_msa", "placement", "message"),
    [
        ((0, 3, 0, 0), "stage_end", "n_msa of at most 2 for the 4 blocks of stage 2, received 3"),
        ((0, 1), "stage_end", "n_msa of 4 counts"),
        ((0, -1, 0, 0), "stage_end", "of at least 0"),
        ((9, 9, 9, 9), "late", "a sum of at most 13 for 17 blocks, received 36"),
        ((0, 1, 1, 2), "middle", "placement to be .* received 'middle'"),
    ],
)
def test_impossible_placements(n_msa: tuple, placement: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage_blocks((3, 4, 6, 4), n_msa, placement)


def test_placements_within_a_stage_have_equal_parameters() -> None:
    counts = {p: count(depth=50, n_msa=(0, 1, 1, 1), placement=p) for p in ("stage_end", "stage_start")}
    assert len(set(counts.values())) == 1


@pytest.mark.parametrize(("depth", "dim_head"), [(34, 91), (50, 40)])
def test_heads_of_that_width_make_every_placement_as_large(depth: int, dim_head: int) -> None:
    placements, n_msa = ("stage_end", "stage_start", "late", "alternating"), (0, 1, 1, 2)
    counts = [count(depth=depth, n_msa=n_msa, dim_head=dim_head, placement=p) for p in placements]
    sequences = {stage_blocks((3, 4, 6, 4), n_msa, p) for p in placements}
    assert len(sequences) == 4
    assert max(counts) / min(counts) < 1.002  # what conf/experiment/msa_placement.yaml and conf/reproduce.yaml set


def test_feature_map_sizes_are_those_of_the_model() -> None:
    for stem, size in (("cifar", (20, 33)), ("imagenet", (75, 90))):
        model = models.alternet(image_size=size, stem=stem, pad=True).eval()
        x, sizes = model.stem(torch.zeros(1, 3, *size)), []
        for stage in model.stages:
            x = stage(x)
            sizes.append(tuple(x.shape[-2:]))
        assert tuple(sizes) == feature_map_sizes(size, stem)


def test_valid_windows() -> None:
    assert valid_window_sizes(32, "cifar") == (2, 4)
    assert valid_window_sizes(224, "imagenet") == (7,)
    assert valid_window_sizes(32, "cifar", (0, 1, 1, 0)) == (2, 4, 8)
    assert valid_window_sizes((32, 48), "cifar") == (2,)
    assert valid_window_sizes(30, "cifar") == ()


def test_a_window_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(
        ValueError, match=r"window_size .* 16x16 map of stage 2, received 7; window sizes that do: 2, 4; or set pad"
    ):
        models.alternet(window_size=7)
    with pytest.raises(ValueError, match=r"4x4 map of stage 4, received 8"):
        models.alternet(window_size=8)
    with pytest.raises(ValueError, match=r"no window does; set pad=True"):
        models.alternet(image_size=30)
    with pytest.raises(ValueError, match=r"window_size to divide the 6x4 feature map, received 4"):
        WindowAttention(8, 8, heads=1)(torch.zeros(1, 6, 4, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 20}, "one of 18, 34, 50, 101, 152, received 20"),
        ({"mixer": "fft"}, "mixer to be .* received 'fft'"),
        ({"blur_size": 4, "mixer": "blur"}, "blur_size to be 2 or 3"),
        ({"stem": "vgg"}, "stem to be cifar or imagenet, received 'vgg'"),
        ({"position_bias": "none"}, "position_bias to be shared"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.alternet(**options)


def test_padding_changes_nothing_where_the_window_divides() -> None:
    plain, padded = models.alternet().double().eval(), models.alternet(pad=True).double().eval()
    padded.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(plain(x), padded(x))


def test_padded_windows_attend_to_real_positions_only() -> None:
    attention = WindowAttention(6, 5, heads=2, dim_head=3, window_size=4, pad=True).double()
    x = torch.randn(2, 6, 5, 6, dtype=torch.float64)
    out = attention(x)
    full = F.pad(x, (0, 0, 0, 3, 0, 2))
    top, left = 4, 4  # the corner window: rows 4-5 and column 4 are real
    tokens = full[:, top : top + 4, left : left + 4].reshape(2, 16, 6)
    real = torch.tensor([r < 2 and c < 1 for r in range(4) for c in range(4)])
    q, k, v = attention.qkv(tokens).reshape(2, 16, 3, 2, 3).permute(2, 0, 3, 1, 4)
    i = torch.arange(16)
    rows, columns = i[None] // 4 - i[:, None] // 4 + 3, i[None] % 4 - i[:, None] % 4 + 3
    scores = (q @ k.mT / 3**0.5 + attention.position_bias[0][rows, columns])[..., real]
    expected = attention.proj((scores.softmax(-1) @ v[:, :, real]).transpose(1, 2).reshape(2, 16, 6))
    # float64 rounding of sums over at most 16 terms
    assert (
        out[:, 4:6, 4:5].reshape(2, 2, 5) - expected.reshape(2, 4, 4, 5)[:, :2, :1].reshape(2, 2, 5)
    ).abs().max() < 1e-12
    assert out.shape == (2, 6, 5, 5)


def test_partition_and_merge_are_inverse_and_local() -> None:
    x = torch.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    windows = partition(x, 2)
    assert torch.equal(merge(windows, 2, 4, 6), x)
    assert torch.equal(windows[4], x[0, 2:4, 2:4].reshape(4, 3))  # second row of windows, second column


def test_a_bias_per_head_with_equal_tables_is_the_shared_bias() -> None:
    shared = WindowAttention(6, 6, heads=3, dim_head=4)
    own = WindowAttention(6, 6, heads=3, dim_head=4, position_bias="per_head")
    own.load_state_dict({**shared.state_dict(), "position_bias": shared.position_bias.repeat(3, 1, 1)})
    x = torch.randn(1, 8, 8, 6)
    assert torch.equal(shared(x), own(x))


def test_uniform_mixing_is_attention_with_equal_scores() -> None:
    attention = WindowAttention(6, 5, heads=2, dim_head=3, window_size=4).double()
    uniform = FixedMixing(6, 5, inner=6, mixer="uniform", window_size=4, pad=False, blur_size=2).double()
    with torch.no_grad():
        attention.qkv.weight[:12] = 0  # queries and keys
        attention.position_bias.zero_()
    uniform.load_state_dict(
        {"value.weight": attention.qkv.weight[12:], **{f"proj.{k}": v for k, v in attention.proj.state_dict().items()}}
    )
    x = torch.randn(2, 8, 8, 6, dtype=torch.float64)
    assert (attention(x) - uniform(x)).abs().max() < 1e-12


def test_padded_uniform_mixing_averages_real_positions_only() -> None:
    uniform = FixedMixing(1, 1, inner=1, mixer="uniform", window_size=4, pad=True, blur_size=2)
    x = torch.arange(6.0).reshape(1, 1, 6, 1)
    assert torch.equal(uniform._window_mean(x).flatten(), torch.tensor([1.5, 1.5, 1.5, 1.5, 4.5, 4.5]))


@pytest.mark.parametrize("size", [2, 3])
def test_box_blur_keeps_size_and_constants_and_is_the_mean_inside(size: int) -> None:
    x = torch.randn(1, 5, 7, 2, dtype=torch.float64)
    out = box_blur(x, size)
    assert out.shape == x.shape
    top = 2 - (size - 1) // 2
    expected = x[0, top : top + size, top : top + size].mean((0, 1))
    assert (out[0, 2, 2] - expected).abs().max() < 1e-15
    assert torch.allclose(box_blur(torch.ones_like(x), size), torch.ones_like(x), rtol=0, atol=1e-15)


@pytest.mark.parametrize("mixer", ["uniform", "blur", "conv"])
def test_replacements_run_and_have_no_attention(mixer: str) -> None:
    model = models.alternet(mixer=mixer)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert not any(isinstance(m, WindowAttention) for m in model.modules())


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    plain, saving = models.alternet(), models.alternet(grad_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 32)
    for model in (plain, saving):
        model.train()
        model(x).square().sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters()):
        assert torch.equal(a.grad, b.grad)


def test_drop_path_grows_linearly() -> None:
    model = models.alternet(drop_path=0.1)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage]
    assert rates == pytest.approx([0.1 * i / 7 for i in range(8)])


def test_other_channels_and_any_image_size() -> None:
    model = models.alternet(in_chans=1, image_size=(24, 48), window_size=3)
    assert model(torch.zeros(1, 1, 24, 48)).shape == (1, 10)
    assert isinstance(model.stem[0], nn.Conv2d)

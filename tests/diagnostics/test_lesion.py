from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from timm.models.resnet import Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.optim.swa_utils import update_bn

from vitscope import Probe
from vitscope.core.undefined_values import NullWarning
from vitscope.diagnostics.lesion.lesion import lesion
from vitscope.diagnostics.lesion.plot import lesion as draw
from vitscope.models.structure import residual_units
from vitscope.runtime import progress

RESNET_UNITS = ("layer1.0", "layer1.1", "layer2.0", "layer3.0", "layer4.0")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "enabled", False)


def randomized(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(noise.abs() + 0.5 if name.endswith("running_var") else tensor + 0.2 * noise)
    return model.double().eval()


def vit() -> nn.Module:
    return randomized(VisionTransformer(8, 4, num_classes=5, embed_dim=12, depth=3, num_heads=3, mlp_ratio=2))


def resnet() -> nn.Module:
    model = ResNet(Bottleneck, (2, 1, 1, 1), num_classes=5, channels=(4, 6, 6, 6))
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1), nn.Identity()
    return randomized(model)


def batches(n: int = 12, size: int = 5, side: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, side, side, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 5, (n,), generator=generator)
    return list(zip(x.split(size), y.split(size)))


def losses(model: nn.Module, data: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad():
        logits, y = torch.cat([model(x) for x, _ in data]), torch.cat([y for _, y in data])
    loss = nn.functional.cross_entropy(logits, y, reduction="none")
    return loss.numpy(), (logits.argmax(1) == y).double().numpy()


def zero(model: nn.Module, *names: str) -> nn.Module:
    """An independent way to remove a branch: its last layer's weights are zero."""
    changed = copy.deepcopy(model)
    for name in names:
        layer = changed.get_submodule(name)
        for p in layer.parameters():
            nn.init.zeros_(p)
        if isinstance(layer, nn.BatchNorm2d):  # bias and weight are zero, so the output is
            assert layer.affine
    return changed


#: enough images for intervals of mean losses
MANY = (132, 50)


def assert_changes(result: Any, prefix: str, oracles: Mapping[str, nn.Module], model: nn.Module) -> None:
    whole, right = losses(model, batches(*MANY))
    assert getattr(result, f"{prefix}units") == tuple(oracles)
    for i, changed in enumerate(oracles.values()):
        loss, correct = losses(changed, batches(*MANY))
        # the same sums in another order, float64
        assert getattr(result, f"{prefix}nll_change")[i] == pytest.approx((loss - whole).mean(), abs=1e-10)
        assert getattr(result, f"{prefix}accuracy_change")[i] == pytest.approx((correct - right).mean(), abs=1e-12)
        half = stats.t.ppf(0.975, len(loss) - 1) * stats.sem(loss - whole)
        assert getattr(result, f"{prefix}nll_half_width")[i] == pytest.approx(half, rel=1e-6)


def test_transformer_branches_heads_and_stages_equal_zeroed_weights() -> None:
    model = vit()
    result = lesion(Probe(model, batches(*MANY)), removals=("branch_zero", "stage", "head", "conv3x3_identity"))
    attention = {f"blocks.{i}.attn": f"blocks.{i}.attn.proj" for i in range(3)}
    mlp = {f"blocks.{i}.mlp": f"blocks.{i}.mlp.fc2" for i in range(3)}
    last = {name: layer for i in range(3) for half in (attention, mlp) for name, layer in [list(half.items())[i]]}
    assert_changes(result, "", {name: zero(model, layer) for name, layer in last.items()}, model)
    stages = {"stage 1 msa": zero(model, *attention.values()), "stage 1 mlp": zero(model, *mlp.values())}
    assert_changes(result, "stage_", stages, model)
    heads: dict[str, nn.Module] = {}
    for name, layer in attention.items():
        for head in range(3):
            changed = copy.deepcopy(model)
            weight = changed.get_submodule(layer).weight
            assert isinstance(weight, nn.Parameter)
            weight.data[:, 4 * head : 4 * head + 4] = 0
            heads[f"{name} head {head}"] = changed
    assert_changes(result, "head_", heads, model)
    assert result.identity_units == ()
    assert result.kinds == ("msa", "mlp") * 3
    assert result.depths.tolist() == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]


def test_resnet_branches_and_identities_equal_rewritten_weights() -> None:
    model = resnet()
    result = lesion(Probe(model, batches(*MANY)))
    assert_changes(result, "", {name: zero(model, f"{name}.bn3") for name in RESNET_UNITS}, model)
    identities: dict[str, nn.Module] = {}
    for name in RESNET_UNITS:
        changed = copy.deepcopy(model)
        conv = changed.get_submodule(f"{name}.conv2")
        assert isinstance(conv, nn.Conv2d)
        nn.init.dirac_(conv.weight)  # with its stride of 1 or 2 and padding of 1: x[::s, ::s]
        identities[name] = changed
    assert_changes(result, "identity_", identities, model)
    assert model.get_submodule("layer2.0.conv2").stride == (2, 2)
    assert result.stage_units == ()


@pytest.mark.parametrize("right", ["before", "after"])
def test_answers_that_are_wrong_on_one_side_alone_give_the_loss_an_interval(right: str) -> None:
    """A mean loss has an interval where 10 images were answered wrong, by the whole model or without the branch."""
    model = vit()
    oracle = model if right == "before" else zero(model, "blocks.2.attn.proj")
    with torch.no_grad():
        data = [(x, oracle(x).argmax(1)) for x, _ in batches(*MANY)]
    result = lesion(Probe(model, data))
    assert result.units[4] == "blocks.2.attn"
    assert (result.accuracy == 1) == (right == "before")
    assert (result.accuracy + result.accuracy_change[4] == pytest.approx(1)) == (right == "after")
    loss, whole = losses(zero(model, "blocks.2.attn.proj"), data)[0], losses(model, data)[0]
    expected = stats.t.ppf(0.975, len(loss) - 1) * stats.sem(loss - whole)
    assert result.nll_half_width[4] == pytest.approx(expected, rel=1e-6)


def test_a_branch_that_adds_nothing_changes_nothing() -> None:
    model = zero(vit(), "blocks.1.mlp.fc2")
    result = lesion(Probe(model, batches(*MANY)))
    index = result.units.index("blocks.1.mlp")
    assert result.nll_change[index] == result.accuracy_change[index] == result.nll_half_width[index] == 0.0
    assert (np.delete(result.nll_change, index) != 0).all()


@pytest.mark.parametrize("build", [vit, resnet])
def test_cached_passes_give_the_same_numbers_and_the_model_is_restored(build: Any) -> None:
    model = build().train()
    state = copy.deepcopy(model.state_dict())
    chosen = ("branch_zero", "conv3x3_identity", "stage", "head")
    a, b = (lesion(Probe(model, batches()), removals=chosen, cache=cache) for cache in (True, False))
    for prefix in ("", "identity_", "stage_", "head_"):
        np.testing.assert_array_equal(getattr(a, f"{prefix}nll_change"), getattr(b, f"{prefix}nll_change"))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_cache_runs_no_block_before_the_lesion() -> None:
    model = vit()
    calls: list[str] = []
    own = residual_units.units(model)
    for name, module in model.named_modules():
        if name.endswith(".mlp.fc1"):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    lesion(Probe(model, batches(4, 4)), removals=(), units=own)
    # a single batch: twice to see that the model repeats itself, then the whole pass and six lesions, each a full pass
    assert [calls.count(f"blocks.{i}.mlp.fc1") for i in range(3)] == [2 + 7, 2 + 7, 2 + 7]
    calls.clear()
    lesion(Probe(model, batches(8, 4)), removals=(), units=own)
    # each batch: the whole pass, then two lesions in each of three blocks, each followed by what comes after it;
    # and on the first batch two passes of the check and the six full passes with which they are compared
    assert [calls.count(f"blocks.{i}.mlp.fc1") for i in range(3)] == [2 * (1 + n) + 8 for n in (2, 4, 6)]


def test_recalibration_equals_torch_update_bn() -> None:
    model = resnet()
    whole = copy.deepcopy(model)
    update_bn([x for x, _ in batches()], whole)
    result = lesion(Probe(model, batches()), bn="recalibrate", removals=())
    loss, right = losses(whole.eval(), batches())
    assert result.nll == pytest.approx(loss.mean(), abs=1e-10)
    for i, name in enumerate(RESNET_UNITS):
        changed = zero(model, f"{name}.bn3")
        update_bn([x for x, _ in batches()], changed)
        removed, correct = losses(changed.eval(), batches())
        assert result.nll_change[i] == pytest.approx((removed - loss).mean(), abs=1e-10)
        assert result.accuracy_change[i] == pytest.approx((correct - right).mean(), abs=1e-12)
    assert result.card is not None
    assert result.card.bn_policy == "recalibrate"


def test_batch_size_does_not_matter() -> None:
    model = vit()
    a, b = (lesion(Probe(model, batches(132, size))) for size in (132, 50))
    np.testing.assert_allclose(a.nll_change, b.nll_change, atol=1e-12)
    np.testing.assert_allclose(a.nll_half_width, b.nll_half_width, rtol=1e-8)
    assert a.n_images == b.n_images == 132


def test_finished_batches_are_not_computed_again() -> None:
    class Stopping(list):
        def __iter__(self) -> Iterator[Any]:
            yield from super().__iter__()
            raise KeyboardInterrupt

    model, partial, calls = vit(), {}, []
    with pytest.raises(KeyboardInterrupt):
        lesion(Probe(model, Stopping(batches()[:2])), partial=partial)
    own = residual_units.units(model)
    model.register_forward_hook(lambda *_: calls.append(1))
    resumed = lesion(Probe(model, batches()), partial=partial, units=own)
    assert (
        len(calls) == 2 + 1 + 8
    )  # two passes of the check; one batch of three: the whole model and 6 branches, 2 stages
    np.testing.assert_array_equal(resumed.nll_change, lesion(Probe(model, batches())).nll_change)


def test_stage_end_excess_is_the_last_msa_minus_the_mean_of_the_others() -> None:
    result = lesion(Probe(vit(), batches()))
    msa = result.nll_change[::2]
    assert result.scalars()["stage_end_msa_nll_excess"] == pytest.approx(msa[2] - msa[:2].mean(), abs=1e-12)
    assert result.scalars()["msa_nll_change"] == pytest.approx(msa.mean(), abs=1e-12)
    assert result.scalars()["n_stages"] == 1
    without_attention = lesion(Probe(resnet(), batches())).scalars()
    assert "stage_end_msa_nll_excess" not in without_attention
    assert without_attention["n_stages"] == len(set(lesion(Probe(resnet(), batches())).stages)) > 1


def test_batches_without_labels_count_nowhere() -> None:
    model, data = vit(), batches()
    unlabeled = (data[0][0].flip(0), torch.full((5,), -100))
    expected = lesion(Probe(model, data))
    for place in (0, 2, 3):
        result = lesion(Probe(model, [*data[:place], unlabeled, *data[place:]]))
        np.testing.assert_array_equal(result.nll_change, expected.nll_change)
        np.testing.assert_array_equal(result.accuracy_change, expected.accuracy_change)
        assert result.n_images == expected.n_images
    with pytest.raises(ValueError, match="at least one image with a label to evaluate, received none"):
        lesion(Probe(model, [unlabeled]))


def test_answers_from_logits_that_are_not_finite_are_none() -> None:
    """The class with number 0 would be the most probable one of NaN."""
    model = vit()
    with torch.no_grad():
        model.get_submodule("blocks.1.mlp.fc2").weight.fill_(1e308)  # finite itself, and its products overflow
    x = batches()[0][0]
    probe = Probe(model, [(x, torch.zeros(len(x), dtype=torch.long))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NullWarning)
        result = lesion(probe)
    assert np.isnan([result.accuracy, result.nll]).all()
    assert np.isnan(result.accuracy_change).all()
    assert np.isnan(result.nll_change).all()


def test_a_lesion_whose_logits_are_not_finite_is_null_alone() -> None:
    model = vit()
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.eps = 0.0
        for name in ("blocks.0.mlp.fc2", "blocks.0.attn.proj", "blocks.1.mlp.fc2", "blocks.1.attn.proj"):
            for p in model.get_submodule(name).parameters():
                p.zero_()
        for p in (model.cls_token, model.pos_embed, model.get_submodule("blocks.2.attn.proj").weight):
            p.zero_()  # without the last MLP the class token is 0, and its norm 0 / 0
        model.get_submodule("blocks.2.attn.proj").bias.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NullWarning)
        result = lesion(Probe(model, batches()))
    last = list(result.units).index("blocks.2.mlp")
    assert np.isnan(result.accuracy_change[last])
    assert np.isfinite(np.delete(result.accuracy_change, last)).all()
    assert np.isfinite(result.accuracy)


def test_refusals_and_units_of_ones_own() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    with pytest.raises(ValueError, match="no residual unit"):
        lesion(Probe(model, batches()))
    with pytest.raises(ValueError, match="removals among branch_zero, conv3x3_identity, stage, head, received 'all'"):
        lesion(Probe(vit(), batches()), removals=("all",))
    with pytest.raises(ValueError, match="bn to be one of eval, recalibrate, received 'batch'"):
        lesion(Probe(vit(), batches()), bn="batch")
    own = vit()
    only = residual_units.units(own)[2:4]
    assert lesion(Probe(own, batches()), units=only).units == ("blocks.1.attn", "blocks.1.mlp")


def test_plot_draws_each_unit_of_each_result() -> None:
    results = {"ViT": lesion(Probe(vit(), batches())), "ResNet": lesion(Probe(resnet(), batches()))}
    for value in ("accuracy", "nll"):
        figure = draw(results, value=value)
        assert len(figure.axes) == 2
        assert [text.get_text() for text in figure.axes[1].get_xticklabels()] == list(RESNET_UNITS)
    with pytest.raises(ValueError, match="value to be one of accuracy, nll, received 'loss'"):
        draw(results, value="loss")

"""Muon for the matrices of hidden layers, AdamW for the rest: which are which, their steps, and an exact resume."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from vitscope import models
from vitscope.runs.checkpoints import checkpoint_io, checkpoint_weights
from vitscope.training.optimizers.muon import MuonAdamW, hidden_matrices


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 4, 5), nn.GELU(),
        nn.Linear(5, 3),
    )  # fmt: skip


def trained(net: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> list[torch.Tensor]:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(8, 3, 6, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


def test_matrices_of_hidden_layers_are_told_by_their_modules() -> None:
    assert list(hidden_matrices(network())) == ["2.weight", "5.weight"]
    assert list(hidden_matrices(network(), ["5.*"])) == ["2.weight"]
    vit = hidden_matrices(models.vit("tiny", 10, 32, 8, depth=1))
    names = ["attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"]
    assert [name.removeprefix("blocks.0.") for name in vit] == names
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=4)
    names = set(hidden_matrices(swin))
    assert not {name for name in names if "table" in name or "head" in name or "norm" in name or "patch_embed" in name}
    assert "layers.1.downsample.reduction.weight" in names
    depthwise = hidden_matrices(timm.create_model("test_convnext", num_classes=4))
    assert depthwise
    assert not {name for name in depthwise if name.endswith("conv_dw.weight")}
    with torch.device("meta"):
        coat = hidden_matrices(timm.create_model("coat_tiny", num_classes=4))
        crossvit = hidden_matrices(timm.create_model("crossvit_9_240", num_classes=4))
    stages = [name for name in coat if name.startswith("patch_embed")]
    assert stages == [f"patch_embed{i}.proj.weight" for i in (2, 3, 4)]  # of feature maps; the first sees pixels
    assert not [name for name in crossvit if name.startswith("patch_embed")]  # one a branch, both of pixels
    net = network()
    assert MuonAdamW(net.parameters(), net).summary == (
        "Muon trains 2 matrices, 2.weight to 5.weight; AdamW all other parameters, among them the matrices 0.weight, 7.weight"
    )
    attention = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.Linear(4, 2))
    assert list(hidden_matrices(attention)) == ["1.in_proj_weight", "1.out_proj.weight"]


def test_a_state_without_steps_ends_the_moments_of_before() -> None:
    net = network()
    optimizer = MuonAdamW(net.parameters(), net, lr=0.01)
    start, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    first = trained(net, optimizer, range(2))
    optimizer.load_state_dict(state)
    net.load_state_dict(start)
    for value, other in zip(trained(net, optimizer, range(2)), first):
        assert torch.equal(value, other)


def test_a_copy_with_its_network_makes_the_same_steps() -> None:
    net = network()
    optimizer = MuonAdamW(net.parameters(), net, lr=0.01)
    trained(net, optimizer, range(2))
    net_copy, optimizer_copy = copy.deepcopy((net, optimizer))
    whole = trained(net, optimizer, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(whole, trained(net_copy, optimizer_copy, range(2, 4))))


def test_steps_are_those_of_torch_s_muon_and_adamw() -> None:
    """The reference flattens kernels by hand and runs the two optimizers apart."""
    net = network()
    reference = copy.deepcopy(net)
    optimizer = MuonAdamW(net.parameters(), net, lr=0.01, weight_decay=0.1)
    convolution, linear = reference.get_submodule("2").weight, reference.get_submodule("5").weight
    assert isinstance(convolution, nn.Parameter)
    assert isinstance(linear, nn.Parameter)
    kernel = nn.Parameter(convolution.detach().clone().flatten(1))
    muon = torch.optim.Muon([kernel, linear], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    hidden = {id(convolution), id(linear)}
    rest = [p for p in reference.parameters() if id(p) not in hidden]
    adamw = torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1)
    for seed in range(3):
        trained(net, optimizer, range(seed, seed + 1))
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(8, 3, 6, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)
        reference.zero_grad()
        nn.functional.cross_entropy(reference(x), y).backward()
        assert convolution.grad is not None
        kernel.grad = convolution.grad.flatten(1)
        muon.step()
        adamw.step()
        convolution.data.copy_(kernel.detach().view_as(convolution))
    for p, expected in zip(net.parameters(), reference.parameters()):
        assert torch.equal(p, expected)


def test_its_state_comes_back_bit_for_bit() -> None:
    one, other = network(), network()
    optimizer = MuonAdamW(one.parameters(), one, lr=0.01)
    trained(one, optimizer, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    weights = copy.deepcopy(one.state_dict())
    whole = trained(one, optimizer, range(3, 6))
    other.load_state_dict(weights)
    resumed = MuonAdamW(other.parameters(), other, lr=0.5)
    resumed.load_state_dict(state)
    assert [group["lr"] for group in resumed.param_groups] == [0.01, 0.01]
    assert all(torch.equal(a, b) for a, b in zip(whole, trained(other, resumed, range(3, 6))))


def test_a_schedule_moves_both_rates() -> None:
    net = network()
    optimizer = MuonAdamW(net.parameters(), net, lr=0.02, adamw_lr=0.001, adjust_lr_fn="original")
    before = [p.detach().clone() for p in net.parameters()]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    assert schedule.get_last_lr() == [0.02, 0.001]
    after = trained(net, optimizer, range(1))
    assert not any(torch.equal(a, b) for a, b in zip(before, after))
    schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(after, trained(net, optimizer, range(1, 2))))


def test_a_network_without_hidden_matrices_is_one_line() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(ValueError, match=r"Expected a network with matrices between .*: use optimizer=adamw\.$"):
        MuonAdamW(net.parameters(), net)


@pytest.mark.parametrize(
    "optimizer",
    [
        ["optimizer=muon", "optimizer.ns_steps=1"],
        ["optimizer._target_=torch.optim.Adafactor", "~optimizer.betas", "~optimizer.eps"],
        pytest.param(
            ["optimizer._target_=timm.optim.Muon", "~optimizer.betas", "~optimizer.eps"], marks=pytest.mark.slow
        ),
    ],
    ids=["muon", "adafactor", "muon of timm"],
)
def test_a_resumed_training_equals_an_uninterrupted_one(call, tiny, tmp_path: Path, optimizer: list[str]) -> None:
    """The run is copied after its first epoch's end and goes on to the second one."""
    options = [*tiny, *optimizer, "analysis=[]", "test=false", "optimizer.schedule.kind=constant"]
    assert call("train", *options, "trainer.max_epochs=2", f"run_dir={tmp_path}/whole") == 0
    assert call("train", *options, "trainer.max_epochs=1", f"run_dir={tmp_path}/cut") == 0
    assert call("train", f"run={tmp_path}/cut", "trainer.max_epochs=2") == 0
    whole, resumed = (
        checkpoint_weights.model_state(checkpoint_io.read(tmp_path / name / "checkpoints" / "last.ckpt"))
        for name in ("whole", "cut")
    )
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_torch_s_muon_alone_leads_to_ours(call, tiny, tmp_path: Path, capsys) -> None:
    given = ["optimizer._target_=torch.optim.Muon", "~optimizer.betas"]
    assert call("train", *tiny, *given) == 2
    err = capsys.readouterr().err.strip()
    assert err.endswith("; choose optimizer=muon, which trains the other parameters with AdamW")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()

"""The classifier of a network, and files in which a new one stands for it."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torchvision import models as torchvision_models

from vitscope.models import classifier_head, state_dicts

NETWORKS = {
    "resnet18": (lambda n: timm.create_model("resnet18", num_classes=n), ["fc"]),
    "deit_tiny_distilled_patch16_224": (
        lambda n: timm.create_model("deit_tiny_distilled_patch16_224", num_classes=n, depth=1), ["head", "head_dist"],
    ),
    "torchvision resnet18": (lambda n: torchvision_models.resnet18(num_classes=n), ["fc"]),
    "torchvision mobilenet": (lambda n: torchvision_models.mobilenet_v3_small(num_classes=n), ["classifier.3"]),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("wrap", ["plain", "module.", "state_dict"])
def test_all_but_the_classifier_is_the_file_s(name, wrap) -> None:
    """Whatever prefix or entry the file has; the classifier's names and shapes are reported."""
    build, heads = NETWORKS[name]
    file = build(7).state_dict()
    prefix = "module." if wrap == "module." else ""
    content = {prefix + key: value for key, value in file.items()}
    content = {"state_dict": content, "epoch": 3} if wrap == "state_dict" else content
    network = build(5)
    own = {key: value.clone() for key, value in network.state_dict().items()}
    assert classifier_head.classifier_names(network, 5) == heads
    replaced = classifier_head.with_new_head(network, content, 5)
    reading = state_dicts.select_weights(network, replaced.content)
    assert reading is not None
    for key, value in reading.tensors.items():
        is_new = key.startswith(tuple(f"{head}." for head in heads))
        assert value.equal(own[key] if is_new else file[key]), key
        assert (key in replaced.new_names) == is_new
    assert sorted(replaced.left_out) == sorted(prefix + key for key in replaced.new_names)
    assert all(shape[0] == 7 for shape in replaced.left_out.values())


def test_a_file_without_a_classifier_and_a_network_without_one() -> None:
    """A backbone's file fits; a network without a layer of that many outputs is refused."""
    network = timm.create_model("resnet18", num_classes=5)
    backbone = {key: value for key, value in network.state_dict().items() if not key.startswith("fc.")}
    replaced = classifier_head.with_new_head(network, backbone, 5)
    assert replaced.left_out == {}
    assert state_dicts.select_weights(network, replaced.content) is not None
    with pytest.raises(ValueError, match="a classifier of 5 classes, received Sequential"):
        classifier_head.with_new_head(nn.Sequential(nn.Linear(3, 4)), {}, 5)
    with pytest.raises(ValueError, match="more than its classifier"):
        classifier_head.with_new_head(nn.Sequential(nn.Linear(3, 5)), {"0.weight": torch.zeros(4, 3)}, 5)

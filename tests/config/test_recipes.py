"""The paper's recipes, docs/paper.md section 3, to the number, as they are composed."""

from __future__ import annotations

import math
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from tests.fixtures.configs.configurations import composed
from vitscope.core.lr_schedule import factor

MIXED = {"mixup": 1.0, "cutmix": 0.8, "switch_prob": 0.5, "label_smoothing": 0.1}
PLAIN = {"mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0}
COSINE = {"kind": "cosine", "warmup_epochs": 5, "per_epoch": True, "min_factor": 0.0}
ADAMW = {"_target_": "torch.optim.AdamW", "lr": 1.25e-4, "weight_decay": 0.05}

#: epochs, batch, clipping, drop path, augmentation, erasing, mixing, optimizer, schedule
RECIPES: dict[str, tuple[Any, ...]] = {
    "cifar_strong": (305, 96, 5.0, 0.1, "rand-m9-n2-mstd1.0", 0.0, MIXED, ADAMW, COSINE),
    "cifar_weak": (305, 96, None, 0.1, "crop_flip", 0.0, PLAIN, ADAMW, COSINE),
    "cifar_general": (201, 128, None, 0.0, "crop_flip", 0.0, PLAIN,
                      {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
                      {"kind": "multistep", "warmup_epochs": 1, "milestones": [60, 120, 160], "gamma": 0.2}),
    "imagenet_strong": (305, 128, None, 0.1, "rand-m9-n2-mstd0.5", 0.25, MIXED, ADAMW, COSINE),
    "imagenet_general": (91, 256, None, 0.0, "crop_flip", 0.0, PLAIN,
                         {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
                         {"kind": "multistep", "warmup_epochs": 1, "milestones": [30, 60, 80], "gamma": 0.1}),
}  # fmt: skip


def contains(node: DictConfig, expected: dict[str, Any]) -> None:
    for key, value in expected.items():
        assert node[key] == value, key


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("model", ["vit", "convnet", "alternet", "swin"])
def test_recipe(name: str, model: str) -> None:
    epochs, batch, clip, drop_path, augment, erasing, mixing, optimizer, schedule = RECIPES[name]
    cfg = composed("train", f"experiment=recipe_{name}", f"model={model}")
    assert (cfg.trainer.max_epochs, cfg.data.batch_size, cfg.data.eval_batch_size) == (epochs, batch, 256)
    assert (cfg.trainer.max_steps, cfg.trainer.limit_train_batches, cfg.trainer.accumulate_grad_batches) == (-1, 1.0, 1)
    assert cfg.trainer.gradient_clip_val == clip
    assert cfg.model.drop_path == drop_path
    assert (cfg.data.augment, cfg.data.random_erasing, cfg.data.flip) == (augment, erasing, True)
    contains(cfg.data, mixing)
    contains(cfg.objective, {**mixing, "weight_decay": optimizer["weight_decay"]})
    contains(cfg.optimizer, optimizer)
    contains(cfg.optimizer.schedule, schedule)


@pytest.mark.parametrize("experiment", ["cifar100_alternet50", "fig4_hessian_spectra", "table_models"])
def test_the_papers_experiments_use_the_strong_recipe(experiment: str) -> None:
    cfg, recipe = (composed("train", f"experiment={e}", "data=cifar100") for e in (experiment, "recipe_cifar_strong"))
    for group in ("objective", "optimizer", "trainer", "data"):
        assert cfg[group] == recipe[group], group
    assert cfg.model.drop_path == 0.1


@pytest.mark.parametrize(
    ("data", "mean", "std"),
    [
        ("cifar100", [0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761]),
        ("cifar10", [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
    ],
)
def test_normalization(data: str, mean: list[float], std: list[float]) -> None:
    cfg = composed("train", f"data={data}")
    assert (list(cfg.data.mean), list(cfg.data.std)) == (mean, std)


def test_the_cosine_is_held_within_an_epoch_after_a_warm_up_by_iteration() -> None:
    cfg = composed("train", "experiment=recipe_cifar_strong")
    steps = 469  # 45,000 images in batches of 96
    schedule: Any = OmegaConf.to_container(cfg.optimizer.schedule, resolve=True)

    def rate(step: int) -> float:
        return factor(step, steps_per_epoch=steps, total_epochs=305, **schedule)

    assert rate(0) == 1 / (5 * steps)
    assert rate(5 * steps - 1) == rate(5 * steps) == rate(6 * steps - 1) == 1
    for epoch in (1, 150, 299):
        expected = 0.5 * (1 + math.cos(math.pi * epoch / 300))
        first = (5 + epoch) * steps
        assert rate(first) == rate(first + steps - 1) == pytest.approx(expected, rel=1e-12)


def test_other_data_sets_keep_a_schedule_by_step_and_no_drop_path() -> None:
    cfg = composed("train")
    assert (cfg.model.drop_path, cfg.optimizer.schedule.per_epoch, cfg.trainer.gradient_clip_val) == (0.0, False, 5.0)

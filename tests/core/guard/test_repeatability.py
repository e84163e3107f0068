"""Networks and loaders that give something else at each pass are refused, or the card says so; nothing else is."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import vitscope as vs
from tests.fixtures.programs.processes import on_ranks
from vitscope.core.guard.repeatability import RandomOutputsWarning
from vitscope.runtime import progress


class Wrapped(nn.Module):
    """A function of a tensor as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Counter(nn.Module):
    """Answers by the number of passes it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return x * (1 + 0.01 * self.passes)


own_generator = torch.Generator().manual_seed(5)

RANDOM = {
    "dropout": lambda x: F.dropout(x, 0.3),  # functional: on in eval mode
    "noise": lambda x: x + 1e-9 * torch.randn_like(x),
    "python": lambda x: x * random.uniform(0.9, 1.1),
    "numpy": lambda x: x * float(np.random.uniform(0.9, 1.1)),
    "generator": lambda x: x + 0.01 * torch.randn(x.shape, generator=own_generator, dtype=x.dtype),
}


def network(middle: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Sequential(nn.Tanh(), middle), nn.Linear(5, 4)).double()


MEASURES = {
    "hessian_eigenvalues": lambda probe: vs.hessian_eigenvalues(probe, k=1, max_products=3),
    "hessian_trace": lambda probe: vs.hessian_trace(probe, n_vectors=2),
    "loss_landscape": lambda probe: vs.loss_landscape(probe, n=3),
    "loss_slice": lambda probe: vs.loss_slice(probe, n=3),
    "sharpness": lambda probe: vs.sharpness(probe, n_pairs=1, n_steps=1),
    "gradient": lambda probe: vs.loss_slice(probe, n=3, directions="gradient"),
}


@pytest.mark.parametrize("name", MEASURES)
def test_measures_of_the_loss_refuse_a_random_network(name: str, mlp_batches: list) -> None:
    model = network(Wrapped(RANDOM["dropout"]))
    with pytest.raises(ValueError, match=r"repeats itself.*2\.1 \(Wrapped\)"):
        MEASURES[name](vs.Probe(model, mlp_batches))


@pytest.mark.parametrize("kind", [*RANDOM, "counter"])
def test_every_source_of_randomness_is_named(kind: str, mlp_batches: list) -> None:
    middle = Counter() if kind == "counter" else Wrapped(RANDOM[kind])
    probe = vs.Probe(network(middle), mlp_batches)
    with pytest.raises(ValueError, match=rf"2\.1 \({type(middle).__name__}\)"), probe.guard(second_order=True):
        pytest.fail("entered")


def test_measures_of_accuracy_state_randomness_on_the_card(mlp_batches: list) -> None:
    probe = vs.Probe(network(Wrapped(RANDOM["dropout"])), mlp_batches)
    with pytest.warns(RandomOutputsWarning, match=r"2\.1 \(Wrapped\)"):
        found = vs.evaluation(probe)
    assert found.card.mode == "eval, random outputs of 2.1 (Wrapped)"
    steady = vs.evaluation(vs.Probe(network(nn.Dropout(0.3)), mlp_batches))
    assert steady.card.mode == "eval"
    assert "mode" in steady.card.differences(found.card)


@pytest.mark.filterwarnings("ignore:the outputs of Sequential for an image:UserWarning")
def test_networks_that_repeat_themselves_are_not_refused(mlp_batches: list) -> None:
    # one seed, but other numbers for other batch sizes, which is noticed
    def seeded(x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)

    # draws that do not show in the output, and randomness that the eval mode switches off
    for middle in (Wrapped(lambda x: x + 0 * torch.rand_like(x)), Wrapped(seeded), nn.Dropout(0.5), nn.RReLU()):
        assert np.isfinite(vs.loss_slice(vs.Probe(network(middle), mlp_batches), n=3).nll).all()


def test_rounding_alone_is_no_randomness(mlp_batches: list) -> None:
    order = iter([[0, 1, 2, 3, 4], [4, 2, 0, 3, 1]] * 50)

    def reordered_sum(x: Tensor) -> Tensor:
        index = next(order)
        return x + 1e-3 * sum((x[:, i : i + 1] for i in index[1:]), x[:, index[0] : index[0] + 1])

    with vs.Probe(network(Wrapped(reordered_sum)).float(), mlp_batches).guard(second_order=True) as model:
        assert not model.training  # entered: nothing was refused


@pytest.mark.parametrize("second_order", [False, True])
def test_two_evaluations_of_one_batch_and_the_same_random_states(
    second_order: bool, mlp: nn.Module, mlp_batches: list
) -> None:
    probe, passes = vs.Probe(mlp, mlp_batches), []
    handle = mlp.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    for _ in range(2):
        with probe.guard(second_order=second_order):
            assert torch.equal(before[0], torch.get_rng_state())
            assert random.getstate() == before[1]
    handle.remove()
    # two images tell which parameters the outputs depend on; the second time all is known
    assert passes == ([2, 4, 4] if second_order else [4, 4])
    assert np.random.get_state()[1].tolist() == before[2]


def test_the_check_holds_no_more_images_than_the_measure(mlp: nn.Module, mlp_batches: list) -> None:
    passes: list[int] = []
    handle = mlp.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    vs.hessian_eigenvalues(vs.Probe(mlp, mlp_batches), k=1, micro_batch=2, max_products=2)
    handle.remove()
    assert max(passes) == 2


class Augmented(Dataset):
    """Images that are flipped at random."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        x = torch.arange(6.0).reshape(1, 2, 3) + i
        return (x.flip(2) if random.random() < 0.5 else x), i % 4


def loaders() -> dict[str, DataLoader]:
    fixed = TensorDataset(torch.arange(48.0).reshape(8, 1, 2, 3), torch.arange(8) % 4)
    return {
        "shuffled": DataLoader(fixed, batch_size=4, shuffle=True),
        "augmented": DataLoader(Augmented(), batch_size=4),
        "both": DataLoader(Augmented(), batch_size=4, shuffle=True),
    }


@pytest.mark.parametrize("kind", ["shuffled", "augmented", "both"])
@pytest.mark.parametrize("measure", ["loss_landscape", "hessian_eigenvalues", "evaluation"])
def test_loaders_with_other_images_on_each_pass_are_refused(kind: str, measure: str, mlp: nn.Module) -> None:
    options = {"loss_landscape": {"n": 3}, "hessian_eigenvalues": {"k": 1}, "evaluation": {}}[measure]
    random.seed(0)
    with pytest.raises(ValueError, match=r"same batches on every pass, received other (images|targets).*shuffle=False"):
        getattr(vs, measure)(vs.Probe(mlp.float(), loaders()[kind]), **options)


def test_a_later_batch_that_changes_is_refused(mlp: nn.Module, mlp_batches: list) -> None:
    class Drifting:
        def __iter__(self):
            yield mlp_batches[0]
            yield mlp_batches[1][0] + random.random(), mlp_batches[1][1]

    probe = vs.Probe(mlp, Drifting())
    list(probe.iter_batches())
    with pytest.raises(ValueError, match="other images in batch 1 than"):
        list(probe.iter_batches())


def test_a_pass_of_another_length_is_refused(mlp: nn.Module, mlp_batches: list) -> None:
    class Shrinking:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(mlp_batches[: 4 - self.passes])

    probe = vs.Probe(mlp, Shrinking())
    list(probe.iter_batches())
    with pytest.raises(ValueError, match="received 2 after a pass of 3"):
        list(probe.iter_batches())


def test_a_plain_loader_and_a_list_are_the_same(mlp: nn.Module) -> None:
    loader = DataLoader(TensorDataset(torch.arange(48.0).reshape(8, 1, 2, 3), torch.arange(8) % 4), batch_size=4)
    mlp = mlp.float()
    assert vs.evaluation(vs.Probe(mlp, loader)).nll == vs.evaluation(vs.Probe(mlp, list(loader))).nll


class RandomOnOneRank(nn.Module):
    """Draws on rank 1 alone: only that rank can see it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1)) * (1.0 + dist.get_rank() * random.random())


def _refused_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    progress.enabled = False
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(3, 1, 2, 3, generator=generator, dtype=torch.float64), torch.arange(3)) for _ in range(3)]
    texts = []
    for measure in (
        lambda probe: vs.hessian_eigenvalues(probe, k=1),
        lambda probe: vs.loss_slice(probe, n=3),
    ):
        try:
            measure(vs.Probe(RandomOnOneRank(), batches))
            texts.append("no error")
        except ValueError as error:
            texts.append(str(error))
    # both ranks are still in step
    total = vs.evaluation(vs.Probe(nn.Sequential(nn.Flatten(), nn.Linear(6, 4)).double(), batches)).n_images
    torch.save({"texts": texts, "images": total}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_ranks_refuse_together(tmp_path: Path) -> None:
    on_ranks(_refused_rank, str(tmp_path))
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert found["images"] == 9
        assert all("repeats itself" in text and "RandomOnOneRank" in text for text in found["texts"])


class LaterOnly(nn.Module):
    """Draws random numbers on images other than the first batch's."""

    def __init__(self, first: Tensor, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.draw, self.generator = first, draw, np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        known = x.shape == self.first.shape and bool(torch.equal(x, self.first))
        known = known or x.shape[0] == 2  # the images by which the parameters' effects are found
        return x if known else self.draw(x)


def drawing_later(draw: Callable[[Tensor], Tensor], batches: list) -> nn.Module:
    torch.manual_seed(1)
    later = LaterOnly(batches[0][0].flatten(1), draw)
    return nn.Sequential(nn.Flatten(), later, nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()


@pytest.mark.parametrize("name", MEASURES)
def test_measures_of_the_loss_refuse_a_network_that_is_random_on_a_later_batch(name: str, mlp_batches: list) -> None:
    probe = vs.Probe(drawing_later(RANDOM["dropout"], mlp_batches), mlp_batches)
    with pytest.raises(ValueError, match=r"repeats itself.*1 \(LaterOnly\)"):
        MEASURES[name](probe)


@pytest.mark.parametrize("kind", RANDOM)
def test_every_source_of_randomness_on_a_later_batch_is_refused(kind: str, mlp_batches: list) -> None:
    model = drawing_later(RANDOM[kind], mlp_batches)
    if kind == "noise":  # 1e-9 of the images is above float64's rounding, and seen in the outputs alone
        with pytest.raises(ValueError, match="repeats itself"):
            vs.hessian_eigenvalues(vs.Probe(model, mlp_batches), k=1)
        return
    # a generator out of reach shows in the losses of later products
    with pytest.raises(ValueError, match="repeats itself"):
        vs.hessian_eigenvalues(vs.Probe(model, mlp_batches), k=1, max_products=5)


def test_a_module_s_own_generator_is_watched(mlp_batches: list) -> None:
    model = drawing_later(lambda x: x * model[1].generator.uniform(0.9, 1.1), mlp_batches)
    with pytest.raises(ValueError, match=r"repeats itself.*1 \(LaterOnly\)"):
        vs.loss_slice(vs.Probe(model, mlp_batches), n=3)


def test_accuracy_of_a_network_that_is_random_on_a_later_batch_is_stated(mlp_batches: list) -> None:
    with pytest.warns(RandomOutputsWarning, match=r"later pass.*model \(Sequential\)"):
        found = vs.evaluation(vs.Probe(drawing_later(RANDOM["dropout"], mlp_batches), mlp_batches))
    assert found.card.mode == "eval, random outputs of model (Sequential)"


def test_draws_on_a_later_batch_without_an_effect_are_no_randomness(mlp_batches: list) -> None:
    model = drawing_later(lambda x: x + 0 * torch.rand_like(x), mlp_batches)
    plain = drawing_later(lambda x: x, mlp_batches)
    found, expected = (vs.hessian_eigenvalues(vs.Probe(m, mlp_batches), k=1).eigenvalues for m in (model, plain))
    assert found.tolist() == expected.tolist()
    assert vs.loss_slice(vs.Probe(model, mlp_batches), n=3).nll.tolist() == (
        vs.loss_slice(vs.Probe(plain, mlp_batches), n=3).nll.tolist()
    )


def test_random_states_are_back_after_a_pass_was_repeated(mlp_batches: list) -> None:
    model = drawing_later(lambda x: x + 0 * torch.rand_like(x), mlp_batches)
    before = torch.get_rng_state()
    with vs.Probe(model, mlp_batches).guard(second_order=True):
        model(mlp_batches[1][0])
        once = torch.get_rng_state()
    torch.set_rng_state(before)
    torch.rand_like(mlp_batches[1][0])
    assert torch.equal(once, torch.get_rng_state())  # one draw, that of the measure's own pass

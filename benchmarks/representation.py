"""Cost of reading every tap beside the plain forward pass; memory does not grow with the number of images.

Each round times the forward pass alone (same guard, same batches) before and after each measure, in one process; the peers are
what the measures replace: a full FFT of every map as in the official notebook, and ``Tensor.var``. Times are those that the
processor spent in this process, so that other processes count as far as they slow memory and caches down. The number given is
the median over rounds of a measure's time divided by the mean of the two forward passes around it, and after it the ratio of
the shortest times of both, which other processes disturb least.

`effective_receptive_field` is compared with as many backward passes as it makes, one for each tap. A backward pass over the
images is a forward pass that keeps its graph, and the gradient of the sum of the model's outputs with respect to the images;
no gradient of a parameter is computed in either.

Claims: relative_log_amplitude <= 1.05, feature_map_variance <= 1.02; Fourier, variance, rank and CKA together, from one
forward pass (`vs.one_pass`, as ``analyze.py`` makes it for analyses of the same images), <= 1.3. Together with the numbers of
attention maps, token norms and oversmoothing <= 1.75 for a ViT-Ti at 224, and <= 1.85 with the maps and the gradient rollout of
one image, whose forward and backward pass cost 0.11 of the 32 images' pass however many there are. The receptive field <= 1.2
backward passes.

Of the 0.7 beyond the model, the explicit weights (scores and softmax beside the fused attention, whose bits the model keeps) cost
0.12, the logarithms and sums of entropies and the maps 0.10, mutual information, heads and layers 0.085, attention received 0.02;
token norms 0.08, CKA 0.06, Fourier 0.055, ranks 0.07 of which 0.025 are eigenvalues, variance 0.03, cosines of tokens 0.025.

What the last two add grows with more than the images: a Gram matrix takes batch * features products an image in float64 (at
batch 8, 46 million for ResNet-50 at 224 against 4.1 billion of its forward pass; at batch 128 sixteen times as many), a scatter
matrix positions * channels^2 / 2 once there are more vectors than channels, and its eigenvalues a time that does not depend on
the images.

    python benchmarks/representation.py [--models resnet50 vit_tiny_patch16_224] [--rounds 7] [--images 32] [--batch 8]
    python benchmarks/representation.py --memory          # peak memory of new processes with 4 and 16 batches
"""

from __future__ import annotations

import argparse
import functools
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator

import timm
import torch

import vitscope as vs
import vitscope.runtime.progress
from vitscope.core.undefined_values import NullWarning
from vitscope.models.structure.taps import reading

CLAIMS = {
    "relative_log_amplitude": 1.05,
    "feature_map_variance": 1.02,
    "all four in one pass": 1.30,
    "numbers of seven in one pass": 1.75,
    "and the maps of one image": 1.85,
    "effective_receptive_field": 1.20,
}
TOGETHER = ("relative_log_amplitude", "feature_map_variance", "effective_rank", "cka")
#: measures of attention and tokens, for models that have such
OF_TOKENS = {"attention_maps": {"images": 1}, "token_norms": {}, "oversmoothing": {}}


class Images:
    """Batches of noise made when they are read, the same on every pass: nothing is held between batches."""

    def __init__(self, n_batches: int, batch: int, size: int) -> None:
        self.n_batches, self.batch, self.size = n_batches, batch, size

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for index in range(self.n_batches):
            generator = torch.Generator().manual_seed(index)
            x = torch.randn(self.batch, 3, self.size, self.size, generator=generator)
            yield x, torch.zeros(self.batch, dtype=torch.long)


def probe_of(name: str, n_batches: int, batch: int, held: bool) -> vs.Probe:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    images = Images(n_batches, batch, model.default_cfg["input_size"][-1])
    return vs.Probe(model, list(images) if held else images)


def forward(probe: vs.Probe) -> None:
    with probe.guard() as model:
        for _, (x, _) in probe.local_batches():
            model(x)


def backward(probe: vs.Probe) -> None:
    with probe.guard(logits=False) as model:
        for p in model.parameters():
            p.requires_grad_(False)  # the guard gives the flags back
        for _, (x, _) in probe.local_batches():
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                torch.autograd.grad(model(x).sum(), x)


def peer(read: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[vs.Probe], None]:
    def run(probe: vs.Probe) -> None:
        sums: dict[int, torch.Tensor | float] = {}

        def add(index: int, tap: vs.Tap, x: torch.Tensor) -> None:
            sums[index] = sums.get(index, 0.0) + read(x)

        with probe.guard() as model, reading(model, probe.taps, add):
            for _, (x, _) in probe.local_batches():
                model(x)

    return run


def has_attention(probe: vs.Probe) -> bool:
    return any(unit.kind == "msa" for unit in vs.structure(probe.model).units)


def subjects(with_tokens: bool) -> dict[str, Callable[[vs.Probe], object]]:
    ours = {name: getattr(vs, name) for name in TOGETHER if name in vs.measures()}
    options = {name: {} for name in ours}
    tokens = {name: functools.partial(getattr(vs, name), **given) for name, given in OF_TOKENS.items() if with_tokens}
    numbers = options | OF_TOKENS | {"attention_maps": {"images": 0}}
    seven = {
        "numbers of seven in one pass": lambda probe: vs.one_pass(probe, numbers),
        "and the maps of one image": lambda probe: vs.one_pass(probe, options | OF_TOKENS),
    }
    return {
        **ours,
        **tokens,
        "all four in one pass": lambda probe: vs.one_pass(probe, options),
        **(seven if with_tokens else {}),
        "peer: full FFT": peer(lambda x: (torch.fft.fft2(x).abs() + 1e-6).log().mean((0, 1))),
        "peer: Tensor.var": peer(lambda x: x.var((-2, -1)).mean()),
    }


def timed(work: Callable[[vs.Probe], object], probe: vs.Probe) -> float:
    """Return the processor's seconds that ``work`` took in this process."""
    start = time.process_time()
    work(probe)
    return time.process_time() - start


class Ratios:
    """Times of a work divided by those of another before and after it, round by round."""

    def __init__(self, work: Callable[[vs.Probe], object], base: Callable[[vs.Probe], object]) -> None:
        self.work, self.base = work, base
        self.ratios: list[float] = []
        self.shortest, self.shortest_base = float("inf"), float("inf")

    def add(self, probe: vs.Probe) -> None:
        """Time one round."""
        before, seconds, after = (timed(each, probe) for each in (self.base, self.work, self.base))
        self.ratios.append(2 * seconds / (before + after))
        self.shortest = min(self.shortest, seconds)
        self.shortest_base = min(self.shortest_base, before, after)

    def show(self, name: str, unit: str = "x", n_base: int = 1) -> None:
        """Print median and spread of the ratios to ``n_base`` times the other work, and the ratio of the shortest times."""
        ratios = [ratio / n_base for ratio in self.ratios]
        spread = f"({min(ratios):.3f} to {max(ratios):.3f}, n = {len(ratios)})"
        shortest = self.shortest / self.shortest_base / n_base
        claim = f", claimed <= {CLAIMS[name]:.2f}" if name in CLAIMS else ""
        print(f"  {name:29s} {statistics.median(ratios):.3f} {unit} {spread}, of the shortest {shortest:.3f}{claim}")


def compare(name: str, rounds: int, images: int, batch: int, only: str) -> None:
    probe = probe_of(name, max(1, images // batch), batch, held=True)
    works = {key: work for key, work in subjects(has_attention(probe)).items() if only in key}
    n_backward = vs.effective_receptive_field(probe).n_backward
    for work in (forward, backward, *works.values()):
        work(probe)
    ratios = {key: Ratios(work, forward) for key, work in works.items()}
    fields = Ratios(vs.effective_receptive_field, backward)
    for _ in range(rounds):
        for each in (*ratios.values(), fields):
            each.add(probe)
    plain = min((each.shortest_base for each in ratios.values()), default=float("nan"))
    print(f"{name}: {probe.n_images} images, batch {batch}, {torch.get_num_threads()} thread(s), ", end="")
    print(f"forward at least {plain:.3f} s of the processor")
    for key, each in ratios.items():
        each.show(key)
    fields.show("effective_receptive_field", f"x of {n_backward} backward pass(es)", n_backward)


def peak(model: str, n_batches: int, batch: int) -> None:
    probe = probe_of(model, n_batches, batch, held=False)
    of_tokens = OF_TOKENS if has_attention(probe) else {}
    for name, options in ({key: {} for key in TOGETHER} | of_tokens).items():
        getattr(vs, name)(probe, **options)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def memory(name: str, batch: int) -> None:
    found = []
    for n_batches in (4, 16):
        command = [sys.executable, __file__, "--peak", str(n_batches), "--models", name, "--batch", str(batch)]
        found.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    print(f"{name}: peak memory {found[0]:.0f} MB with 4 batches of {batch}, {found[1]:.0f} MB with 16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50", "vit_tiny_patch16_224"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="measures with this text in their names")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of times")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    vitscope.runtime.progress.enabled = False
    warnings.simplefilter("ignore", NullWarning)  # fewer images than intervals need
    for name in arguments.models:
        if arguments.peak:
            peak(name, arguments.peak, arguments.batch)
        elif arguments.memory:
            memory(name, arguments.batch)
        else:
            compare(name, arguments.rounds, arguments.images, arguments.batch, arguments.only)


if __name__ == "__main__":
    main()

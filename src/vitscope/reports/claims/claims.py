"""The paper's claims as data: statements and the statistics that test them (docs/definitions.md section 10)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vitscope.reports.claims import claim_statistics as by
from vitscope.reports.claims.best_models import CNNS, VITS, best_model_difference
from vitscope.reports.claims.effect_sizes import Effect, ReportRuns
from vitscope.reports.claims.matched_controls import flattening

SPECTRUM = by.SPECTRUM


@dataclass(frozen=True)
class ClaimStatistic:
    """One statistic of a claim.

    Attributes:
        name: Compared quantities, in words.
        sign: Sign of the effect that the claim predicts, 1 or -1.
        measure: Function that computes the effect of each seed.
        unit: Unit of the effect.
    """

    name: str
    sign: int
    measure: Callable[[ReportRuns], Effect]
    unit: str = ""


@dataclass(frozen=True)
class Claim:
    """One claim: true where all its parts are.

    Attributes:
        name: Key of the claim.
        statement: The paper's statement.
        figure: Figures of the paper that show it.
        statistic: Description of the test.
        runs: Trainings and analyses that the test needs.
        parts: The statistics.
    """

    name: str
    statement: str
    figure: str
    statistic: str
    runs: str
    parts: tuple[ClaimStatistic, ...]


def _flat(control: str, matched: str) -> tuple[ClaimStatistic, ClaimStatistic]:
    names = {"cost": "control of equal cost", "conv": "convolution", "uniform": "uniform attention", "blur": "blur"}
    condition = f"against {names[control]}, at matched {'NLL' if matched == 'nll' else matched}"

    def ape(report_runs: ReportRuns) -> Effect:
        return flattening(
            report_runs, SPECTRUM, "average_positive_eigenvalue", control=control, matched=matched, log=True
        )

    def rise(report_runs: ReportRuns) -> Effect:
        return flattening(report_runs, "sharpness", "rise_r0.1", control=control, matched=matched, log=False)

    return (
        ClaimStatistic(f"log APE {condition}", -1, ape, "ln"),
        ClaimStatistic(f"sharpness at r=.1 {condition}", -1, rise, "nats"),
    )


def _kind(measure: str, scalar: str, sign: int, name: str, *, differenced: bool = False) -> ClaimStatistic:
    def effect(report_runs: ReportRuns) -> Effect:
        return by.mean_by_kind(
            report_runs, measure, scalar, by.has_initial_reference(report_runs) if differenced else None
        )

    return ClaimStatistic(name, sign, effect, "ln")


def _data(quantity: str, fixed: str) -> ClaimStatistic:
    def effect(report_runs: ReportRuns) -> Effect:
        if quantity == "NEP":
            return by.data_trend(report_runs, report_runs.scalar(*by.NEP), -1, fixed=fixed, requirement="hessian")
        if quantity == "test error":
            return by.data_trend(report_runs, by.test_error(report_runs), -1, fixed=fixed, requirement="test accuracy")
        return by.data_trend(
            report_runs,
            by.training_nll(report_runs),
            -1,
            fixed=fixed,
            requirement="sharpness or slice on training images",
        )

    unit = "nats per e-fold" if quantity == "training NLL" else "share per e-fold"
    return ClaimStatistic(f"slope of {quantity} over ln(data fraction), fixed {fixed}", -1, effect, unit)


def _accuracy(families: tuple[str, ...], rival: str, corrupted: bool) -> ClaimStatistic:
    def effect(report_runs: ReportRuns) -> Effect:
        clean, robust = report_runs.metric("test/accuracy"), report_runs.scalar("corruption", "mean_accuracy")
        requirement = "corruption" if corrupted else "test accuracy"
        return best_model_difference(report_runs, families, robust if corrupted else clean, requirement)

    return ClaimStatistic(f"{'corrupted' if corrupted else 'test'} accuracy against {rival}", 1, effect, "share")


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "msa_flattens",
        "MSA flattens the loss landscape",
        "1a, 1c, 4, 12c",
        "paired log APE and sharpness at r=.1, AlterNet minus controls, at matched epoch and at matched training NLL",
        "AlterNet, a control of equal parameters and FLOPs, and mixer=conv, uniform, blur; hessian and sharpness, also at "
        "several epochs",
        (
            *_flat("cost", "epoch"), *_flat("cost", "nll"), *_flat("conv", "epoch"), *_flat("conv", "nll"),
            *_flat("uniform", "epoch"), *_flat("uniform", "nll"), *_flat("blur", "epoch"), *_flat("blur", "nll"),
        ),
    ),
    Claim(
        "weak_bias_negatives",
        "Weak inductive bias brings negative Hessian eigenvalues",
        "4, 7b",
        "trend of NEP over ViT → PiT → Swin → ResNet, and over local kernels 3 → 5 → global",
        "vit, pit, swin, convnet in one setting; convit with kernel_size 3, 5, global; hessian",
        (
            ClaimStatistic("slope of NEP from weak to strong bias", -1, by.bias_trend, "share per model"),
            ClaimStatistic("slope of NEP from local to global", 1, by.kernel_trend, "share per kernel"),
        ),
    ),
    Claim(
        "data_removes_negatives",
        "More data removes negative Hessian eigenvalues",
        "4",
        "trend of NEP over the data fraction, at fixed epochs and at fixed steps",
        "vit at three or more data.fraction, once with equal max_epochs, once with equal max_steps and warmup_steps; hessian",
        (_data("NEP", "epochs"), _data("NEP", "steps")),
    ),
    Claim(
        "less_data_no_overfit",
        "With less data the error and the training NLL of ViT both rise: it does not overfit",
        "5b",
        "trends of test error and training NLL over the data fraction, at fixed epochs and at fixed steps",
        "as data_removes_negatives, with sharpness or slice on training images",
        (
            _data("test error", "epochs"), _data("test error", "steps"),
            _data("training NLL", "epochs"), _data("training NLL", "steps"),
        ),
    ),
    Claim(
        "msa_low_pass",
        "MSAs are low-pass filters, convolutions and MLPs high-pass filters",
        "2a, 8",
        "branch transfer, high third minus low third of the frequencies, trained minus initial, by kind of unit",
        "models with MSA, convolution and MLP units; branch_transfer",
        (
            _kind("branch_transfer", "contrast_msa", -1, "contrast of MSA", differenced=True),
            _kind("branch_transfer", "contrast_conv", 1, "contrast of convolutions", differenced=True),
            _kind("branch_transfer", "contrast_mlp", 1, "contrast of MLPs", differenced=True),
        ),
    ),
    Claim(
        "msa_variance",
        "MSAs lower the variance of feature maps, convolutions and MLPs raise it",
        "9",
        "log ratio of the variance after and before each unit, by kind",
        "models with MSA, convolution and MLP units; variance",
        (
            _kind("feature_map_variance", "log_variance_ratio_msa", -1, "log ratio of MSA"),
            _kind("feature_map_variance", "log_variance_ratio_conv", 1, "log ratio of convolutions"),
            _kind("feature_map_variance", "log_variance_ratio_mlp", 1, "log ratio of MLPs"),
        ),
    ),
    Claim(
        "noise_bands",
        "ViT is robust to high-frequency noise, ResNet to low-frequency noise",
        "2b",
        "interaction of model and band (high minus low), drop in accuracy over clean minus chance, equal rms in each band",
        "vit and convnet in one setting; frequency_noise",
        (ClaimStatistic("drop in high minus low bands, ViT minus ResNet", -1, by.noise_interaction, "of clean − chance"),),
    ),
    Claim(
        "stage_end_msa",
        "MSAs at the end of a stage matter most",
        "10b, 11, 12a",
        "NLL lost with the stage's last MSA minus its other MSAs (lesion), and accuracy of placements at equal parameters",
        "models with two MSAs in a stage, with lesion; AlterNet with placement=stage_end and another",
        (
            ClaimStatistic("NLL change of the last MSA minus the others of its stage", 1,
                 lambda b: by.mean_by_kind(b, "lesion", "stage_end_msa_nll_excess", by.has_stages(b, "lesion")), "nats"),
            ClaimStatistic("accuracy with MSA at stage ends minus elsewhere", 1, by.placement_difference, "share"),
        ),
    ),
    Claim(
        "blocks_by_stage",
        "Multi-stage networks have representations in blocks, one a stage",
        "10a",
        "CKA of pairs at equal distance in depth, within minus across stage boundaries",
        "models with several stages; cka",
        (
            ClaimStatistic("CKA within minus across stages", 1,
                           lambda b: by.mean_by_kind(b, "cka", "block_structure", by.has_stages(b, "cka")), "CKA"),
        ),
    ),
    Claim(
        "local_beats_global",
        "Local attention beats global attention",
        "7",
        "test accuracy and NEP of local minus global attention, the same code with GAP, no class token and equal patches",
        "convit with kernel_size 3, 5, global; hessian",
        (
            ClaimStatistic("test accuracy of 5×5 minus global", 1,
                 lambda b: by.kernel_difference(b, b.metric("test/accuracy"), 5, "test accuracy"), "share"),
            ClaimStatistic("test accuracy of 3×3 minus global", 1,
                 lambda b: by.kernel_difference(b, b.metric("test/accuracy"), 3, "test accuracy"), "share"),
            ClaimStatistic("NEP of 5×5 minus global", -1,
                 lambda b: by.kernel_difference(b, b.scalar(*by.NEP), 5, "hessian"), "share"),
        ),
    ),
    Claim(
        "alternet_wins",
        "AlterNet is more accurate and more robust than ConvNets and ViTs",
        "12b",
        "test accuracy and accuracy on corrupted images, each model at its best recipe by validation accuracy",
        "alternet, convnet and vit, each at two or more recipes; corruption",
        (
            _accuracy(CNNS, "the best ConvNet", False), _accuracy(VITS, "the best ViT", False),
            _accuracy(CNNS, "the best ConvNet", True), _accuracy(VITS, "the best ViT", True),
        ),
    ),
)  # fmt: skip

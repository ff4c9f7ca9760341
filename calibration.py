"""Whether a network is right as often as it says."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from utils import ORIGINAL, TRAIN


def expected_calibration_error(log_probs: Tensor, labels: Tensor, bins: int = 15) -> float:
    """In percent: how far confidence is from accuracy, over bins of equal width, weighted by their images.

    Naeini et al., 2015; Guo et al., 2017.

    Args:
        log_probs: (N, classes), natural.
        labels: (N,), the true classes.
        bins: Of the confidence, from 0 to 1.
    """
    return 100 * sum(
        share * abs(accuracy - confidence) for _, confidence, accuracy, share in _bins(log_probs, labels, bins)
    )


def plot_reliability(log_probs: Tensor, labels: Tensor, bins: int = 15) -> Figure:
    """Accuracy against confidence in each bin; on the diagonal, answers are right as often as the network says."""
    centre, confidence, accuracy, share = zip(*_bins(log_probs, labels, bins), strict=True)
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(5, 5.6), height_ratios=(3, 1), sharex=True, layout="constrained"
    )
    upper.plot([0, 1], [0, 1], color=ORIGINAL, linestyle="--", linewidth=1, label="as often right as it says")
    upper.plot(confidence, accuracy, color=TRAIN, marker="o", label="the network")
    error = expected_calibration_error(log_probs, labels, bins)
    upper.set(ylabel="share of right answers", ylim=(0, 1.02), title=f"Expected calibration error {error:.1f} %")
    upper.legend(frameon=False)
    lower.bar(centre, share, width=0.9 / bins, color=TRAIN)
    lower.set(xlabel="probability of the answer", ylabel="share of images", xlim=(0, 1))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    plt.close(figure)
    return figure


def _bins(log_probs: Tensor, labels: Tensor, bins: int) -> list[tuple[float, float, float, float]]:
    """Centre, mean confidence, accuracy and share of the images of each bin of the confidence that has any."""
    confidence, answers = log_probs.exp().max(1)
    right = (answers == labels).float()
    which = (confidence * bins).long().clamp(max=bins - 1)
    return [
        ((k + 0.5) / bins, confidence[inside].mean().item(), right[inside].mean().item(), inside.float().mean().item())
        for k in range(bins)
        if (inside := which == k).any()
    ]

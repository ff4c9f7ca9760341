"""Probabilities that are right as often as they say."""

from torch import Tensor


def temperature_of(log_probs: Tensor, labels: Tensor) -> float:
    """The number by which to divide the logits so that these labels become most likely (Guo et al., 2017).

    The predicted classes stay as they are, but for rounding; above 1, the probabilities come nearer to each other. Find
    it on images that the network was not trained on, and judge the result on others again.

    A right prediction counts as a little uncertain, by 1 / (N + 2), so that a few images without a mistake do not make
    a network certain of everything (J. Platt, 1999).

    Args:
        log_probs: float (N, classes), as `train.predict` returns them.
        labels: int64 (N,).

    Returns:
        The temperature, from 0.05 to 20; 1 if there is one class.

    Raises:
        ValueError: There are no images, or a log-probability is infinite or NaN.
    """
    logits = log_probs.double()
    count, classes = logits.shape
    if not count or not logits.isfinite().all():
        raise ValueError(
            f"expected finite log-probabilities of at least one image, got {count} images, "
            f"{(~logits.isfinite()).sum()} values infinite or NaN"
        )
    if classes == 1:
        return 1.0
    right, doubt = logits.gather(1, labels[:, None]).squeeze(1), 1 / (count + 2)
    target = (1 - doubt) * right + doubt * (logits.sum(1) - right) / max(1, classes - 1)
    low, high = 0.05, 20.0  # of the temperature's inverse, in which the loss is convex
    for _ in range(50):
        middle = (low * high) ** 0.5
        slope = ((middle * logits).softmax(1) * logits).sum() - target.sum()
        low, high = (low, middle) if slope > 0 else (middle, high)
    return 1 / (low * high) ** 0.5

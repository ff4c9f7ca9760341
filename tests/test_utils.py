"""The pictures: figures that say what they show, returned and never shown."""

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from dataset import AUGMENTATIONS, CIFAR10, denormalize
from model import Net, receptive_field
from utils import (
    expected_calibration_error,
    per_class_accuracy,
    plot_architecture,
    plot_attention,
    plot_augmentations,
    plot_confusion,
    plot_curves,
    plot_misclassified,
    plot_per_class,
    plot_reliability,
    plot_samples,
    show_summary,
)


@pytest.fixture
def test_set() -> CIFAR10:
    return CIFAR10(train=False)


@pytest.fixture
def log_probs(test_set) -> torch.Tensor:
    """Right everywhere but for images 3 (fairly sure of class 8) and 7 (surer of class 0)."""
    probs = torch.full((len(test_set), 10), 0.01)
    probs[torch.arange(len(test_set)), test_set.labels] = 0.91
    for image, answer, p in ((3, 8, 0.6), (7, 0, 0.8)):
        probs[image] = (1 - p) / 9
        probs[image, answer] = p
    return probs.log()


def history(data: str = "cifar10", tested_on: str = "test") -> dict[str, list]:
    rows: dict[str, list] = {"epoch": [1, 2], "train_loss": [1.0, 0.5], "test_loss": [1.1, 0.7], "lr": [0.2, 0.1]}
    rows |= {"train_accuracy": [50.0, 80.0], "test_accuracy": [45.0, 75.5]}
    return rows | {"data": [data] * 2, "tested_on": [tested_on] * 2}


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(plt.Text))


def test_every_plot_returns_a_figure_that_pyplot_does_not_hold(test_set, log_probs, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda *args, **kwargs: pytest.fail("show() was called"))
    figures = [
        plot_curves(history()),
        plot_samples(test_set),
        plot_augmentations(test_set),
        plot_misclassified(test_set, log_probs),
        plot_confusion(log_probs, test_set.labels, test_set.classes),
        plot_per_class(log_probs, test_set.labels, test_set.classes),
        plot_reliability(log_probs, test_set.labels),
        plot_attention(test_set, log_probs, net := Net(), net.c4),
    ]
    assert all(isinstance(figure, Figure) for figure in figures)
    assert plt.get_fignums() == []


def test_curves_share_axes_and_name_units():
    figure = plot_curves(history())
    loss, accuracy, _ = figure.axes
    assert [list(line.get_ydata()) for line in loss.lines] == [[1.0, 0.5], [1.1, 0.7]]
    assert [list(line.get_ydata()) for line in accuracy.lines[:2]] == [[50.0, 80.0], [45.0, 75.5]]
    for part in ("nats", "accuracy (%)", "epoch", "75.50 %", "original, 73.20 %"):
        assert part in texts(figure)


def test_curves_of_synthetic_images_say_so_and_are_not_compared_with_the_original():
    shown = texts(plot_curves(history("synthetic")))
    assert "synthetic" in shown
    assert "73.20" not in shown


def test_curves_on_held_out_images_do_not_pass_for_the_test_set():
    shown = texts(plot_curves(history(tested_on="held-out")))
    assert "held-out, 75.50 %" in shown
    assert "73.20" not in shown
    assert "test" not in shown


def test_samples_show_each_class(test_set):
    figure = plot_samples(test_set)
    pictures = [axes.images[0].get_array() for axes in figure.axes]
    assert len(pictures) == 80
    for name in test_set.classes:
        assert name in texts(figure)


def test_misclassified_shows_only_mistakes_the_most_confident_first(test_set, log_probs):
    figure = plot_misclassified(test_set, log_probs)
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in shown] == ["horse → plane (0.80)", "cat → ship (0.60)"]
    assert (shown[0].images[0].get_array() == test_set.images[7].numpy()).all()
    assert "2 of 100 wrong" in texts(figure)


def test_confusion_and_per_class_accuracy_count(test_set, log_probs):
    accuracy = per_class_accuracy(log_probs, test_set.labels, test_set.classes)
    assert accuracy == {name: pytest.approx(90 if name in ("cat", "horse") else 100) for name in test_set.classes}
    figure = plot_confusion(log_probs, test_set.labels, test_set.classes)
    counts = [int(text.get_text()) for text in figure.axes[0].texts]
    assert sum(counts) == 100
    assert counts[3 * 10 + 8] == counts[7 * 10] == 1


def test_augmentations_are_shown_one_by_one_and_together_as_training_draws_them():
    train_set = CIFAR10(augment=("crop", "flip"))
    figure = plot_augmentations(train_set, ("crop", "flip"), index=3)
    shown = [axes.images[0].get_array() for axes in figure.axes]
    assert len(shown) == 8 * (len(AUGMENTATIONS) + 1)
    for name in (*AUGMENTATIONS, "crop\nflip", "as it is", "epoch 7"):
        assert name in texts(figure)
    assert all((picture == train_set.images[3].numpy()).all() for picture in shown[::8])
    drawn = denormalize(torch.stack([train_set[epoch, 3][0] for epoch in range(7)]))
    assert (torch.tensor(drawn).numpy() == shown[-7:]).all()


def test_attention_is_where_the_score_comes_from(test_set):
    class UpperLeft(nn.Module):
        """Scores class 0 by how bright the upper left quarter is, the others by nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.maps = nn.Conv2d(3, 1, 1, bias=False)
            nn.init.ones_(self.maps.weight)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            maps = self.maps(images).exp()  # (N, 1, 32, 32)
            corner = torch.zeros_like(maps)
            corner[:, :, :16, :16] = 1
            score = (maps * corner).sum((1, 2, 3))
            return torch.stack([score, *[torch.zeros_like(score)] * 9], 1)

    net = UpperLeft()
    test_set.images[:] = 100
    test_set.images[:, :16, :16] = 250
    log_probs = net(torch.stack([image for image, _ in test_set])).log_softmax(1)
    figure = plot_attention(test_set, log_probs, net, net.maps)
    for_the_answer, for_the_truth, right = (figure.axes[at].images[0].get_array() for at in (10, 20, 40))
    for lit in (for_the_answer, right):
        assert lit[:15, :15].min() > 190
        assert lit[17:, 17:].max() < 40
    assert for_the_truth.max() < 40  # nothing speaks for the truth
    assert "(0 %)" in figure.axes[20].get_title()


def test_attention_shows_what_speaks_for_the_truth_on_its_own_scale_and_how_strong_it_is(test_set):
    class Halves(nn.Module):
        """Scores every class by the upper half and class 0 also, three times as strongly, by the lower half."""

        def __init__(self) -> None:
            super().__init__()
            self.maps = nn.Conv2d(3, 1, 1, bias=False)
            nn.init.ones_(self.maps.weight)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            maps = self.maps(images).exp()
            upper, lower = maps[:, :, :16].sum((1, 2, 3)), maps[:, :, 16:].sum((1, 2, 3))
            return torch.stack([upper + 3 * lower, *[upper] * 9], 1)

    net = Halves()
    test_set.images[:] = 200
    log_probs = net(torch.stack([image for image, _ in test_set])).log_softmax(1)
    figure = plot_attention(test_set, log_probs, net, net.maps)
    for_the_answer, for_the_truth = (figure.axes[at].images[0].get_array() for at in (10, 20))
    assert for_the_answer.max() == for_the_truth.max() == 200
    assert figure.axes[20].get_title().endswith("(25 %)")  # mean slopes of (1 + 0) / 2 and (1 + 3) / 2


def test_attention_shows_mistakes_with_both_classes_and_right_answers_and_disturbs_nothing(test_set, log_probs):
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    figure = plot_attention(test_set, log_probs, net, net.c4)
    titles = [[axes.get_title() for axes in figure.axes[10 * row : 10 * row + 10]] for row in range(5)]
    assert [row[:3] for row in titles[:2]] == [["horse", "cat", ""], ["plane", "ship", ""]]
    assert [title.partition(" (")[0] for title in titles[2][:3]] == ["horse", "cat", ""]
    assert titles[3] == titles[4] == list(test_set.classes)
    assert [sum(bool(axes.images) for axes in figure.axes[10 * row : 10 * row + 10]) for row in range(5)] == [
        *(2, 2, 2, 10, 10)
    ]
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_attention_without_mistakes_or_without_right_answers_still_shows_the_rest(test_set):
    net = Net()
    sure = 20.0 * nn.functional.one_hot(test_set.labels, 10)
    for scores, pictures in ((sure, 20), (-sure, 30)):
        figure = plot_attention(test_set, scores.log_softmax(1), net, net.c4)
        assert sum(bool(axes.images) for axes in figure.axes) == pictures


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    labels = torch.arange(100) % 2
    probs = torch.full((100, 2), 0.3)
    probs[torch.arange(100), labels] = 0.7
    probs[:20] = probs[:20].flip(1)  # 80 % right, 70 % sure
    assert expected_calibration_error(probs.log(), labels) == pytest.approx(10, abs=1e-3)
    assert "10.0 %" in texts(plot_reliability(probs.log(), labels))
    sure = nn.functional.one_hot(labels, 2).float().clamp(min=1e-9)
    assert expected_calibration_error(sure.log(), labels) == pytest.approx(0, abs=1e-3)


def test_summary_counts_and_disturbs_nothing(capsys):
    net = Net()
    before, random_state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    assert show_summary(net) == 2_034_040
    assert "Total params: 2,034,040" in capsys.readouterr().out
    assert net.training
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_picture_of_the_architecture_is_drawn_from_the_network():
    net = Net()
    (axes,) = plot_architecture(net).axes
    texts = [text.get_text() for text in axes.texts]
    for name in ("c1", "c2", "c3", "c4"):
        count = sum(p.numel() for p in net.get_submodule(name).parameters())
        field = receptive_field(net)[name]
        assert f"{name.upper()}: {count:,} parameters\nreceptive field {field}×{field} px" in texts
    outputs = [text for text in texts if text.endswith(("31×31", "16×16", "8×8", "4×4"))]
    convolutions = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    assert [int(text.split("\n")[0]) for text in outputs] == [conv.out_channels for conv in convolutions]
    assert net.training


def test_the_confusion_matrix_needs_a_name_for_each_output():
    with pytest.raises(ValueError, match="must name the 5 outputs of the network, got 3 names"):
        plot_confusion(torch.zeros(4, 5), torch.arange(4), ["a", "b", "c"])

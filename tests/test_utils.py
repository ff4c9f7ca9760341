"""The figures: right in any style, for any classes, and for the images that the predictions are of."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import Subset

import utils
from dataset import AUGMENTATIONS, CIFAR10, CLASSES, Images
from model import Net, receptive_field

AWKWARD = ("$5 or $6", "US$", "a_b^c", "b$$c", r"\frac", "%d{x}", "猫", "a very long name of a class, indeed")


def images_of(classes: tuple[str, ...], absent: int | None = None) -> tuple[Images, torch.Tensor]:
    """Random images of these classes, but of `absent`, and predictions of which some are wrong."""
    draw = torch.Generator().manual_seed(1)
    labels = torch.arange(3 * len(classes)) % len(classes)
    labels[labels == absent] = 0
    scores = torch.randn(len(labels), len(classes), generator=draw) + 3 * nn.functional.one_hot(labels, len(classes))
    pixels = torch.randint(256, (len(labels), 32, 32, 3), generator=draw, dtype=torch.uint8)
    return Images(pixels, labels, classes), scores.log_softmax(1)


def history(data: str = "cifar10", tested_on: str = "test", epochs: int = 2) -> dict[str, list]:
    names = "train_loss", "test_loss", "train_accuracy", "test_accuracy", "lr"
    quantities: dict[str, list] = dict.fromkeys(names, [0.5] * epochs)
    return quantities | {"epoch": [*range(1, epochs + 1)], "data": [data] * epochs, "tested_on": [tested_on] * epochs}


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(plt.Text)]


def pictures(figure: Figure) -> list:
    return [image.get_array() for image in figure.axes[0].images]


@pytest.mark.filterwarnings("ignore:Glyph")  # there may be no font with Chinese letters
@pytest.mark.parametrize("classes", [("only",), AWKWARD], ids=len)
def test_figures_take_any_number_and_names_of_classes_in_a_dark_style(classes):
    dataset, log_probs = images_of(classes, absent=1)
    labels, net = dataset.labels, Net(len(classes))
    with plt.style.context("dark_background"):
        figures = [plot(log_probs, labels, classes) for plot in (utils.plot_per_class, utils.plot_confusion)]
        figures += [utils.plot_samples(dataset), utils.plot_misclassified(dataset, log_probs, labels)]
        figures += [utils.plot_reliability(log_probs, labels), utils.plot_curves(history())]
        figures += [utils.plot_attention(dataset, log_probs, labels, net, net.c4), utils.plot_architecture(net)]
    for figure in figures:
        grounds = {to_rgba(figure.get_facecolor()), *(to_rgba(axes.get_facecolor()) for axes in figure.axes)}
        assert grounds == {to_rgba("black")}
        for text in figure.findobj(plt.Text):
            assert to_rgba(text.get_color()) == to_rgba("white")
            assert not (text.get_parse_math() and set("$_^\\") & set(text.get_text()))
    named = "\n".join(texts(figures[0]))
    assert all((name[:20] in named) == (k != 1) for k, name in enumerate(classes))  # and none of the absent class
    assert plt.get_fignums() == []
    figures[1].savefig(io.BytesIO(), dpi=30)


def test_figures_of_a_hundred_classes_stay_readable():
    dataset, log_probs = images_of(tuple(f"class {k}" for k in range(100)))
    assert len(pictures(utils.plot_samples(dataset))) == 60  # three of each of 20 classes
    assert not utils.plot_confusion(log_probs, dataset.labels, dataset.classes).axes[0].texts
    assert len(utils.plot_per_class(log_probs, dataset.labels, dataset.classes).axes[0].get_yticks()) == 30


def test_predictions_of_other_images_are_refused():
    dataset, log_probs = images_of(CLASSES)
    labels, net = dataset.labels, Net()
    others = [(dataset, log_probs, labels.flip(0)), (dataset, log_probs[:20], labels[:20])]
    others += [(dataset, log_probs[:, :5], labels), (Subset(dataset, range(30)), log_probs, labels)]
    for given in others:
        with pytest.raises(ValueError, match=r"labels|log_probs|dataset"):
            utils.plot_misclassified(*given)
        with pytest.raises(ValueError, match=r"labels|log_probs|dataset"):
            utils.plot_attention(*given, net, net.c4)
    for plot in (utils.plot_confusion, utils.plot_per_class):
        with pytest.raises(ValueError, match=r"\(30 labels, 2 classes\), got \(30, 10\)"):
            plot(log_probs, labels, CLASSES[:2])


def test_curves_name_first_and_last_epoch_and_compare_only_on_the_test_set_of_cifar10():
    figure = utils.plot_curves(history(epochs=22), "Muon learning rate")
    for axes in figure.axes:
        assert {1, 22} <= set(axes.get_xticks())
    assert [axes.get_ylabel() for axes in figure.axes][1:] == ["accuracy (%)", "Muon learning rate"]
    assert "73.20" in "".join(texts(figure))
    for other in (history("synthetic"), history("/folder"), history(tested_on="held-out")):
        assert "73.20" not in "".join(texts(utils.plot_curves(other)))


def test_misclassified_shows_the_most_confident_mistakes_with_both_probabilities():
    dataset, _ = images_of(CLASSES)
    probs = torch.full((30, 10), 0.01)
    probs[torch.arange(30), dataset.labels] = 0.91
    probs[3, 8], probs[3, 3] = 0.91, 0.01
    probs[7, 0], probs[7, 7] = 0.9185, 0.0015
    figure = utils.plot_misclassified(dataset, probs.log(), dataset.labels)
    titles = [text for text in texts(figure) if "→" in text]
    assert titles == ["horse → plane\n0.9185 (horse 0.0015)", "cat → ship\n0.9100 (cat 0.01)"]
    assert [shown.tolist() for shown in pictures(figure)] == [dataset.images[i].tolist() for i in (7, 3)]
    right = utils.plot_misclassified(dataset, nn.functional.one_hot(dataset.labels, 10).log(), dataset.labels)
    assert (len(right.axes), pictures(right)) == (1, [])  # a run may have no mistakes
    confusion = utils.plot_confusion(probs.log(), dataset.labels, CLASSES)
    counts = [int(text.get_text()) for text in confusion.axes[0].texts]
    assert (sum(counts), counts[3 * 10 + 8], counts[7 * 10]) == (30, 1, 1)


def test_each_augmentation_is_shown_at_work_as_the_dataset_draws_it():
    dataset = CIFAR10(augment=("crop", "cutout"))
    dataset.mean, dataset.std = (0.3, 0.4, 0.5), (0.2, 0.3, 0.4)  # as of a set of one's own
    figure = utils.plot_augmentations(dataset, 3)
    shown, original = pictures(figure), dataset.images[3].numpy()
    starts = [k for k, picture in enumerate(shown) if (picture == original).all()]  # of the rows; no other is unchanged
    assert (shown[starts[1] + 1] == original[:, ::-1]).all()  # flipped, and denormalised by the dataset's own numbers
    changes = np.diff([*starts, len(shown)]) > 1  # of each row, whether there are any
    assert changes.tolist() == [True] * (len(AUGMENTATIONS) + 1)


def test_attention_is_where_the_score_comes_from_and_disturbs_nothing():
    dataset, _ = images_of(CLASSES)
    dataset.images[:] = 100
    dataset.images[:, :16, :16] = 250
    net = nn.Sequential(nn.Conv2d(3, 1, 1, bias=False), nn.Flatten(), nn.Linear(1024, 10))
    nn.init.ones_(net[0].weight)
    net[2].weight.data = torch.eye(10)[:, :1].repeat(1, 1024)  # only class 0 is scored, by brightness
    log_probs = net(torch.stack([image for image, _ in dataset])).log_softmax(1)
    figure = utils.plot_attention(dataset, log_probs, dataset.labels, net, net[0])
    assert (net.training, net[0].weight.grad) == (True, None)
    for_the_prediction, for_the_truth = pictures(figure)[5], pictures(figure)[10]  # after four mistakes, one correct
    assert for_the_prediction[:15, :15].mean() > 2 * for_the_prediction[17:, 17:].mean()
    assert for_the_truth[:15, :15].max() < 120  # its grey alone
    assert "car (0 %)" in texts(figure)
    with pytest.raises(ValueError, match="Flatten"):
        utils.plot_attention(dataset, log_probs, dataset.labels, net, net[1])


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    labels = torch.arange(100) % 2
    probs = torch.full((100, 2), 0.3)
    probs[torch.arange(100), labels] = 0.7
    probs[:20] = probs[:20].flip(1)  # 80 % right, 70 % sure
    assert utils.expected_calibration_error(probs.log(), labels) == pytest.approx(10, abs=1e-3)


class Odd(nn.Module):
    """A parameter of its own, and outputs that are no tensor."""

    def __init__(self, is_tuple: bool) -> None:
        super().__init__()
        self.gain, self.fc, self.is_tuple = nn.Parameter(torch.ones(7)), nn.Linear(3072, 2), is_tuple

    def forward(self, images: torch.Tensor) -> object:
        scores = self.fc(images.flatten(1)) * self.gain.mean()
        return (scores, None) if self.is_tuple else scores


def test_the_summary_counts_parameters_says_where_the_table_does_not_and_disturbs_nothing(capsys):
    net = Net()
    before, random_state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    assert utils.show_summary(net) == 2_034_040
    assert capsys.readouterr().out.count("2,034,040") == 2  # both of the table
    assert net.training
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    twice = nn.Sequential(nn.Flatten(), *[nn.Linear(3072, 3072)] * 2)
    for odd in (Odd(False), Odd(True), twice):
        count = sum(p.numel() for p in odd.parameters())
        assert utils.show_summary(odd) == count
        assert f"{count:,} parameters" in capsys.readouterr().out


def test_the_picture_of_the_architecture_is_drawn_from_the_network():
    net = Net(3)
    shown = texts(utils.plot_architecture(net))
    for name, field in receptive_field(net).items():
        count = sum(p.numel() for p in net.get_submodule(name).parameters())
        assert f"{name.upper()}: {count:,} parameters\nreceptive field {field}×{field} px" in shown
    outputs = [int(text.split("\n")[0]) for text in shown if text.endswith(("31×31", "16×16", "8×8", "4×4"))]
    assert outputs == [layer.out_channels for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    with pytest.raises(ValueError, match="Linear"):
        utils.plot_architecture(nn.Linear(3, 3))

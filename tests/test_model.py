"""What others rely on in `model.Net`: its size, its shapes, its output, and that it travels well."""

import copy
import itertools
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchinfo
import torchsummary
from torch import fx, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor

from model import Net, receptive_field

PARAMETERS = 2_034_040
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32)


def convolutions(net: nn.Module) -> list[nn.Conv2d]:
    return [m for m in net.modules() if isinstance(m, nn.Conv2d)]


def test_parameter_count_is_exact_and_all_of_it_trains():
    assert sum(p.numel() for p in Net().parameters()) == PARAMETERS
    assert sum(p.numel() for p in Net().parameters() if p.requires_grad) == PARAMETERS


def test_torchsummary_and_torchinfo_count_the_same(capsys):
    torchsummary.summary(Net().eval(), (3, 32, 32), device="cpu")
    assert "Total params: 2,034,040" in capsys.readouterr().out
    assert torchinfo.summary(Net(), (1, 3, 32, 32), device="cpu", verbose=0).total_params == PARAMETERS


def test_the_blocks_bear_the_names_of_the_architecture():
    assert [name for name, _ in Net().named_children()] == ["c1", "c2", "c3", "c4", "gap", "fc"]


def test_has_a_depthwise_separable_convolution():
    layers = convolutions(Net())
    pairs = [(a, b) for a, b in itertools.pairwise(layers) if a.groups == a.in_channels == a.out_channels > 1]
    assert any(a.kernel_size == (3, 3) and b.kernel_size == (1, 1) and b.groups == 1 for a, b in pairs)


def test_has_a_dilated_convolution():
    assert any(m.kernel_size == (3, 3) and min(m.dilation) >= 2 for m in convolutions(Net()))


def test_batchnorm_follows_every_convolution_and_no_convolution_has_a_bias():
    kinds = [m for m in Net().modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    for conv, norm in zip(kinds[::2], kinds[1::2], strict=True):
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.num_features == conv.out_channels
        assert conv.bias is None


def test_the_blocks_halve_the_image_to_16_8_and_4_pixels(images):
    net, shapes = Net().eval(), []
    for block in (net.c1, net.c2, net.c3, net.c4, net.gap):
        block.register_forward_hook(lambda block, inputs, output: shapes.append(output.shape[1:]))
    net(images)
    assert shapes == [(80, 16, 16), (224, 8, 8), (324, 4, 4), (186, 4, 4), (186, 1, 1)]


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (33, 47), (64, 40)])
def test_any_size_from_16_gives_one_position_after_the_gap_and_log_probabilities(size):
    net, shapes = Net().eval(), []
    net.gap.register_forward_hook(lambda module, args, output: shapes.append(output.shape[2:]))
    log_probs = net(torch.randn(2, 3, *size))
    assert shapes == [(1, 1)]
    assert log_probs.shape == (2, 10)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(2))


def test_receptive_field_is_what_gradients_say_and_at_least_44_px():
    fields = receptive_field(Net())
    assert list(fields) == ["c1", "c2", "c3", "c4"]
    assert fields["c4"] >= 44
    net = nn.Sequential(*[getattr(Net(), name) for name in fields]).eval()
    for pool in [name for name, m in net.named_modules() if isinstance(m, nn.MaxPool2d)]:
        net.set_submodule(pool, nn.AvgPool2d(2))  # a maximum would hide three of four pixels
    for parameter in net.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5) if parameter.ndim == 1 else nn.init.uniform_(parameter, 0.0, 0.1)
    x = torch.rand(1, 3, 128, 128, dtype=torch.float64, requires_grad=True)
    y = net.double()(x)
    y[0, :, y.shape[2] // 2, y.shape[3] // 2].sum().backward()
    seen = x.grad.abs().sum((0, 1)).nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [fields["c4"]] * 2


def test_nll_loss_and_cross_entropy_agree_in_value_and_gradient(images):
    labels, net = torch.tensor([0, 3, 9, 5]), Net().eval()
    gradients = []
    for loss_function in (F.nll_loss, F.cross_entropy):
        net.zero_grad()
        loss = loss_function(net(images), labels)
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in net.parameters())])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_every_parameter_learns(images):
    net = Net()
    F.nll_loss(net(images), torch.tensor([0, 3, 9, 5])).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, 32, 32), torch.float), ((1, 1, 32, 32), torch.float), ((1, 32, 32, 3), torch.float)],
)
def test_wrong_shape_is_refused_with_both_shapes_named(shape, dtype):
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\)") as error:
        Net()(torch.zeros(shape, dtype=dtype))
    assert str(shape) in str(error.value)


def test_integer_images_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        Net()(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize("num_classes", [0, -1, 2.5, True, "10"])
def test_wrong_number_of_classes_is_refused(num_classes):
    with pytest.raises(ValueError, match="num_classes"):
        Net(num_classes)


def test_other_numbers_of_classes(images):
    assert Net(num_classes=3)(images).shape == (4, 3)


@pytest.mark.parametrize("labels", [np.array([0, 4, 2]), torch.tensor([0, 4, 2])])
def test_the_number_of_classes_may_be_counted_from_labels(labels):
    assert Net(labels.max() + 1).fc.out_features == 5


@pytest.mark.parametrize("images", [np.zeros((1, 3, 32, 32)), [[1.0]], "photo.jpg"])
def test_what_is_no_tensor_is_refused_by_its_kind(images):
    with pytest.raises(ValueError, match=rf"\(N, 3, H, W\).*got {type(images).__name__}"):
        Net()(images)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_images_and_network_may_have_any_precision(images, dtype):
    net = Net().eval()
    expected = net(images.to(dtype).float())
    torch.testing.assert_close(net(images.to(dtype)), expected, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(net(images.to(dtype)), expected, rtol=0.05, atol=0.1)
    log_probs = net.to(dtype)(images)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs, expected, rtol=0.05, atol=0.1)


def test_copies_pickles_and_state_dicts_compute_the_same(images):
    net = Net().eval()
    loaded = Net().eval()
    loaded.load_state_dict(net.state_dict())
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), loaded):
        torch.testing.assert_close(twin(images), net(images), rtol=0, atol=0)


def test_batch_of_one_and_channels_last_change_nothing(images):
    net = Net().eval()
    expected = net(images)
    torch.testing.assert_close(net(images[:1]), expected[:1])
    net.to(memory_format=torch.channels_last)
    torch.testing.assert_close(net(images.to(memory_format=torch.channels_last)), expected)


def test_bf16_autocast_is_close_and_returns_float32(images):
    net = Net().eval()
    with torch.autocast("cpu", torch.bfloat16):
        log_probs = net(images)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs, net(images), rtol=0.05, atol=0.1)


def test_compiles_without_graph_breaks(images):
    net = Net().eval()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), net(images))


@pytest.mark.filterwarnings("ignore:.*jit.*:FutureWarning")
def test_torchscript_computes_the_same_also_read_from_a_file(images, tmp_path):
    net = Net().eval()
    net.classes = tuple("abcdefghij")
    scripted = torch.jit.script(net)
    scripted.save(tmp_path / "net.pt")
    for twin in (scripted, torch.jit.load(tmp_path / "net.pt")):
        torch.testing.assert_close(twin(images), net(images), rtol=0, atol=0)


def test_symbolic_tracing_computes_the_same_for_any_batch(images):
    net = Net().eval()
    traced = fx.symbolic_trace(net)
    for batch in (images, images[:1], torch.randn(2, 3, 33, 47)):
        torch.testing.assert_close(traced(batch), net(batch), rtol=0, atol=0)


def test_features_of_a_block_can_be_extracted(images):
    net = Net().eval()
    features = create_feature_extractor(net, ["c3", "gap"])(images)
    assert not net.training
    assert torch.equal(features["c3"], net.c3(net.c2(net.c1(images))))
    assert features["gap"].shape == (4, 186, 1, 1)


@pytest.mark.filterwarnings("ignore")  # PyTorch says that its quantisation moves to another package
def test_graph_mode_quantisation_answers_nearly_the_same(images):
    net = Net.from_pretrained()
    prepared = prepare_fx(copy.deepcopy(net), get_default_qconfig_mapping(), (images,))
    prepared(images)
    quantised = convert_fx(prepared)
    assert not any(isinstance(m, nn.Conv2d) for m in quantised.modules())
    torch.testing.assert_close(quantised(images).exp(), net(images).exp(), rtol=0, atol=0.3)


def test_the_stem_starts_as_an_orthonormal_transform_with_both_signs():
    filters = Net().c1[0].conv.weight.detach().flatten(1)[:24]
    torch.testing.assert_close(filters[:12] @ filters[:12].T, torch.eye(12))
    torch.testing.assert_close(filters[12:], -filters[:12])


def test_import_alone_is_enough_prints_nothing_and_leaves_the_random_state(tmp_path):
    code = (
        "import torch; before = torch.get_rng_state()\n"
        "from model import Net\n"
        "assert torch.equal(before, torch.get_rng_state())\n"
        "assert Net().eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)\n"
        "import sys; assert not {'torchvision', 'albumentations', 'dataset', 'train'} & set(sys.modules)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")

"""What others rely on in `model.Net`: its size, its shapes, its output, and that it travels well."""

import copy
import itertools
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchsummary
from torch import fx, nn
from torch.nn import functional as F

from model import Net, receptive_field

PARAMETERS = 2_034_040
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32)


def test_parameter_count_is_exact_and_so_for_torchsummary(capsys):
    assert sum(p.numel() for p in Net().parameters() if p.requires_grad) == PARAMETERS
    torchsummary.summary(Net().eval(), (3, 32, 32), device="cpu")
    assert "Total params: 2,034,040" in capsys.readouterr().out


def test_the_layers_are_what_their_names_say():
    net = Net()
    assert [name for name, _ in net.named_children()] == ["c1", "c2", "c3", "c4", "gap", "fc"]
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    pairs = [(a, b) for a, b in itertools.pairwise(layers) if a.groups == a.in_channels == a.out_channels > 1]
    assert any(a.kernel_size == (3, 3) and b.kernel_size == (1, 1) and b.groups == 1 for a, b in pairs), "separable"
    assert any(m.kernel_size == (3, 3) and min(m.dilation) >= 2 for m in layers), "dilated"
    kinds = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    for conv, norm in zip(kinds[::2], kinds[1::2], strict=True):
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.num_features == conv.out_channels
        assert conv.bias is None


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (33, 47)])
def test_any_size_from_16_gives_one_position_after_the_gap_and_log_probabilities(size):
    net, shapes = Net(np.int64(5)).eval(), []
    for block in (net.c1, net.c2, net.c3, net.c4, net.gap):
        block.register_forward_hook(lambda block, inputs, output: shapes.append(tuple(output.shape[1:])))
    log_probs = net(torch.randn(2, 3, *size))
    assert shapes[-1] == (186, 1, 1)
    if size == (32, 32):
        assert shapes[:-1] == [(80, 16, 16), (224, 8, 8), (324, 4, 4), (186, 4, 4)]
    assert log_probs.shape == (2, 5)
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
    x = torch.rand(1, 3, 96, 96, dtype=torch.float64, requires_grad=True)
    y = net.double()(x)
    y[0, :, y.shape[2] // 2, y.shape[3] // 2].sum().backward()
    seen = x.grad.abs().sum((0, 1)).nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [fields["c4"]] * 2


def test_every_parameter_learns_by_nll_loss_and_cross_entropy_alike(images):
    labels, net = torch.tensor([0, 3, 9, 5]), Net().eval()
    gradients = []
    for loss_function in (F.nll_loss, F.cross_entropy):
        net.zero_grad()
        loss = loss_function(net(images), labels)
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in net.parameters())])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])


def test_what_are_no_images_or_no_number_of_classes_is_refused_by_what_it_is():
    net = Net()
    for shape in ((3, 32, 32), (1, 32, 32, 3), (1, 3, 15, 32)):
        with pytest.raises(ValueError, match=rf"\(N, 3, H, W\).*{re.escape(str(shape))}"):
            net(torch.zeros(shape))
    for given, kind in ((torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "uint8"), (np.zeros((1, 3, 32, 32)), "ndarray")):
        with pytest.raises(ValueError, match=rf"\(N, 3, H, W\).*got .*{kind}"):
            net(given)
    for num_classes in (0, 2.5, True, "10"):
        with pytest.raises(ValueError, match="num_classes"):
            Net(num_classes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_images_and_network_may_have_any_precision(images, dtype):
    net = Net().eval()
    expected = net(images.to(dtype).float())
    torch.testing.assert_close(net(images.to(dtype)), expected, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(net(images.to(dtype)), expected, rtol=0.05, atol=0.1)
    torch.testing.assert_close(net.to(dtype)(images), expected, rtol=0.05, atol=0.1)


def test_copies_pickles_and_state_dicts_compute_the_same_of_any_batch_and_layout(images):
    net, loaded = Net().eval(), Net().eval()
    net.classes = tuple("abcdefghij")
    loaded.load_state_dict(net.state_dict())
    copies = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    for twin in (*copies, loaded):
        torch.testing.assert_close(twin(images), net(images), rtol=0, atol=0)
    assert {twin.trained_on["classes"] for twin in copies} == {net.classes}
    torch.testing.assert_close(net(images[:1]), net(images)[:1])
    torch.testing.assert_close(net(images.to(memory_format=torch.channels_last)), net(images))


@pytest.mark.filterwarnings("ignore:.*jit.*:FutureWarning")
def test_compiled_scripted_and_traced_it_computes_the_same(images, tmp_path):
    net = Net().eval()
    net.trained_on = {"classes": tuple("abcdefghij"), "mean": [0.5, 0.5, 0.5]}
    scripted = torch.jit.script(net)
    scripted.save(tmp_path / "net.pt")
    traced, compiled = fx.symbolic_trace(net), torch.compile(net, backend="eager", fullgraph=True)
    for twin in (scripted, torch.jit.load(tmp_path / "net.pt"), traced, compiled):
        torch.testing.assert_close(twin(images), net(images))
    torch.testing.assert_close(traced(images[:1, :, :20]), net(images[:1, :, :20]))


def test_the_stem_starts_as_an_orthonormal_transform_with_both_signs():
    filters = Net().c1[0].conv.weight.detach().flatten(1)[:24]
    torch.testing.assert_close(filters[:12] @ filters[:12].T, torch.eye(12))
    torch.testing.assert_close(filters[12:], -filters[:12])


def test_a_temperature_divides_the_logits_of_a_linear_head_and_no_other(images):
    net = Net().eval()
    net.fc = nn.Linear(186, 10)
    before = net.logits(images)
    net.apply_temperature(0.5)
    torch.testing.assert_close(net.logits(images), 2 * before)
    net.fc = nn.Sequential(nn.Linear(186, 10))
    with pytest.raises(TypeError, match=r"Linear.*got Sequential"):
        net.apply_temperature(0.5)


def test_model_py_and_its_weights_are_enough_in_a_folder_and_for_torch_hub(tmp_path):
    """Importing it prints nothing, leaves the random state, and takes no other package; a user's `machinery` stays.

    torch.hub's network is that of its own folder, and not the module `model` that is there already.
    """
    (tmp_path / "weights").mkdir()
    shutil.copy(REPOSITORY / "model.py", tmp_path)
    shutil.copy(REPOSITORY / "weights/cifar10.pt", tmp_path / "weights")
    for name in ("machinery", "dataset"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the module of the user was taken')")
    code = f"""
import pickle, sys, torch
before = torch.get_rng_state()
from model import Net, WeightsError
net = Net.from_pretrained()
assert torch.equal(before, torch.get_rng_state())
assert not {{'torchvision', 'albumentations', 'dataset', 'machinery'}} & set(sys.modules)
assert not net.training and net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
assert net.classes[0] == 'plane' and net.size == 32 and len(net.mean) == len(net.std) == 3
torch.save(net.state_dict(), 'mine.pt')
try:
    Net.from_pretrained('mine.pt')
except WeightsError as error:
    assert 'weights.py' in str(error) and str(error).isprintable()
else:
    raise SystemExit('read without the reader')

load = lambda **options: torch.hub.load({str(REPOSITORY)!r}, 'net', source='local', **options)
fresh, trained, few = load(), load(pretrained=True), load(pretrained=True, num_classes=3)
assert (fresh.training, trained.training, few.fc.out_features) == (True, False, 3)
assert all(torch.equal(trained.state_dict()[name], value) for name, value in net.state_dict().items())
assert type(pickle.loads(pickle.dumps(fresh))) is type(trained) is not Net
assert type(few).from_pretrained('mine.pt').fc.out_features == 10
assert sys.modules['model'].Net is Net
"""
    environment = {"PATH": "", "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")

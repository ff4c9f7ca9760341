"""Leaves Python: `python export.py net.onnx` writes the trained network for ONNX Runtime, and compares the two."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from dataset import CIFAR10, CLASSES, SIZE
from machinery.errors import DataError, DataUnreachableError
from predict import as_input, normalisation, parse_with_network, picture_size, say

TOLERANCE = 1e-4  # between log-probabilities, natural
BATCHES = (1, 7, 500)  # images, to see that any number will do


def export(model: nn.Module, file: str | Path, classes: Sequence[str] | None = None) -> None:
    """Writes `model` as ONNX: "images", float32 (N, 3, S, S) normalised -> "log_probs", float32 (N, classes).

    The file's metadata says, as JSON, with which "mean" and "std" images are normalised, and names the "classes".

    Args:
        model: On the CPU; exported as it answers in eval mode, for images of its `size` (by default 32).
        file: Is overwritten.
        classes: Their names, in the order of the model's outputs; by default its `classes`, else those of CIFAR-10.

    Raises:
        ValueError: There are more or fewer names than outputs.
    """
    size, (mean, std) = picture_size(model), normalisation(model)
    images = torch.zeros(2, 3, size, size)
    classes = classes or getattr(model, "classes", None) or CLASSES
    with torch.no_grad():
        outputs = model.eval()(images).shape[1]
    if outputs != len(classes):
        raise ValueError(f"classes must name the {outputs} that the network tells apart, got {len(classes)}")
    exported = torch.onnx.export(
        model,
        (images,),
        input_names=["images"],
        output_names=["log_probs"],
        dynamic_shapes=({0: torch.export.Dim("N")},),
        dynamo=True,  # the default since PyTorch 2.9
        verbose=False,
    )
    known = {"mean": mean, "std": std, "classes": classes}
    program = cast(torch.onnx.ONNXProgram, exported)  # None is for an option that is not used here
    program.model.metadata_props.update({name: json.dumps(value) for name, value in known.items()})
    program.save(file, external_data=False)


@torch.no_grad()
def differences(model: nn.Module, file: str | Path, batches: Iterable[Tensor]) -> list[float]:
    """The largest in each batch (N, 3, S, S) between the answers of `model` and of ONNX Runtime with `file`."""
    model.eval()
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    answers = ((model(images), session.run(None, {"images": images.numpy()})[0]) for images in batches)
    return [(ours - torch.from_numpy(theirs)).abs().max().item() for ours, theirs in answers]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the trained network as ONNX and check it with ONNX Runtime.")
    parser.add_argument("file", help="what to write, such as net.onnx")
    parser.add_argument("--data-dir", metavar="DIR", help="where CIFAR-10 is or goes; then $CIFAR10_ROOT, then ./data")
    options, model, classes = parse_with_network(parser, arguments)
    size = picture_size(model)
    if not (folder := Path(options.file).parent).is_dir():
        parser.error(f"cannot write {options.file}: there is no folder {folder}")
    try:
        if classes != CLASSES or size != SIZE:
            data, name = CIFAR10(train=False, data="synthetic"), "synthetic images"
        else:
            data, name = CIFAR10(options.data_dir, train=False), "images of the test set"
    except DataUnreachableError:
        data, name = CIFAR10(train=False, data="synthetic"), "synthetic images, for CIFAR-10 is out of reach"
    except DataError as error:
        parser.error(str(error))
    try:
        export(model, options.file, classes)
    except OSError as error:
        parser.error(f"cannot write {options.file}: {error}")
    nearest = np.arange(size) * SIZE // size
    pictures = data.images[: sum(BATCHES)].numpy()[:, nearest][:, :, nearest]  # uint8 (N, S, S, 3)
    found = differences(model, options.file, as_input(pictures, model).split(BATCHES))
    say(
        f"{options.file}: log-probabilities differ by at most {max(found):.1e} on batches of {BATCHES} {name}",
        sys.stdout,
    )
    if not all(difference <= TOLERANCE for difference in found):  # NaN is no agreement either
        say(f"that is more than {TOLERANCE:.0e}: do not use the file", sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

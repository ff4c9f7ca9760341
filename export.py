"""`python export.py net.onnx` writes the trained network for ONNX Runtime, and compares their outputs."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import nn

from machinery.checkpoint import unwrapped
from machinery.data.augment import normalize
from machinery.data.cifar10 import draw_synthetic
from machinery.device import eval_mode
from machinery.errors import print_line
from predict import class_names, known_of, parse_with_network

TOLERANCE = 1e-4  # between log-probabilities, natural
BATCHES = (1, 7, 500)  # images, to see that any number will do


@torch.no_grad()
def export(model: nn.Module, file: str | Path, classes: Any = None, *, mean: Any = None, std: Any = None) -> None:
    """Writes `model` as ONNX: "images", float32 (N, 3, S, S) normalised -> "log_probs", float32 (N, classes).

    The model, wrapped or not, must be on the CPU; it is exported in eval mode. The file's metadata hold its `known_of`
    as JSON; ValueError if that does not fit the network, or lacks mean and std.
    """
    known, model = known_of(model, classes, mean, std), unwrapped(model)
    images = torch.zeros(2, 3, known["size"], known["size"])
    with eval_mode(model):
        class_names(known["classes"], model(images).shape[1])
        program = torch.onnx.export(
            model,
            (images,),
            input_names=["images"],
            output_names=["log_probs"],
            dynamic_shapes=({0: torch.export.Dim("N")},),
            verbose=False,
        )
    assert program is not None  # as it is with an option that is not used here
    program.model.metadata_props.update({name: json.dumps(value) for name, value in known.items()})
    program.save(file, external_data=False)


@torch.no_grad()
def difference(model: nn.Module, file: str | Path) -> float:
    """The largest difference between the outputs of `model` and of ONNX Runtime, on synthetic images."""
    known = known_of(model)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    pixels = torch.from_numpy(draw_synthetic(train=False, count=sum(BATCHES))[0])
    images = normalize(pixels, torch.tensor(known["mean"]), torch.tensor(known["std"]))
    batches = nn.functional.interpolate(images, size=known["size"]).split(BATCHES)
    with eval_mode(model):
        found = [model(batch) - torch.from_numpy(session.run(None, {"images": batch.numpy()})[0]) for batch in batches]
    return torch.cat(found).abs().max().item()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the trained network as ONNX and check it with ONNX Runtime.")
    parser.add_argument("file", help="what to write, such as net.onnx")
    options, model = parse_with_network(parser, arguments)
    try:
        export(model, options.file)
    except OSError as error:
        parser.error(f"cannot write {options.file}: {error}")
    found = difference(model, options.file)
    print_line(f"{options.file}: log-probabilities differ by at most {found:.1e}, on synthetic images", sys.stdout)
    if not found <= TOLERANCE:  # NaN is no agreement either
        print_line(f"that is more than {TOLERANCE:.0e}: do not use the file", sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

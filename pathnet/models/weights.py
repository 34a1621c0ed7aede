"""Networks on disk: one safetensors file holds the weights and how to build the network that they fit."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pathnet.models.highway import highway
from pathnet.models.preact_resnet import preact_resnet, preact_resnet_imagenet
from pathnet.models.residual_net import ResidualNet
from pathnet.models.resnet import resnet
from pathnet.models.vgg import vgg

__all__ = ["build", "fill", "fingerprint", "load", "read_tensors", "save", "write_tensors"]

CONSTRUCTORS: dict[str, Callable[..., ResidualNet]] = {
    "preact_resnet": preact_resnet,
    "preact_resnet_imagenet": preact_resnet_imagenet,
    "resnet": resnet,
    "vgg": vgg,
    "highway": highway,
}


def build(config: Mapping[str, Any]) -> ResidualNet:
    """The network that ``config`` describes (``ResidualNet.config``), freshly initialised.

    Raises:
        ValueError: the configuration names no known constructor, or arguments that it does not take.
    """
    arguments = dict(config)
    name = arguments.pop("model", None)
    if name not in CONSTRUCTORS:
        raise ValueError(f"config: expected a model among {', '.join(CONSTRUCTORS)}, got {name!r}")
    try:
        return CONSTRUCTORS[name](**arguments)
    except TypeError as error:
        raise ValueError(f"config: {error}") from None


def fingerprint(net: ResidualNet) -> str:
    """SHA-256 over names, dtypes, shapes and values of all weights and statistics: the model hash of a run."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes one safetensors file whole: under a temporary name, then renamed.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    owned = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        safetensors.torch.save_file(owned, temporary, {name: json.dumps(value) for name, value in metadata.items()})
    except safetensors.SafetensorError as error:
        raise OSError(f"weights: {path} cannot be written ({error})") from None
    os.replace(temporary, path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata of a file that `write_tensors` wrote.

    Raises:
        ValueError: the file is missing, cut short, or no safetensors file of pathnet's.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (OSError, safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"weights: {path} is not a readable safetensors file of pathnet's ({error})") from None


def save(net: ResidualNet, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes the network's weights and statistics with its configuration.

    Args:
        dtype: of the kernels and matrices on disk, by default their own; float16 halves the file, and what is loaded
            from it is the rounded network. Vectors (biases, factors and statistics of BN) stay as they are.

    Raises:
        ValueError: the network has no configuration to be rebuilt from.
    """
    if net.config is None:
        raise ValueError("net: has no config, so its file could not be loaded again; save its state_dict instead")
    state = {name: tensor.to(dtype) if tensor.ndim > 1 else tensor for name, tensor in net.state_dict().items()}
    write_tensors(Path(path), state, {"config": net.config})


def load(path: str | Path) -> ResidualNet:
    """The network that `save` (or a training checkpoint) wrote, in evaluation mode.

    Raises:
        ValueError: the file cannot be read, or its tensors do not fit its configuration.
    """
    tensors, metadata = read_tensors(Path(path))
    if "config" not in metadata:
        raise ValueError(f"weights: {path} holds no model configuration (expected a file written by pathnet)")
    net = build(metadata["config"])
    fill(net, tensors, path)
    return net.eval()


def fill(net: ResidualNet, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Copies the tensors that belong to ``net`` into it; others (an optimizer's) are passed over.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    state = net.state_dict()
    for name, tensor in state.items():
        if name not in tensors:
            raise ValueError(f"weights: {path} is of another model (no tensor {name!r} in it)")
        if tensors[name].shape != tensor.shape:
            raise ValueError(
                f"weights: {path} is of another model ({name!r}: expected shape {tuple(tensor.shape)}, "
                f"got {tuple(tensors[name].shape)})"
            )
    net.load_state_dict({name: tensors[name] for name in state})

"""Networks on disk: one safetensors file with the weights and the configuration of the network."""

from __future__ import annotations

import hashlib
import inspect
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pathnet.checks import check_path, described
from pathnet.files import replacing, telling
from pathnet.models.highway_blocks import highway
from pathnet.models.postactivation import resnet
from pathnet.models.preactivation import preact_resnet, preact_resnet_imagenet
from pathnet.models.residual_net import ResidualNet, check_net
from pathnet.models.vgg_layers import vgg

__all__ = [
    "build",
    "check_stored",
    "fill",
    "fingerprint",
    "load",
    "odd_values",
    "read_tensors",
    "save",
    "write_tensors",
]

CONSTRUCTORS: dict[str, Callable[..., ResidualNet]] = {
    "preact_resnet": preact_resnet,
    "preact_resnet_imagenet": preact_resnet_imagenet,
    "resnet": resnet,
    "vgg": vgg,
    "highway": highway,
}


DIGEST = "sha256"
ROUNDED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BEFORE_DIGESTS = {"config", "recipe", "data", "progress"}
"""Metadata names of files from before digests. With any other name, a missing digest means a damaged file."""


def build(config: Mapping[str, Any]) -> ResidualNet:
    """Return the network that ``config`` (``net.config`` of a `ResidualNet`) describes, freshly initialised.

    Args:
        config: the name of a constructor under ``model``, such as ``preact_resnet``, and its arguments by name.

    Raises:
        ValueError: the configuration names no known constructor, or arguments that the constructor does not take, or
            the network does not fit into memory.

    Example:
        >>> from pathnet import models
        >>> net = models.build({"model": "preact_resnet", "depth": 14, "width": 8})
        >>> net.n, models.build(net.config).n
        (6, 6)
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"config: expected an object with the name of a model, got {described(config)}")
    arguments = dict(config)
    name = arguments.pop("model", None)
    if not isinstance(name, str) or name not in CONSTRUCTORS:
        raise ValueError(f"config: expected a model among {', '.join(CONSTRUCTORS)}, got {described(name)}")
    parameters = inspect.signature(CONSTRUCTORS[name]).parameters
    if unknown := [argument for argument in arguments if argument not in parameters]:
        raise ValueError(
            f"config: expected arguments of {name} ({', '.join(parameters)}), got {described(unknown[0])}"
        )
    try:
        return CONSTRUCTORS[name](**arguments)
    except (TypeError, RuntimeError, OverflowError, MemoryError) as error:
        raise ValueError(f"config: {(str(error) or type(error).__name__).splitlines()[0]}") from None


def fingerprint(net: ResidualNet) -> str:
    """Return the model hash of a run: SHA-256 over names, dtypes, shapes and values of all weights and statistics.

    Args:
        net: the network, on any device.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: ``net`` is not a `ResidualNet`, or has tensors on the meta device.

    Example:
        >>> from pathnet import models
        >>> net = models.preact_resnet(depth=14, width=8)
        >>> before = models.fingerprint(net)
        >>> net.blocks[0].convs[0].weight.data[0, 0, 0, 0] += 1
        >>> len(before), models.fingerprint(net) == before
        (64, False)
    """
    check_net(net)
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        _check_has_values(name, tensor)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _check_has_values(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ValueError(f"net: expected tensors with values, got {name} on the meta device")


def _bytes(tensor: Tensor) -> memoryview:
    """Return the values of a tensor as bytes, in row-major order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _digest(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and values of tensors, and over the metadata as stored."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(_bytes(tensor))
    digest.update(json.dumps(sorted(texts.items())).encode())
    return digest.hexdigest()


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    what: str = "weights",
    consequence: str = "",
) -> None:
    """Write a safetensors file atomically, with a digest of its content.

    Args:
        what, consequence: see `pathnet.files.telling`.

    Raises:
        OSError: the file cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    texts = {name: json.dumps(value) for name, value in metadata.items()}
    texts[DIGEST] = json.dumps(_digest(plain, texts))
    with telling(path, what, consequence):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, what, consequence) as file:
        file.write(safetensors.torch.save(plain, texts))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the metadata of a file that `write_tensors` wrote.

    Raises:
        ValueError: the file is missing, truncated, damaged, or not from pathnet.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = {name: json.loads(text) for name, text in texts.items()}
    except FileNotFoundError:
        raise ValueError(f"weights: {path} does not exist") from None
    except (OSError, safetensors.SafetensorError, ValueError, RecursionError, MemoryError) as error:
        if zipfile.is_zipfile(path):
            raise ValueError(
                f"weights: {path} is a file of torch.save; read it with torch.load, and write the network with "
                "pathnet.models.save"
            ) from None
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"weights: {path} is not a readable safetensors file of pathnet's ({reason})") from None
    digest = metadata.pop(DIGEST, None)
    if digest is None and not metadata.keys() <= BEFORE_DIGESTS:
        raise ValueError(f"weights: {path} is not a file of pathnet's, or damaged (it has no {DIGEST})")
    if digest is not None:
        del texts[DIGEST]
        if digest != _digest(tensors, texts):
            raise ValueError(
                f"weights: {path} was edited or damaged after it was written (its {DIGEST} is of another content)"
            )
    return tensors, metadata


def save(net: ResidualNet, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write the network's weights, statistics and configuration to a file.

    The file is in the safetensors format, and holds a SHA-256 of its content. It is replaced as a whole.

    Args:
        net: a network with a configuration (``net.config``), as the constructors here build it.
        path: path of the file; missing folders are created.
        dtype: dtype of kernels and matrices on disk, unchanged by default. float16 halves the file; `load` then
            returns the rounded network. Vectors (biases, factors and statistics of BN) keep their dtype.

    Raises:
        ValueError: the network has no configuration, or values that `load` would reject; or an argument has another
            type.
        OSError: the file cannot be written.

    Example:
        >>> from pathnet import models
        >>> net = models.preact_resnet(depth=14, width=8)
        >>> models.save(net, "network.safetensors")
        >>> models.fingerprint(models.load("network.safetensors")) == models.fingerprint(net)
        True
    """
    check_net(net)
    path = check_path("path", path)
    if net.config is None:
        raise ValueError("net: has no config, so its file could not be loaded again; save its state_dict instead")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in ROUNDED):
        raise ValueError(f"dtype: expected one among {', '.join(map(str, ROUNDED))}, got {described(dtype)}")
    state = {name: tensor.to(dtype) if tensor.ndim > 1 else tensor for name, tensor in net.state_dict().items()}
    for name, tensor in state.items():
        _check_has_values(name, tensor)
        if problem := odd_values(name, tensor):
            raise ValueError(f"net: {name}: {problem}{'' if dtype is None else f' in {dtype}'}")
    write_tensors(path, state, {"config": net.config})


def load(path: str | Path) -> ResidualNet:
    """Return the network in a file that `save` (or a training checkpoint) wrote, in evaluation mode on the CPU.

    Args:
        path: path of the file.

    Raises:
        ValueError: the file cannot be read, or its tensors do not fit its configuration.

    Example:
        >>> import torch
        >>> from pathnet import models
        >>> models.save(models.preact_resnet(depth=14, width=8), "half.safetensors", torch.float16)
        >>> net = models.load("half.safetensors")
        >>> net.n, net.training, net.stem.weight.dtype
        (6, False, torch.float32)
    """
    path = check_path("path", path)
    tensors, metadata = read_tensors(path)
    if "config" not in metadata:
        raise ValueError(f"weights: {path} contains no model configuration (expected a file written by pathnet)")
    net = _skeleton(metadata["config"], len(tensors), path)
    _check_state(net, tensors, path)
    # Copies, since a file's tensors may be its pages. `Module.to_empty` would import sympy, which takes seconds.
    stored = {name: tensors[name].to(like.dtype, copy=True) for name, like in net.state_dict().items()}
    net.load_state_dict(stored, assign=True)
    return net.eval()


def _skeleton(config: Any, count: int, path: str | Path) -> ResidualNet:
    """Return the network of a file on the meta device.

    Args:
        count: number of tensors in the file. Each layer has at least one, which bounds the depth to build.
    """
    depth = config.get("depth", 0) if isinstance(config, Mapping) else 0
    if isinstance(depth, int) and depth > count:
        raise ValueError(
            f"weights: {path} is of another model (config.depth: expected at most {count}, as there are tensors, got "
            f"{described(depth)})"
        )
    try:
        with torch.device("meta"):
            return build(config)
    except ValueError as error:
        raise ValueError(f"weights: {path}: {error}") from None


def fill(net: ResidualNet, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Copy the tensors of a file that belong to ``net`` into it, and ignore all others (an optimizer's).

    Raises:
        ValueError: a tensor is missing, or has another shape, another type or invalid values.
    """
    _check_state(net, tensors, path)
    net.load_state_dict({name: tensors[name] for name in net.state_dict()})


def _check_state(net: ResidualNet, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    for name, tensor in net.state_dict().items():
        if name not in tensors:
            raise ValueError(f"weights: {path} is of another model (no tensor {name!r} in it)")
        check_stored(name, tensors[name], tensor, path)


def check_stored(name: str, tensor: Tensor, like: Tensor, path: str | Path) -> None:
    """Check a tensor of a file against the tensor that it is to replace.

    Raises:
        ValueError: it has another shape, integers instead of floating-point numbers or the reverse, or invalid
        values.
    """
    if tensor.shape != like.shape:
        raise ValueError(
            f"weights: {path} is of another model ({name!r}: expected shape {tuple(like.shape)}, "
            f"got {tuple(tensor.shape)})"
        )
    # `save` may round floating-point tensors, but no others.
    if tensor.dtype != like.dtype and not (like.is_floating_point() and tensor.dtype in ROUNDED):
        raise ValueError(f"weights: {path}: {name!r}: expected {like.dtype}, got {tensor.dtype}")
    if problem := odd_values(name, tensor):
        raise ValueError(f"weights: {path}: {name!r}: {problem}")


def odd_values(name: str, tensor: Tensor) -> str:
    """Return what is wrong with the values of a network's tensor, in words, or ""."""
    if not torch.isfinite(tensor).all():
        return "expected finite values, got NaN or infinity"
    if name.endswith(("running_var", "num_batches_tracked")) and (tensor < 0).any():
        return f"expected values of at least 0, got {tensor.min().item():g}"
    return ""

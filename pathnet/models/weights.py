"""Networks on disk: one safetensors file holds the weights and how to build the network that they fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pathnet.checks import check_path, described
from pathnet.files import replacing, telling
from pathnet.models.highway import highway
from pathnet.models.preact_resnet import preact_resnet, preact_resnet_imagenet
from pathnet.models.residual_net import ResidualNet, check_net
from pathnet.models.resnet import resnet
from pathnet.models.vgg import vgg

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
"""The metadata that files without a digest may have: in any other, the name of the digest may be what is damaged."""


def build(config: Mapping[str, Any]) -> ResidualNet:
    """The network that ``config`` describes (``ResidualNet.config``), freshly initialised.

    Raises:
        ValueError: the configuration names no known constructor, arguments that it does not take, or a network that
            does not fit into memory.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"config: expected an object with the name of a model, got {described(config)}")
    arguments = dict(config)
    name = arguments.pop("model", None)
    if not isinstance(name, str) or name not in CONSTRUCTORS:
        raise ValueError(f"config: expected a model among {', '.join(CONSTRUCTORS)}, got {described(name)}")
    try:
        return CONSTRUCTORS[name](**arguments)
    except (TypeError, RuntimeError, OverflowError, MemoryError) as error:
        raise ValueError(f"config: {(str(error) or type(error).__name__).splitlines()[0]}") from None


def fingerprint(net: ResidualNet) -> str:
    """SHA-256 over names, dtypes, shapes and values of all weights and statistics: the model hash of a run.

    Raises:
        ValueError: ``net`` is no `ResidualNet`.
    """
    check_net(net)
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    """The values as they lie in memory, in the order of the indices."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _digest(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> str:
    """SHA-256 over names, dtypes, shapes and values of tensors, and over metadata as the file holds it."""
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
    """Write one safetensors file whole, with a digest of all that is in it.

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
    """The tensors and the metadata of a file that `write_tensors` wrote.

    Raises:
        ValueError: the file is missing, cut short, damaged, or no safetensors file of pathnet's.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = {name: json.loads(text) for name, text in texts.items()}
    except (OSError, safetensors.SafetensorError, ValueError, RecursionError, MemoryError) as error:
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
    """Writes the network's weights and statistics with its configuration.

    Args:
        dtype: of the kernels and matrices on disk, by default their own; float16 halves the file, and what is loaded
            from it is the rounded network. Vectors (biases, factors and statistics of BN) stay as they are.

    Raises:
        ValueError: an argument is not such a one, or the network has no configuration to be rebuilt from, or values
            that `load` would refuse.
        OSError: the file cannot be written.
    """
    check_net(net)
    path = check_path("path", path)
    if net.config is None:
        raise ValueError("net: has no config, so its file could not be loaded again; save its state_dict instead")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in ROUNDED):
        raise ValueError(f"dtype: expected one among {', '.join(map(str, ROUNDED))}, got {described(dtype)}")
    state = {name: tensor.to(dtype) if tensor.ndim > 1 else tensor for name, tensor in net.state_dict().items()}
    for name, tensor in state.items():
        if problem := odd_values(name, tensor):
            raise ValueError(f"net: {name}: {problem}{'' if dtype is None else f' in {dtype}'}")
    write_tensors(path, state, {"config": net.config})


def load(path: str | Path) -> ResidualNet:
    """The network that `save` (or a training checkpoint) wrote, in evaluation mode.

    Raises:
        ValueError: the file cannot be read, or its tensors do not fit its configuration.
    """
    path = check_path("path", path)
    tensors, metadata = read_tensors(path)
    if "config" not in metadata:
        raise ValueError(f"weights: {path} holds no model configuration (expected a file written by pathnet)")
    net = _skeleton(metadata["config"], len(tensors), path)
    _check_state(net, tensors, path)
    net = net.to_empty(device="cpu")
    net.load_state_dict({name: tensors[name] for name in net.state_dict()})
    return net.eval()


def _skeleton(config: Any, count: int, path: str | Path) -> ResidualNet:
    """The network of a file, without memory for its tensors.

    Args:
        count: tensors in the file. Each layer has one at least, so that no more layers are built than it holds.
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
    """Copies the tensors that belong to ``net`` into it; others (an optimizer's) are passed over.

    Raises:
        ValueError: a tensor is missing, has another shape or type, or values that it cannot have.
    """
    _check_state(net, tensors, path)
    net.load_state_dict({name: tensors[name] for name in net.state_dict()})


def _check_state(net: ResidualNet, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    for name, tensor in net.state_dict().items():
        if name not in tensors:
            raise ValueError(f"weights: {path} is of another model (no tensor {name!r} in it)")
        check_stored(name, tensors[name], tensor, path)


def check_stored(name: str, tensor: Tensor, like: Tensor, path: str | Path) -> None:
    """Check a tensor of a file against the one whose place it takes.

    Raises:
        ValueError: it has another shape, integers in place of floating-point numbers or the reverse, or values that
            no such tensor has.
    """
    if tensor.shape != like.shape:
        raise ValueError(
            f"weights: {path} is of another model ({name!r}: expected shape {tuple(like.shape)}, "
            f"got {tuple(tensor.shape)})"
        )
    # Floating-point ones may be rounded (`save`); all others are as they were.
    if tensor.dtype != like.dtype and not (like.is_floating_point() and tensor.dtype in ROUNDED):
        raise ValueError(f"weights: {path}: {name!r}: expected {like.dtype}, got {tensor.dtype}")
    if problem := odd_values(name, tensor):
        raise ValueError(f"weights: {path}: {name!r}: {problem}")


def odd_values(name: str, tensor: Tensor) -> str:
    """Return what is wrong with the values of a tensor of a network, in words; nothing where nothing is."""
    if not torch.isfinite(tensor).all():
        return "expected finite values, got NaN or infinity"
    if name.endswith(("running_var", "num_batches_tracked")) and (tensor < 0).any():
        return f"expected values of at least 0, got {tensor.min().item():g}"
    return ""

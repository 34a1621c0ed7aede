"""Functional convolutions and batch normalisations of a trace, turned back into modules.

`torch.export`, and `torch.fx` on a subclass that calls the functions itself, trace ``F.batch_norm`` instead of
`nn.BatchNorm2d`. As modules they can use batch statistics again, and fused engines recognise them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pathnet.models.pointwise import Pointwise

__all__ = ["lift"]

aten = torch.ops.aten

CONVOLUTIONS = {F.conv2d, torch.conv2d, aten.conv2d.default, aten.conv2d.padding}
NORMALISATIONS = {F.batch_norm, torch.batch_norm, aten.batch_norm.default}
NAMES: dict[Any, tuple[str, ...]] = {
    target: ("input", "weight", "bias", "stride", "padding", "dilation", "groups") for target in CONVOLUTIONS
}
NAMES[F.batch_norm] = tuple(inspect.signature(F.batch_norm).parameters)
NAMES |= dict.fromkeys(
    (torch.batch_norm, aten.batch_norm.default),
    ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn"),
)
CONVOLUTION_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
NORMALISATION_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(F.batch_norm).parameters.items()
    if parameter.default is not inspect.Parameter.empty
}
TENSORS = {"weight", "bias", "running_mean", "running_var"}
BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
"""Modules by the number of dimensions of their input."""


def lift(
    graph: fx.Graph, attributes: dict[str, Any], model: nn.Module, ranks: Mapping[fx.Node, int]
) -> list[fx.Node]:
    """Replace such functions in the graph, where their weights and statistics are attributes of the graph.

    The replacement is the model's own module if that is a plain torch one, else a new module with the same tensors.

    Args:
        attributes: the modules and tensors that the graph refers to, by name; new modules are added.
        model: the traced model, whose names the graph uses.
        ranks: the number of dimensions of each node's value.

    Returns:
        The batch normalisations that remain functions with fixed running statistics.
    """
    module_names: dict[tuple[Any, ...], str] = {}
    frozen = []
    for node in list(graph.nodes):
        if node.op != "call_function" or not (node.target in CONVOLUTIONS or node.target in NORMALISATIONS):
            continue
        arguments = _arguments(node)
        tensors = {name: _tensor(value, attributes) for name, value in arguments.items() if name in TENSORS}
        are_tensors = all(value is None or isinstance(value, Tensor) for value in tensors.values())
        convolves = node.target in CONVOLUTIONS
        if not are_tensors or not (isinstance(tensors["weight" if convolves else "running_var"], Tensor)):
            frozen += [] if convolves or arguments.get("training") is True else [node]
            continue
        owner = str(arguments["weight" if convolves else "running_var"].target).rpartition(".")[0]
        settings = {name: value for name, value in arguments.items() if name not in TENSORS and name != "input"}
        key = (convolves, *(id(tensor) for tensor in tensors.values()), str(settings))
        if key not in module_names:
            module = _module(tensors, settings, _submodule(model, owner), convolves, ranks[node])
            if module is None:
                frozen += [] if convolves else [node]
                continue
            module_names[key] = _new_name(owner or "lifted", attributes)
            attributes[module_names[key]] = module
        node.op, node.target, node.args, node.kwargs = "call_module", module_names[key], (arguments["input"],), {}
    return frozen


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call by name, defaults included."""
    defaults = CONVOLUTION_DEFAULTS if node.target in CONVOLUTIONS else NORMALISATION_DEFAULTS
    return {**defaults, **dict(zip(NAMES[node.target], node.args, strict=False)), **node.kwargs}


def _tensor(value: Any, attributes: Mapping[str, Any]) -> Any:
    """Return the attribute that an argument refers to, or the argument itself if it refers to none."""
    if isinstance(value, fx.Node) and value.op == "get_attr":
        return attributes[str(value.target)]
    return value


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _new_name(name: str, attributes: Mapping[str, Any]) -> str:
    while name in attributes:
        name += "_"
    return name


def _module(
    tensors: Mapping[str, Any], settings: Mapping[str, Any], owner: nn.Module | None, convolves: bool, rank: int
) -> nn.Module | None:
    """Return a module equivalent to the function call, or None if there is none.

    Args:
        owner: the model's module that owns the tensors; None where there is none.
        rank: number of dimensions of the output.
    """
    lifted: nn.Module
    if convolves:
        weight, bias = tensors["weight"], tensors["bias"] is not None
        channels = weight.shape[1] * settings["groups"], weight.shape[0]
        lifted = nn.Conv2d(*channels, tuple(weight.shape[2:]), bias=bias, **_pairs(settings), device="meta")
    else:
        # The mode of any other module may have no effect on the call.
        if not isinstance(owner, nn.modules.batchnorm._BatchNorm) or settings["training"] is not False:
            return None
        affine, size = tensors["weight"] is not None, len(tensors["running_var"])
        lifted = BATCH_NORMS[rank](size, settings["eps"], owner.momentum, affine, device="meta")
        lifted.num_batches_tracked = owner.num_batches_tracked
    if owner is not None and type(owner) in (type(lifted), Pointwise) and _is_equivalent(owner, lifted, tensors):
        return owner
    lifted.training = False if owner is None else owner.training
    for name, tensor in tensors.items():
        if tensor is not None and name in ("weight", "bias") and not isinstance(tensor, nn.Parameter):
            return None
        setattr(lifted, name, tensor)
    return lifted


def _pairs(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a convolution as `nn.Conv2d` stores them."""

    def pair(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(value) * (2 // len(value))
        return value if isinstance(value, str) else (value, value)

    return {name: value if name == "groups" else pair(value) for name, value in settings.items()}


def _is_equivalent(owner: nn.Module, lifted: nn.Module, tensors: Mapping[str, Any]) -> bool:
    """Return whether a module of the model has the given tensors and the settings of ``lifted``."""
    if any(getattr(owner, name, None) is not tensor for name, tensor in tensors.items()):
        return False
    settings = ("stride", "padding", "dilation", "groups", "eps", "padding_mode")
    return all(getattr(owner, name, None) == getattr(lifted, name, None) for name in settings)

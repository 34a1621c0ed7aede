"""A stand-in for Triton's driver that notes the kernels which the engine would have compiled."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import pathnet.engines.triton
from pathnet.engines.triton import configurations, dgrad, forward, wgrad
from pathnet.engines.triton.launch import Tile

__all__ = ["RECORDER", "TARGETS", "StubDriver", "Wanted"]

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""H100, A100, and AMD's MI300."""


@dataclass(frozen=True)
class Wanted:
    """A kernel that Triton would compile."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[Any, Any]
    options: Any
    attributes: dict[Any, Any]
    target: GPUTarget
    tile: Tile | None

    @property
    def kind(self) -> tuple[str, str]:
        """Name of the kernel, and type of its first argument: gradients or activations."""
        return self.kernel.__name__, next(iter(self.signature.values())).lstrip("*")

    @property
    def named(self) -> dict[str, Any]:
        """Constants by name."""
        names = list(self.signature)
        return {names[place[0]]: getattr(value, "value", value) for place, value in self.constants.items()}

    @property
    def branches(self) -> dict[str, int]:
        """Flags, and the kind of the skip."""
        return {name: int(value) for name, value in self.named.items() if isinstance(value, bool) or name == "SKIP"}

    @property
    def load(self) -> tuple[int, ...]:
        """Order of launches with one tile by their use of registers: a second product, branches, channels."""
        folded = self.branches.get("FOLDED", 0)
        # A pointer that is None is no argument.
        pointers = sum(kind.startswith("*") for kind in self.signature.values())
        return folded, sum(self.branches.values()) + pointers, self.named.get("C", 1) * self.named.get("OUT_C", 1)


class StubDriver:
    """A Triton driver for GPUs that are not there, which notes kernels and neither compiles nor runs them.

    Attributes:
        target: the GPU that it pretends to be.
        wanted: kernels by name and specialization.
        tiles: tiles of all launches, in order.
    """

    def __init__(self) -> None:
        self.target = TARGETS["sm_90"]
        self.wanted: dict[Any, Wanted] = {}
        self.tiles: list[Tile] = []
        self.listening = True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def become(self, target: GPUTarget) -> None:
        self.target = target
        self.wanted, self.tiles = {}, []
        by_warp = target.backend == "cuda" and target.arch // 10 not in (9, 10)
        configurations.multiplies_by_warp = lambda device: by_warp
        for module in (dgrad, forward, wgrad):
            module.FLOAT32 = "tf32x3" if target.backend == "cuda" else "ieee"

    def get_current_device(self) -> int:
        # One device number for each target, since Triton caches a device's target.
        return list(TARGETS.values()).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0

    def install(self) -> None:
        def note(
            kernel: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, *rest: Any
        ) -> None:
            if self.listening:
                tile = self.tiles[-1] if self.tiles else None
                wanted = Wanted(kernel, signature, constants, options, rest[0], self.target, tile)
                self.wanted.setdefault((kernel.__name__, key), wanted)

        triton.runtime.driver.set_active(self)
        # Triton runs nothing if this returns None.
        JITFunction._do_compile = note
        package = pathnet.engines.triton
        for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            module = importlib.import_module(info.name)
            if hasattr(module, "launch"):
                module.launch = self.noting_tiles(module.launch)

    def noting_tiles(self, launch: Callable[..., None]) -> Callable[..., None]:
        def noting(kernel: Any, programs: int, tile: Tile, **arguments: Any) -> None:
            if programs > 0 and self.listening:
                self.tiles.append(tile)
            launch(kernel, programs, tile, **arguments)

        return noting


RECORDER = StubDriver()

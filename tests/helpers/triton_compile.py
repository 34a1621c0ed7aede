"""Compiles the triton engine's kernels for GPUs that are not there, and prints as JSON what became of them.

A program of its own, since Triton decides on import whether it interprets. The engine is driven with tensors on the
CPU, and what Triton was about to compile is written down instead, so that signatures, constants and alignments are
those of a real run. Compiled kernels are kept below build/.

All that `drive` launches would take minutes, so `compile_all` takes of each kernel, type and tile the launch that
keeps most in registers, for each of `TARGETS`. With the argument ``keys`` the program compiles nothing and prints
which kernels some networks want.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# The package beside these tests, whichever is installed.
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))
# A fifth of the time; nothing below asks for source lines.
os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import pathnet.engines.triton  # noqa: E402
from pathnet.engines.triton import arrivals, configurations, dgrad, forward, wgrad  # noqa: E402
from pathnet.engines.triton.launch import Tile  # noqa: E402
from pathnet.engines.triton.network import TritonNetwork, block_network, network_of  # noqa: E402
from pathnet.engines.triton.plan import steps_backward, steps_forward  # noqa: E402
from pathnet.engines.triton.recording import plan_recording, recorded  # noqa: E402
from pathnet.engines.triton.routed_backward import routed_backward, routed_backward_norms  # noqa: E402
from pathnet.engines.triton.routed_forward import routed_forward  # noqa: E402
from pathnet.engines.triton.training import block_backward, block_forward, kept_for  # noqa: E402
from pathnet.models import PreactBlock, ResidualNet, preact_resnet, resnet  # noqa: E402
from pathnet.models.residual_net import Block, FusedForm  # noqa: E402
from pathnet.recording import BatchNormMode, Precision  # noqa: E402

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""H100, A100, and of AMD the MI300."""

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
BATCH = 4

Routing = list[list[tuple[float, float]]]


@dataclass(frozen=True)
class Wanted:
    """What Triton would compile."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[Any, Any]
    options: Any
    attributes: dict[Any, Any]
    target: GPUTarget
    tile: Tile | None

    @property
    def kind(self) -> tuple[str, str]:
        """Kernel, and the type of what it reads first: gradients or activations."""
        return self.kernel.__name__, next(iter(self.signature.values())).lstrip("*")

    @property
    def named(self) -> dict[str, Any]:
        """Constants by name."""
        names = list(self.signature)
        return {names[place[0]]: getattr(value, "value", value) for place, value in self.constants.items()}

    @property
    def branches(self) -> dict[str, int]:
        """Flags, and the kind of the skip."""
        return {name: int(own) for name, own in self.named.items() if isinstance(own, bool) or name == "SKIP"}

    @property
    def load(self) -> tuple[int, ...]:
        """Orders launches with one tile by how much they keep in registers: a second product, branches, channels."""
        folded = self.branches.get("FOLDED", 0)
        return folded, sum(self.branches.values()), self.named.get("C", 1) * self.named.get("OUT_C", 1)


class Recorder:
    """Stands between the engine and Triton, as a GPU for which nothing is ever compiled or run.

    Attributes:
        target: what it passes for.
        wanted: by kernel and what it is specialised for.
        tiles: those that were launched with, the last of them last.
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
        # Triton remembers what a device is.
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
        # Nothing is run where this returns nothing.
        JITFunction._do_compile = note
        package = pathnet.engines.triton
        for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            module = importlib.import_module(info.name)
            if hasattr(module, "launch"):
                module.launch = self.noting_tiles(module.launch)

    def noting_tiles(self, launch: Callable[..., None]) -> Callable[..., None]:
        def noting(kernel: Any, programs: int, tile: Tile, *arguments: Any, **constants: Any) -> None:
            if programs > 0 and self.listening:
                self.tiles.append(tile)
            launch(kernel, programs, tile, *arguments, **constants)

        return noting


RECORDER = Recorder()
WANTED: list[Wanted] = []

MULTIPLYING = ["_dgrad_kernel", "_forward_kernel", "_wgrad_kernel"]
"""Kernels of matrix products; the rest is compiled for one target alone."""

AMD_TILES = [configurations.DGRAD[torch.bfloat16][32], configurations.FORWARD[torch.float32][16]]
"""Whose heaviest launches are compiled for AMD, where a kernel takes three seconds."""


def drive() -> None:
    """Runs what is to be compiled.

    Of a walk back, launches in BN mode ``batch`` keep most in registers, those that both branches end in above all.
    `deep` has every form of them for three widths; `shallow`, without stride-1 blocks behind the first stage, is
    enough for the other modes, and single blocks for post-activation ones. A forward pass multiplies float32 whatever
    the precision of the walk, and keeps most where it records in mode ``batch``, as training does.
    """
    deep, shallow, pad = preact_resnet(14), preact_resnet(8), preact_resnet(8, shortcut="pad")
    walk(deep, 32, "batch", "bfloat16", both)
    walk(shallow, 32, "batch", "bfloat16", alone)
    walk(deep, 32, "batch", "float32", both)
    walk(shallow, 32, "running", "bfloat16", both)
    walk(last(shallow), 16, "running", "float32", both)
    walk(last(pad), 16, "batch", "bfloat16", both)
    walk(last(pad), 16, "batch", "float32", alone)
    walk(wide(), 56, "batch", "bfloat16", both)
    walk(wide(), 56, "batch", "float32", both)
    route(packed(last(pad), 16, "running", "float32"), both)
    route(packed(last(pad), 16, "running", "float32"), alone)
    route(packed(last(shallow), 16, "batch", "float32"), alone)
    record(last(shallow), 16, "running", "float32")
    walk(last(resnet(14)), 8, "running", "bfloat16", both)
    walk(last(resnet(14)), 8, "running", "float32", both)
    walk(last(resnet(8)), 16, "running", "bfloat16", both)
    route(packed(last(resnet(8)), 16, "running", "float32"), alone)
    record(last(resnet(8, shortcut="projection")), 16, "running", "float32")
    walk(last(resnet(8, shortcut="projection")), 16, "batch", "bfloat16", both)
    walk(last(resnet(8)), 16, "batch", "float32", both)
    route(packed(last(resnet(8)), 16, "batch", "float32"), alone)
    record(last(resnet(8, shortcut="projection")), 16, "batch", "bfloat16")
    train(list(shallow), 32, torch.bfloat16)
    train(list(shallow), 32, torch.float32)
    train(list(last(shallow).eval()), 16, torch.bfloat16)


def last(net: ResidualNet) -> ResidualNet:
    """The last block alone."""
    *_, block = net
    return ResidualNet(torch.nn.Conv2d(3, 1, 1), [block], torch.nn.Identity())


def wide() -> ResidualNet:
    """As wide as every table and wider; the second block is the one that ResNet-50's second stage begins with."""
    blocks: list[Block] = [
        PreactBlock(64, (3, 3), (256, 256), 2, "projection"),
        PreactBlock(256, (1, 3, 1), (128, 128, 512), 2, "projection"),
    ]
    return ResidualNet(torch.nn.Conv2d(3, 64, 1), blocks, torch.nn.Identity())


def both(n: int) -> Routing:
    return [[(0.5, 0.7)] * n]


def alone(n: int) -> Routing:
    """Residuals, and skips, which launch something where a block changes its shape."""
    return [[(0.0, 1.0)] * n, [(1.0, 0.0)] * n]


def packed(net: ResidualNet, side: int, bn: BatchNormMode, precision: Precision) -> TritonNetwork:
    return network_of(net, bn, precision, (channels_of(net), side, side))


def channels_of(net: ResidualNet) -> int:
    """Of ``y_0``."""
    block = next(iter(net))
    form = block.form()
    assert form is not None
    return form.convs[0].in_channels


def record(net: ResidualNet, side: int, bn: BatchNormMode, precision: Precision) -> None:
    network = packed(net, side, bn, precision)
    y0 = images(network)
    recorded(network, plan_recording(network), y0)


def route(network: TritonNetwork, routing: Callable[[int], Routing]) -> None:
    steps = steps_forward(network.blocks, np.array(routing(len(network.blocks))))
    routed_forward(network, images(network), steps)


def images(network: TritonNetwork) -> torch.Tensor:
    given = network.blocks[0].given
    return torch.ones(BATCH, given.channels, given.height, given.width)


def walk(
    net: ResidualNet, side: int, bn: BatchNormMode, precision: Precision, routing: Callable[[int], Routing]
) -> None:
    """A walk back; what the recording pass before it would compile is left out."""
    network = packed(net, side, bn, precision)
    RECORDER.listening = False
    y, kept = recorded(network, plan_recording(network), images(network))
    RECORDER.listening = True
    steps = steps_backward(network.blocks, np.array(routing(len(network.blocks))))
    exponent = torch.zeros(BATCH if bn == "running" else 1).int()
    routed_backward(network, kept, torch.ones_like(y), exponent, steps)
    routed_backward_norms(network, kept, torch.ones_like(y), exponent, steps)


def train(blocks: list[Block], side: int, dtype: torch.dtype) -> None:
    """Each forward and back, to its parameters as well; in evaluation with running statistics."""
    for block in blocks:
        form = block.form()
        assert isinstance(form, FusedForm)
        norms, convolutions = [unit.bn for unit in form.units], [unit.conv for unit in form.units]
        x = torch.ones(BATCH, convolutions[0].in_channels, side, side, dtype=dtype)
        network = block_network(
            x.shape[1:],
            dtype,
            [conv.weight for conv in convolutions + ([] if form.projection is None else [form.projection])],
            [bn.weight for bn in norms],
            [bn.bias for bn in norms],
            [] if block.training else [own for bn in norms for own in (bn.running_mean, bn.running_var)],
            [conv.stride[0] for conv in convolutions],
            [bn.eps for bn in norms],
        )
        with torch.no_grad():
            made = block_forward(network, x, 1.0, 1.0)
            kept = kept_for(network, BATCH, made.bits, made.normalized, made.scales)
            block_backward(network, kept, made.output, 1.0, 1.0)
        side = made.output.shape[-1]


def too_large() -> Wanted:
    """A kernel whose tile takes more registers than there are."""
    before = set(RECORDER.wanted)
    arrivals.ELEMENTS = Tile(points=16384, channels=1, depth=1)
    walk(preact_resnet(8), 64, "running", "bfloat16", alone)
    return next(own for key, own in RECORDER.wanted.items() if key[0] == "_norms_kernel" and key not in before)


def compiled(index: int) -> dict[str, Any]:
    """What became of a kernel."""
    wanted = WANTED[index]
    source = ASTSource(wanted.kernel, wanted.signature, wanted.constants, wanted.attributes)
    made = triton.compile(source, target=wanted.target, options=wanted.options.__dict__)
    report = {
        "kernel": wanted.kind[0],
        "file": wanted.kernel.__module__.rsplit(".", 1)[-1] + ".py",
        "type": wanted.kind[1],
        "constants": wanted.named,
        "warps": wanted.options.num_warps,
        "stages": wanted.options.num_stages,
        "shared": made.metadata.shared,
    }
    if wanted.target.backend == "hip":
        return {**report, **amd_usage(made.asm["amdgcn"])}
    return {**report, **nvidia_usage(index, made.asm)}


def amd_usage(assembly: str) -> dict[str, int]:
    """What the metadata behind a kernel's assembly say."""
    names = {"registers": "vgpr_count", "spilled": "vgpr_spill_count", "stack": "private_segment_fixed_size"}
    found = {own: re.findall(rf"\.{name}:\s*(\d+)", assembly) for own, name in names.items()}
    return {own: int(sizes[0]) for own, sizes in found.items()} | {"products": assembly.count("v_mfma")}


def nvidia_usage(index: int, asm: dict[str, Any]) -> dict[str, Any]:
    """What the machine code takes and does.

    Tensor-core instructions are counted in the assembly for the virtual machine. To disassemble what that became
    takes half as long as to compile, and is left to one kernel of a kind and target.
    """
    maxima = len(re.findall(r"\bmax\.(?:ftz\.)?f32\b", asm["ptx"]))
    products = len(re.findall(r"\b(?:wgmma\.mma_async|mma)\.sync\.", asm["ptx"]))
    first = (WANTED[index].kind, WANTED[index].target) not in [(own.kind, own.target) for own in WANTED[:index]]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        sizes = cuobjdump("-res-usage", file.name)
        code = cuobjdump("-sass", file.name) if products and first else None
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", sizes)}
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "local": usage["LOCAL"],
        "maxima_without_nan": maxima,
        "products": products,
        "instructions": None if code is None else {name: code.count(f" {name}.") for name in ("HGMMA", "HMMA")},
    }


def cuobjdump(*arguments: str) -> str:
    return subprocess.run([CUOBJDUMP, *arguments], capture_output=True, text=True, check=True).stdout


def tiles(by_warp: bool) -> Iterator[tuple[str, Tile]]:
    """Those of the tables, and the single ones, with their names; of GPUs whose warps multiply, or of others."""
    for name in configurations.__all__:
        own = getattr(configurations, name)
        if isinstance(own, Tile):
            yield name, own
        elif isinstance(own, dict):
            for dtype, by_width in own.items():
                for width, tile in by_width.items():
                    yield f"{name}[{dtype}][{width}]", (by_warp and tile.by_warp) or tile


def heaviest(wanted: list[Wanted]) -> list[Wanted]:
    """Of each kernel, type and tile the launch that keeps most; in bfloat16 also where a gradient enters a module."""
    chosen: dict[Any, Wanted] = {}
    for own in sorted(wanted, key=lambda own: own.load):
        chosen[own.kind, id(own.tile), own.kind[1] == "bf16" and own.branches.get("ENTRY")] = own
    return list(chosen.values())


def lightest(wanted: list[Wanted], known: list[Wanted]) -> list[Wanted]:
    """Of each kernel and set of branches that a launch ends in, where no known one has it, that which keeps least."""
    chosen: dict[Any, Wanted] = {}
    for own in [*known, *sorted(wanted, key=lambda own: own.load)]:
        chosen.setdefault((own.kind[0], own.named.get("RESIDUAL"), own.named.get("SKIP")), own)
    return [own for own in chosen.values() if own not in known]


def compile_all() -> dict[str, Any]:
    """What became of each target's kernels, which tiles none was launched with; and of a kernel that is too large."""
    unused: dict[str, list[str]] = {}
    for name, target in TARGETS.items():
        RECORDER.become(target)
        drive()
        wanted = list(RECORDER.wanted.values())
        chosen = heaviest(wanted)
        if name == "sm_90":
            chosen += lightest(wanted, chosen)
        elif name == "sm_80":
            chosen = [own for own in chosen if own.kind[0] in MULTIPLYING and own.named["STRIDE"] == 1]
        else:
            some = [id(tile) for tile in AMD_TILES]
            chosen = [own for own in chosen if id(own.tile) in some and own.branches["EXIT"]]
        WANTED.extend(chosen)
        launched = {id(tile) for tile in RECORDER.tiles}
        by_warp = configurations.multiplies_by_warp(torch.device("cpu"))
        unused[name] = [tile for tile, own in tiles(by_warp) if id(own) not in launched]
    RECORDER.become(TARGETS["sm_90"])
    WANTED.append(too_large())
    # Two processes that share what this one has in memory.
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        *kernels, spilling = pool.map(compiled, range(len(WANTED)))
    by_target = {
        name: [kernel for kernel, own in zip(kernels, WANTED, strict=False) if own.target == target]
        for name, target in TARGETS.items()
    }
    return {"triton": triton.__version__, "kernels": by_target, "too_large": spilling, "unused_tiles": unused}


def keys() -> dict[str, list[str]]:
    """The kernels that a record and the walks back along paths want, by network, side and batch."""
    wanted = {}
    for name, net, side, batch in [
        ("small", preact_resnet(8), 32, 4),
        ("small at another side and batch", preact_resnet(8), 28, 3),
        ("ResNet-110", preact_resnet(110), 32, 2),
    ]:
        for bn, precision in [("batch", "bfloat16"), ("running", "bfloat16"), ("running", "float32")]:
            RECORDER.become(TARGETS["sm_90"])
            first_number(net, side, batch, bn, precision)
            wanted[f"{name}, {bn}, {precision}"] = sorted(map(repr, RECORDER.wanted))
    return wanted


def first_number(net: ResidualNet, side: int, batch: int, bn: Any, precision: Any) -> None:
    """A record, and the norms of walks back along paths that enter modules and leave them out."""
    global BATCH
    BATCH = batch
    record(net, side, bn, precision)
    walk(net, side, bn, precision, alone)


def main() -> None:
    torch.set_num_threads(1)
    RECORDER.install()
    print(json.dumps(keys() if "keys" in sys.argv else compile_all()))


if __name__ == "__main__":
    main()

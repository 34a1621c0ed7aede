"""Compiles the triton engine's kernels for GPUs that are not there, and prints a report as JSON.

A program of its own, since Triton decides on import whether it interprets. `triton_drive` runs the engine with
tensors on the CPU, and `triton_recorder` notes the kernels that Triton was about to compile, so signatures,
constants and alignments are those of a real run. Compiled kernels are cached below build/.

Compiling all of them would take minutes, so `compile_all` chooses, for each of `TARGETS`, the launch of each kernel,
type and tile that uses the most registers. With the argument ``keys`` the program compiles nothing and prints the
kernels of some networks.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# The package and the helpers next to this file, whichever are installed.
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))
# A fifth of the time; the report needs no source lines.
os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")

import torch  # noqa: E402
import triton  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from helpers.triton_drive import alone, drive, record, walk  # noqa: E402
from helpers.triton_recorder import RECORDER, TARGETS, Wanted  # noqa: E402
from pathnet.engines.triton import arrivals, configurations  # noqa: E402
from pathnet.engines.triton.launch import Tile  # noqa: E402
from pathnet.models import ResidualNet, preact_resnet  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

WANTED: list[Wanted] = []

MULTIPLYING = ["_dgrad_kernel", "_forward_kernel", "_wgrad_kernel"]
"""Kernels of matrix products; all others are compiled for one target alone."""

AMD_TILES = [configurations.DGRAD[torch.bfloat16][32], configurations.FORWARD[torch.float32][16]]
"""Tiles whose heaviest launches are compiled for AMD, where a kernel takes three seconds."""


def too_large() -> Wanted:
    """Return a kernel whose tile needs more registers than there are."""
    before = set(RECORDER.wanted)
    arrivals.ELEMENTS = Tile(points=16384, channels=1, depth=1)
    walk(preact_resnet(8), 64, "running", "bfloat16", alone)
    return next(kernel for key, kernel in RECORDER.wanted.items() if key[0] == "_norms_kernel" and key not in before)


def compiled(index: int) -> dict[str, Any]:
    """Compile a kernel; return its constants and the resources of its machine code."""
    wanted = WANTED[index]
    source = ASTSource(wanted.kernel, wanted.signature, wanted.constants, wanted.attributes)
    result = triton.compile(source, target=wanted.target, options=wanted.options.__dict__)
    report = {
        "kernel": wanted.kind[0],
        "file": wanted.kernel.__module__.rsplit(".", 1)[-1] + ".py",
        "type": wanted.kind[1],
        "constants": wanted.named,
        "warps": wanted.options.num_warps,
        "stages": wanted.options.num_stages,
        "shared": result.metadata.shared,
    }
    if wanted.target.backend == "hip":
        return {**report, **amd_usage(result.asm["amdgcn"])}
    return {**report, **nvidia_usage(index, result.asm)}


def amd_usage(assembly: str) -> dict[str, int]:
    """Return the resources that the metadata in a kernel's assembly name."""
    names = {"registers": "vgpr_count", "spilled": "vgpr_spill_count", "stack": "private_segment_fixed_size"}
    sizes = {key: re.findall(rf"\.{name}:\s*(\d+)", assembly) for key, name in names.items()}
    return {key: int(numbers[0]) for key, numbers in sizes.items()} | {"products": assembly.count("v_mfma")}


def nvidia_usage(index: int, asm: dict[str, Any]) -> dict[str, Any]:
    """Return the resources of the machine code, and counts of its instructions.

    Tensor-core instructions are counted in PTX. Disassembly takes half as long as compilation, so only one
    kernel of a kind and target is disassembled.
    """
    maxima = len(re.findall(r"\bmax\.(?:ftz\.)?f32\b", asm["ptx"]))
    products = len(re.findall(r"\b(?:wgmma\.mma_async|mma)\.sync\.", asm["ptx"]))
    first = (WANTED[index].kind, WANTED[index].target) not in [(each.kind, each.target) for each in WANTED[:index]]
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
    """Yield all tiles with their names, for GPUs whose warps multiply operands in registers, or for others."""
    for name in configurations.__all__:
        value = getattr(configurations, name)
        if isinstance(value, Tile):
            yield name, value
        elif isinstance(value, dict):
            for dtype, by_width in value.items():
                for width, tile in by_width.items():
                    yield f"{name}[{dtype}][{width}]", (by_warp and tile.by_warp) or tile


def heaviest(wanted: list[Wanted]) -> list[Wanted]:
    """Return the launch with the most registers of each kernel, type and tile; in bfloat16 also that of entries."""
    chosen: dict[Any, Wanted] = {}
    for kernel in sorted(wanted, key=lambda kernel: kernel.load):
        entry = kernel.kind[1] == "bf16" and kernel.branches.get("ENTRY")
        chosen[kernel.kind, id(kernel.tile), entry] = kernel
    return list(chosen.values())


def lightest(wanted: list[Wanted], known: list[Wanted]) -> list[Wanted]:
    """Return the launch with the fewest registers of each kernel and set of branches that ``known`` lacks."""
    chosen: dict[Any, Wanted] = {}
    for kernel in [*known, *sorted(wanted, key=lambda kernel: kernel.load)]:
        chosen.setdefault((kernel.kind[0], kernel.named.get("RESIDUAL"), kernel.named.get("SKIP")), kernel)
    return [kernel for kernel in chosen.values() if kernel not in known]


def compile_all() -> dict[str, Any]:
    """Return the reports of each target's kernels, its unused tiles, and the report of a kernel that is too large."""
    unused: dict[str, list[str]] = {}
    for name, target in TARGETS.items():
        RECORDER.become(target)
        drive()
        wanted = list(RECORDER.wanted.values())
        chosen = heaviest(wanted)
        if name == "sm_90":
            chosen += lightest(wanted, chosen)
        elif name == "sm_80":
            chosen = [each for each in chosen if each.kind[0] in MULTIPLYING and each.named["STRIDE"] == 1]
        else:
            amd_tiles = [id(tile) for tile in AMD_TILES]
            chosen = [each for each in chosen if id(each.tile) in amd_tiles and each.branches["EXIT"]]
        WANTED.extend(chosen)
        launched = {id(tile) for tile in RECORDER.tiles}
        by_warp = configurations.multiplies_by_warp(torch.device("cpu"))
        unused[name] = [tile_name for tile_name, tile in tiles(by_warp) if id(tile) not in launched]
    RECORDER.become(TARGETS["sm_90"])
    WANTED.append(too_large())
    # Forked: both processes then have `WANTED`.
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        *kernels, spilling = pool.map(compiled, range(len(WANTED)))
    by_target = {
        name: [kernel for kernel, wanted in zip(kernels, WANTED, strict=False) if wanted.target == target]
        for name, target in TARGETS.items()
    }
    return {"triton": triton.__version__, "kernels": by_target, "too_large": spilling, "unused_tiles": unused}


def keys() -> dict[str, list[str]]:
    """Return the kernels of a record and backward passes along paths, by network, side and batch."""
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
    """Run a record, and backward passes along paths through modules and past them."""
    record(net, side, bn, precision, batch)
    walk(net, side, bn, precision, alone, batch)


def main() -> None:
    torch.set_num_threads(1)
    RECORDER.install()
    print(json.dumps(keys() if "keys" in sys.argv else compile_all()))


if __name__ == "__main__":
    main()

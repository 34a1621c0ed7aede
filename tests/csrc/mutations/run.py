"""Mutate the kernels' index arithmetic, one expression at a time, and check that each mutant fails.

``python tests/csrc/mutations/run.py`` runs all mutants (two hours on two cores) and lists the survivors at the end;
``--sample 12`` runs twelve evenly spaced ones. A mutant is a copy of csrc with one operator or number changed, or one
barrier left out. It must fail to compile, crash, hang, be caught by the twin's watch over its memory, or give a wrong
result.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
KERNELS = HERE.parents[2] / "csrc" / "cuda"
MUTATED = [
    "image.h",
    "strips.h",
    "program.cpp",
    "supported.cpp",
    "program_builder.h",
    "program_builder.cpp",
    "planner.cpp",
    "pack_weights.cpp",
    "images.cuh",
    "weight_stream.cuh",
    "products.cuh",
    "convolution.cuh",
    "backward_item.cuh",
    "backward_epilogue.cuh",
    "backward_output.cuh",
    "routed_backward.cuh",
    "forward_item.cuh",
    "forward_epilogue.cuh",
    "routed_forward.cuh",
]
OPERATORS = {
    " + ": " - ",
    " - ": " + ",
    " * ": " + ",
    " / ": " * ",
    " % ": " / ",
    " << ": " >> ",
    " >> ": " << ",
    " & ": " | ",
    " | ": " & ",
    " ^ ": " | ",
    " < ": " <= ",
    " >= ": " > ",
    " == ": " != ",
    " != ": " == ",
    " && ": " || ",
}
NUMBER = re.compile(r"(?<![\w.])(\d+)(?![\w.])")
# Lines that are not index arithmetic: declarations, pragmas, messages; the checksum; bounds that only refuse a
# network; the choice of column tiles and windows, which changes only the speed; places of absent parts.
SKIPPED = re.compile(
    r"^\s*(//|#|template|static_assert|using|PATHNET_UNROLL|PATHNET_NO_UNROLL)"
    r"|refuse\(|invalid_argument|to_string|checksum|16777619|program_size\(|kMaxChannels|in_height \+ 8|pairs"
    r"| : -1|bool bare|kMaxPixels|kMaxElements|kMaxScratch|traffic|bytes \+= double"
)
SOURCES = [
    "host_twin.cpp",
    "pack_weights.cpp",
    "planner.cpp",
    "program.cpp",
    "program_builder.cpp",
    "supported.cpp",
]
COMPILER = ["g++", "-std=c++17", "-O2", "-w", "-shared", "-fPIC"]


@dataclass(frozen=True)
class Mutant:
    """One changed line of one file."""

    file: str
    line: int
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.before.strip()}  ->  {self.after.strip()}"


ROUNDED = "a third of a kernel of 1 or 3, rounded down, equals its half"
NO_SECOND_TAP = "there is one tap"
OVERWRITTEN = "the value is set again before it is read"
NOT_STORED = "positions beyond the grid are computed but not stored"
SLOWER = "it only waits for more copies than necessary"
WORDING = "it only words a refusal"
OTHER_ORDER = "the two classes of targets come in the other order"
NONE = "any negative number stands for none"

EQUIVALENT: dict[str, str] = {
    "return {stride, 1, 0, kernel, 0, 1, -(kernel / 3), 1};": ROUNDED,
    "if (stride == 1) return {1, 1, 0, kernel, 0, 1, -(kernel / 3), 1};": ROUNDED,
    "if (kernel == 1) return {1, 2, 0, 1, 0, 2, 0, 1};": NO_SECOND_TAP,
    "if (kernel == 1) return {1, 2, 0, 1, 0, 1, 0, 2};": NO_SECOND_TAP,
    "if (parity == 0) return {1, 2, 0, 1, 1, 2, 0, 1};": NO_SECOND_TAP,
    "if (parity == 0) return {1, 2, 0, 1, 1, 1, 0, 2};": NO_SECOND_TAP,
    "int first = 1, samples = 0;": OVERWRITTEN,
    "int first = 0, samples = 1;": OVERWRITTEN,
    "int from_ = 0, bytes_ = 0, slices_ = 0, slices_left_ = 1, reads_left_ = 0;": OVERWRITTEN,
    "int from_ = 0, bytes_ = 0, slices_ = 1, slices_left_ = 0, reads_left_ = 0;": OVERWRITTEN,
    "int operand = 0, mid = 1;": OVERWRITTEN,
    "int operand = 1, mid = 0;": OVERWRITTEN,
    "if (slots_ == 4) {": SLOWER,
    "if (parity != 0) return {1, 2, 0, 1, 1, 1, 0, 1};": OTHER_ORDER,
    "if (parity == 1) return {1, 2, 0, 1, 1, 1, 0, 1};": OTHER_ORDER,
    "const std::vector<int32_t> smallest = build_program(spec_, {true, max_slicing(), 2, max_windows()});": WORDING,
    "const int to = all <= pass.read_height ? all : pass.read_height;": "the same where both are equal",
    "first = source.pixel(from * axis.source_step + axis.offset(0) + 1, 1) / 8 * 8;": (
        "rounded down to the same: where column 0 is read, a window begins at a row that 4 divides"
    ),
    "pixels = source.pixel((to - 1) * axis.source_step + axis.offset(axis.taps - 1) + 2, 1) - first;": (
        "one pixel more, which nothing reads"
    ),
    "form.units[0] = conv(program, form.in, form.out, 3, form.stride, {first_bits, inner_affine, -2});": NONE,
    "form.units[1] = conv(program, form.out, form.out, 3, 1, {second_bits, -2, bias});": NONE,
    "pass.vertical = pass.horizontal = kBackward ? backward_axis(3, 1, 0) : forward_axis(3, 2);": "it is not read",
    "Masks masks[3];": "the third is not used",
    "left[lane] = (x <= pass.width ? x : pass.width - 1) * pass.horizontal.source_step + 1;": NOT_STORED,
    "const int y = top[lane] + row, inside = y < pass.height ? y : pass.height - 2;": NOT_STORED,
    "const bool inside = x < image.width && y + row <= image.height && channel < program_.channels_in;": NOT_STORED,
    "const bool inside = a != 0.0f && x < form.out.width && y + row <= form.out.height && channel >= 0 &&": (
        NOT_STORED
    ),
}
"""Known mutants whose behaviour does not change, and why; by their changed line without its comment."""


def mutants() -> list[Mutant]:
    """Return all mutants, the equivalent ones included."""
    mutated = []
    for file in MUTATED:
        for number, line in enumerate((KERNELS / file).read_text().splitlines(), 1):
            if not SKIPPED.search(line):
                mutated += [Mutant(file, number, line, after) for after in _changes(line.split("//")[0])]
    return mutated


def _changes(line: str) -> Iterator[str]:
    """Yield the line with one operator or number changed, or a barrier's line emptied."""
    if line.strip() in ("exec_.barrier();", "exec_.template wait_copies<1>();", "exec_.template wait_copies<0>();"):
        yield ""
        return
    for old, new in OPERATORS.items():
        for match in re.finditer(re.escape(old), line):
            yield line[: match.start()] + new + line[match.end() :]
    for match in NUMBER.finditer(line):
        yield line[: match.start()] + str(int(match[1]) + 1) + line[match.end() :]


def build(sources: Path, library: Path) -> bool:
    """Compile the twin of a copy of csrc; return whether that succeeded."""
    files = [HERE / "twin_abi.cpp", *(sources / "cuda" / name for name in SOURCES)]
    command = [*COMPILER, f"-I{sources / 'cuda'}", *files, "-o", library]
    return subprocess.run(command, capture_output=True).returncode == 0


def verdict(mutant: Mutant | None, cases: Path) -> str:
    """Return why the mutant (or the unchanged kernels, for None) fails; an empty string if it survives."""
    with tempfile.TemporaryDirectory() as folder:
        sources, library = Path(folder) / "csrc", Path(folder) / "twin.so"
        shutil.copytree(KERNELS.parent, sources)
        if mutant is not None:
            path = sources / "cuda" / mutant.file
            lines = path.read_text().splitlines()
            lines[mutant.line - 1] = mutant.after
            path.write_text("\n".join(lines) + "\n")
        if not build(sources, library):
            return "does not compile"
        try:
            judged = subprocess.run(
                [sys.executable, HERE / "judge.py", library, cases], capture_output=True, text=True, timeout=120
            )
        except subprocess.TimeoutExpired:
            return "hangs"
    if judged.returncode == 0:
        return ""
    return judged.stdout.strip() or f"crashes ({judged.returncode})"


def verdicts(chosen: list[Mutant], cases: Path, workers: int = 2) -> Iterator[tuple[Mutant, str]]:
    """Yield each mutant with its verdict, in order."""
    with ThreadPoolExecutor(workers) as pool:
        yield from zip(chosen, pool.map(lambda mutant: verdict(mutant, cases), chosen), strict=True)


def main() -> int:
    from cases import write

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, help="number of mutants, evenly spaced (default: all)")
    parser.add_argument("--file", choices=MUTATED, help="mutate only this file")
    arguments = parser.parse_args()
    candidates = [m for m in mutants() if m.after.strip() not in EQUIVALENT and arguments.file in (None, m.file)]
    step = max(1, len(candidates) // arguments.sample) if arguments.sample else 1
    chosen = candidates[::step]
    alive = []
    with tempfile.TemporaryDirectory() as folder:
        cases = Path(folder) / "cases.npz"
        write(cases)
        wrong = verdict(None, cases)
        if wrong:
            print(f"the kernels themselves fail: {wrong}")
            return 1
        for done, (mutant, reason) in enumerate(verdicts(chosen, cases), 1):
            if not reason:
                alive.append(mutant)
            print(f"{done}/{len(chosen)} {reason or 'SURVIVES'}: {mutant}", flush=True)
    print(f"{len(chosen)} mutants, {len(alive)} survive; {len(EQUIVALENT)} equivalent ones left out")
    for mutant in alive:
        print(mutant)
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())

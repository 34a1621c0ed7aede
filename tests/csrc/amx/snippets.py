"""Assembly for the probe: tile instructions with every addressing mode, and a check of all other registers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

REGISTERS = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16))]
DISPLACEMENTS = [0, 1, 127, 128, 70000, -128, -129]
BELOW = 1 << 17
AREA = 1024
WIDTHS = [12] * 7 + [64]
HEIGHTS = [3] * 7 + [1]
KEPT = ["rbx", "rbp", "r12", "r13", "r14", "r15"]


def configuration(heights: list[int], widths: list[int]) -> bytes:
    header = np.array([1] + [0] * 15, dtype=np.uint8)
    colsb, rows = np.zeros(16, dtype=np.uint16), np.zeros(16, dtype=np.uint8)
    colsb[: len(widths)], rows[: len(heights)] = widths, heights
    return header.tobytes() + colsb.tobytes() + rows.tobytes()


CONFIGURED = configuration(HEIGHTS, WIDTHS)
OTHER = configuration([16, 1, 9], [64, 3, 36])


@dataclass
class Snippet:
    """An instruction with one addressing mode, and the place in the area that it must access."""

    name: str
    base: str | None
    index: str | None
    start: int
    scale: int
    displacement: int
    step: int
    tile: int

    @property
    def of_tile(self) -> bool:
        return not self.name.endswith("cfg")

    @property
    def stride(self) -> int:
        return self.step * self.scale if self.index else 0

    def operand(self) -> str:
        address = BELOW + self.start - (0 if self.of_tile else self.stride)
        index = f",%{self.index},{self.scale}" if self.index else ""
        if self.base is None:
            return f"arena+{address}({index})" if index else f"arena+{address}"
        return f"arena+{address}(%rip)" if self.base == "rip" else f"{self.displacement}(%{self.base}{index})"

    def assembly(self, number: int) -> str:
        lines = [f"snippet_{number}:", *[f"push %{register}" for register in KEPT], "mov %rsp, saved(%rip)"]
        address = BELOW + self.start - self.displacement - (0 if self.of_tile else self.stride)
        if self.index:
            lines.append(f"movabs ${self.step}, %{self.index}")
        if self.base not in (None, "rip"):
            lines.append(f"movabs $arena+{address}, %{self.base}")
        operands = f"%tmm{self.tile}, {self.operand()}" if self.name == "tilestored" else self.operand()
        lines.append(f"{self.name} {operands}" + (f", %tmm{self.tile}" if self.name.startswith("tileload") else ""))
        lines += ["mov saved(%rip), %rsp", *[f"pop %{register}" for register in reversed(KEPT)]]
        if self.name.startswith("tileload"):
            lines += ["mov $result, %rax", "mov $64, %ecx", f"tilestored %tmm{self.tile}, (%rax,%rcx,1)"]
        if self.name == "ldtilecfg":
            lines.append("sttilecfg result(%rip)")
        return "\n  ".join([*lines, "ret"]) + "\n"

    def expected(self, area: bytes) -> bytes:
        """Return the area and, after it, the result."""
        after, result = bytearray(area), bytearray(1024)
        width = WIDTHS[self.tile]
        rows = range(HEIGHTS[self.tile])
        if self.name == "ldtilecfg":
            result[:64] = area[self.start :][:64]
        elif self.name == "sttilecfg":
            after[self.start : self.start + 64] = CONFIGURED
        for row in rows if self.of_tile else ():
            place = self.start + row * self.stride
            if self.name == "tilestored":
                source = 10 * self.tile + 16 * row
                after[place : place + width] = area[source : source + width]
            else:
                result[64 * row : 64 * row + width] = area[place : place + width]
        return bytes(after + result)


def snippets() -> Iterator[Snippet]:
    """Yield every base with every index, cycling through scales, displacements and tiles."""
    number = 0
    for name in ("tileloadd", "tileloaddt1", "tilestored", "ldtilecfg", "sttilecfg"):
        of_tile = not name.endswith("cfg")
        for base in [*REGISTERS, None]:
            for index in [None, *(register for register in REGISTERS if register != "rsp")]:
                number += 1
                step, tile = (-1) ** number * (2 + number % 13), number // 4 % 8
                start, displacement = 400 if of_tile else 0, DISPLACEMENTS[number % len(DISPLACEMENTS)]
                if base == "rsp":  # the frames of signal and emulator are below it, and must not overlap the area
                    start, displacement, step = 64 if of_tile else 0, abs(displacement), abs(step)
                if base is not None and base == index:  # the stride is an address: valid for one row only
                    if not of_tile:
                        continue
                    tile = WIDTHS.index(64)
                yield Snippet(name, base, index, start, 1 << number % 4, displacement, step, tile)
        if not of_tile:
            yield Snippet(name, "rip", None, 0, 1, 0, 0, 0)


KEPT_BYTES = 4096
FLAGS_SET = 0x8D5
"""The flags carry, parity, adjust, zero, sign and overflow."""


def places_of_registers() -> Iterator[tuple[str, str, int]]:
    """Yield the instruction that moves a register, the register's name and its place."""
    for number in range(32):
        yield "vmovdqu64", f"zmm{number}", 64 * number
    for number in range(8):
        yield "kmovq", f"k{number}", 2048 + 8 * number
    for number, register in enumerate(REGISTERS):
        yield "mov", register, 2112 + 8 * number


RED_ZONE, FLAGS = 2240, 2368


def keep_registers() -> str:
    """Return a function that loads registers, flags and red zone, executes a tile instruction, and stores them."""
    lines = ["keep_registers:", *[f"push %{register}" for register in KEPT], "mov %rsp, saved(%rip)"]
    lines.append(f"mov %rsp, arena+{2112 + 8 * REGISTERS.index('rsp')}")
    lines += [f"pushq arena+{FLAGS}", "popfq"]
    for half in (0, 64):
        lines += [f"vmovdqu64 arena+{RED_ZONE + half}, %zmm0", f"vmovdqu64 %zmm0, {half - 128}(%rsp)"]
    lines += [f"{move} arena+{place}, %{name}" for move, name, place in places_of_registers()]
    lines.append("tdpbf16ps %tmm2, %tmm1, %tmm0")
    lines += [f"{move} %{name}, arena+{KEPT_BYTES + place}" for move, name, place in places_of_registers()]
    for half in (0, 64):
        lines += [
            f"vmovdqu64 {half - 128}(%rsp), %zmm0",
            f"vmovdqu64 %zmm0, arena+{KEPT_BYTES + RED_ZONE + half}",
        ]
    lines += ["pushfq", f"popq arena+{KEPT_BYTES + FLAGS}", "mov saved(%rip), %rsp"]
    return "\n  ".join([*lines, *[f"pop %{register}" for register in reversed(KEPT)], "ret"]) + "\n"


def assembly_of(all_snippets: list[Snippet]) -> str:
    names = "".join(f"  .quad snippet_{number}\n" for number in range(len(all_snippets)))
    return (
        ".globl snippets, snippet_count, keep_registers\n.bss\nsaved: .quad 0\n.text\n"
        + "".join(snippet.assembly(number) for number, snippet in enumerate(all_snippets))
        + keep_registers()
        + f".section .rodata\n.balign 8\nsnippets:\n{names}snippet_count: .quad {len(all_snippets)}\n"
        + '.section .note.GNU-stack,"",@progbits\n'
    )

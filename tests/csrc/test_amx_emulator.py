"""The AMX emulator by itself: a program that uses AMX runs under it, and numpy says what must come out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from amx.build import emulator, why_not

WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")

FOLDER = Path(__file__).parent / "amx"
AMX = ["-O1", "-std=c++17", "-mamx-tile", "-mamx-bf16"]
ROUND_TO_NEAREST, ROUND_TO_ZERO = 0x1F80, 0x7F80

Run = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulator(tmp_path_factory.mktemp("emulator"))


@pytest.fixture(scope="session")
def preloaded(library: Path) -> Run:
    """Runs a command under the emulator."""

    def run(*command: object, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        environment = {**os.environ, "LD_PRELOAD": str(library)}
        return subprocess.run([*map(str, command)], input=data, capture_output=True, env=environment, timeout=60)

    return run


@pytest.fixture(scope="session")
def probe(preloaded: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs the probe, with its snippets, under the emulator."""
    folder = tmp_path_factory.mktemp("probe")
    assembly, program = folder / "snippets.s", folder / "probe"
    assembly.write_text(assembly_of([*snippets()]))
    sources = [FOLDER / "probe.cpp", assembly]
    # Not position-independent, for addresses that have no register at all.
    subprocess.run(["g++", *AMX, "-no-pie", "-pthread", *sources, "-o", program], check=True)
    return lambda *arguments, data=b"": preloaded(program, *arguments, data=data)


# Products.


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Cut off to bfloat16, as bits."""
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@dataclass
class Product:
    """C += A * B; a [rows, 2 * pairs], b [pairs, columns, 2] of bfloat16 bits, c [rows, columns] of float32."""

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    gaps: tuple[int, int, int] = (0, 0, 0)
    """How many bytes lie between the rows of a, b and c."""
    repeats: int = 1
    mxcsr: int = ROUND_TO_NEAREST

    def data(self) -> bytes:
        matrices = [rows_of(self.a), rows_of(self.b), rows_of(self.c)]
        strides = [matrix.shape[1] + gap for matrix, gap in zip(matrices, self.gaps, strict=True)]
        header = np.array([len(self.a), len(self.b), self.c.shape[1], *strides, self.repeats, self.mxcsr])
        return b"".join([header.tobytes(), *map(laid_out, matrices, strides)])

    def take(self, output: bytes) -> tuple[np.ndarray, bytes]:
        """The result at the start of an output, and what follows it."""
        rows, width = self.c.shape[0], 4 * self.c.shape[1]
        stride = width + self.gaps[2]
        size = stride * (rows - 1) + width
        padded = np.frombuffer(output[:size] + b"\xaa" * self.gaps[2], dtype=np.uint8).reshape(rows, stride)
        assert (padded[:, width:] == 0xAA).all(), "written between the rows"
        return np.ascontiguousarray(padded[:, :width]).view(np.float32), output[size:]

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """A [rows, 2 * pairs] and B [2 * pairs, columns] in float64."""
        b = float32(self.b).transpose(0, 2, 1).reshape(-1, self.b.shape[1])
        return float32(self.a).astype(np.float64), b.astype(np.float64)

    def truth(self) -> np.ndarray:
        a, b = self.factors()
        return self.c + self.repeats * (a @ b)

    def scale(self) -> np.ndarray:
        """The sum of the terms' sizes."""
        a, b = self.factors()
        return np.abs(self.c) + np.abs(a) @ np.abs(b)

    def in_the_order_of_the_manual(self) -> np.ndarray:
        """Bit for bit: products of two bfloat16 are exact in float32, so that a fused step rounds as two do."""
        a, b = (x.astype(np.float32) for x in self.factors())
        even, odd = np.zeros_like(self.c), np.zeros_like(self.c)
        for k in range(0, a.shape[1], 2):
            even += a[:, k, None] * b[k]
            odd += a[:, k + 1, None] * b[k + 1]
        return self.c + (even + odd)


def rows_of(matrix: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(matrix).reshape(len(matrix), -1).view(np.uint8)


def laid_out(rows: np.ndarray, stride: int) -> bytes:
    memory = np.full(stride * (len(rows) - 1) + rows.shape[1], 0xAA, dtype=np.uint8)
    for number, row in enumerate(rows):
        memory[number * stride :][: len(row)] = row
    return memory.tobytes()


def normal_product(shape: tuple[int, int, int], gaps: tuple[int, int, int] = (0, 0, 0)) -> Product:
    rows, pairs, columns = shape
    rng = np.random.default_rng(rows * 10000 + pairs * 100 + columns)
    a, b = (bfloat16(rng.normal(size=size)) for size in [(rows, 2 * pairs), (pairs, columns, 2)])
    return Product(a, b, rng.normal(size=(rows, columns)).astype(np.float32), gaps)


def integer_product(shape: tuple[int, int, int], repeats: int = 1) -> Product:
    rows, pairs, columns = shape
    rng = np.random.default_rng(sum(shape))
    a, b = (bfloat16(rng.integers(-9, 10, size)) for size in [(rows, 2 * pairs), (pairs, columns, 2)])
    return Product(a, b, rng.integers(-99, 100, (rows, columns)).astype(np.float32), repeats=repeats)


def compute(probe: Run, *products: Product) -> list[np.ndarray]:
    """Their results, each computed in its own thread."""
    done = probe("products", len(products), data=b"".join(product.data() for product in products))
    assert done.returncode == 0, done.stderr.decode()
    results, rest = [], done.stdout
    for product in products:
        result, rest = product.take(rest)
        results.append(result)
    assert rest == b""
    return results


SHAPES = [(16, 16, 16), (1, 1, 1), (5, 16, 16), (16, 3, 16), (16, 16, 7), (11, 2, 9), (2, 13, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_small_integers_are_exact(probe: Run, shape: tuple[int, int, int]) -> None:
    product = integer_product(shape)
    assert np.array_equal(compute(probe, product)[0], product.truth())


@pytest.mark.parametrize("gaps", [(0, 0, 0), (64, 4, 12), (6, 192, 1)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_that_of_numpy(probe: Run, shape: tuple[int, int, int], gaps: tuple[int, int, int]) -> None:
    product = normal_product(shape, gaps)
    result = compute(probe, product)[0]
    # A term passes a rounding for each later pair of its chain, then one with the other chain and one with C.
    tolerance = 1.01 * (shape[1] + 2) * 2.0**-24
    assert (np.abs(result - product.truth()) <= tolerance * product.scale()).all()
    assert np.array_equal(result, product.in_the_order_of_the_manual())


def test_rows_may_overlap(probe: Run) -> None:
    """Rows of 64 bytes every 32 bytes, as a convolution's neighbouring taps read a row of pixels."""
    product = integer_product((16, 16, 16))
    pixels = product.a.reshape(-1)[: 17 * 16]
    product.a = np.lib.stride_tricks.sliding_window_view(pixels, 32)[::16]
    product.gaps = (-32, 0, 0)
    assert np.array_equal(compute(probe, product)[0], product.truth())


def test_all_eight_tiles_hold_their_own(probe: Run) -> None:
    product = integer_product((21, 3 * 16, 19))
    done = probe("eight_tiles", 3, data=rows_of(product.a).tobytes() + rows_of(product.b).tobytes())
    product.c[:] = 0
    assert np.array_equal(product.take(done.stdout)[0], product.truth())


def test_threads_have_their_own_tiles(probe: Run) -> None:
    products = [integer_product(shape, repeats=100) for shape in SHAPES[:4]]
    for product, result in zip(products, compute(probe, *products), strict=True):
        assert np.array_equal(result, product.truth())


def test_rounding_is_to_nearest_whatever_the_program_asks_for(probe: Run) -> None:
    product = normal_product((16, 16, 16))
    product.mxcsr = ROUND_TO_ZERO
    assert np.array_equal(compute(probe, product)[0], product.in_the_order_of_the_manual())


DENORMALS = {
    "of A": (2.0**-130, 2.0**100, 0, 0),
    "of B": (2.0**100, 2.0**-130, 0, 0),
    "of C": (0, 0, 2.0**-130, 0),
    "a product": (2.0**-70, 2.0**-70, 0, 0),
    "a sum": (-(2.0**-63), 2.0**-63, 1.5 * 2.0**-126, 0),
    "none": (2.0**-60, 2.0**-60, 2.0**-120, 2.0**-119),
}


@pytest.mark.parametrize("case", DENORMALS)
def test_denormals_are_zero(probe: Run, case: str) -> None:
    a, b, c, expected = DENORMALS[case]
    product = Product(bfloat16(np.array([[a, 0]])), bfloat16(np.array([[[b, 0]]])), np.array([[c]], dtype=np.float32))
    assert compute(probe, product)[0].item() == expected


def test_infinite_values_stay_in_their_row(probe: Run) -> None:
    product = normal_product((5, 4, 6))
    product.a[2, 3] = bfloat16(np.array(np.inf))
    product.b[1, 4, 1] = 0
    product.a[3, 0] = bfloat16(np.array(np.nan))
    with np.errstate(invalid="ignore"):
        expected = product.in_the_order_of_the_manual()
    assert np.isnan(expected[2, 4]) and np.isinf(np.delete(expected[2], 4)).all() and np.isnan(expected[3]).all()
    assert np.array_equal(compute(probe, product)[0], expected, equal_nan=True)


# Ways to address memory.

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
    """An instruction with one way to address memory; where, in the area, it must find it."""

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
        """The area and the result behind it."""
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
                held = 10 * self.tile + 16 * row
                after[place : place + width] = area[held : held + width]
            else:
                result[64 * row : 64 * row + width] = area[place : place + width]
        return bytes(after + result)


def snippets() -> Iterator[Snippet]:
    """Every base with every index, going round scales, displacements and tiles."""
    number = 0
    for name in ("tileloadd", "tileloaddt1", "tilestored", "ldtilecfg", "sttilecfg"):
        of_tile = not name.endswith("cfg")
        for base in [*REGISTERS, None]:
            for index in [None, *(register for register in REGISTERS if register != "rsp")]:
                number += 1
                step, tile = (-1) ** number * (2 + number % 13), number // 4 % 8
                start, displacement = 400 if of_tile else 0, DISPLACEMENTS[number % len(DISPLACEMENTS)]
                if base == "rsp":  # frames of the signal and the emulator lie below it, and must not lie in the area
                    start, displacement, step = 64 if of_tile else 0, abs(displacement), abs(step)
                if base is not None and base == index:  # an address as stride: good for one row
                    if not of_tile:
                        continue
                    tile = WIDTHS.index(64)
                yield Snippet(name, base, index, start, 1 << number % 4, displacement, step, tile)
        if not of_tile:
            yield Snippet(name, "rip", None, 0, 1, 0, 0, 0)


def assembly_of(all_snippets: list[Snippet]) -> str:
    names = "".join(f"  .quad snippet_{number}\n" for number in range(len(all_snippets)))
    return (
        ".globl snippets, snippet_count, keep_registers\n.bss\nsaved: .quad 0\n.text\n"
        + "".join(snippet.assembly(number) for number, snippet in enumerate(all_snippets))
        + keep_registers()
        + f".section .rodata\n.balign 8\nsnippets:\n{names}snippet_count: .quad {len(all_snippets)}\n"
        + '.section .note.GNU-stack,"",@progbits\n'
    )


def test_every_way_to_address_memory(probe: Run) -> None:
    area = OTHER + np.random.default_rng(0).integers(256, size=AREA - 64, dtype=np.uint8).tobytes()
    done = probe("addressing", "all", data=area + CONFIGURED)
    assert done.returncode == 0, done.stderr.decode()
    expected = [(snippet, snippet.expected(area)) for snippet in snippets()]
    size = len(expected[0][1])
    assert len(done.stdout) == size * len(expected)
    for number, (snippet, bytes_) in enumerate(expected):
        assert done.stdout[number * size :][:size] == bytes_, f"{snippet.name} {snippet.operand()}"


# Registers.

KEPT_BYTES = 4096
FLAGS_SET = 0x8D5
"""Carry, parity, adjust, zero, sign and overflow."""


def places_of_registers() -> Iterator[tuple[str, str, int]]:
    """The instruction that moves a register, its name and its place."""
    for number in range(32):
        yield "vmovdqu64", f"zmm{number}", 64 * number
    for number in range(8):
        yield "kmovq", f"k{number}", 2048 + 8 * number
    for number, register in enumerate(REGISTERS):
        yield "mov", register, 2112 + 8 * number


RED_ZONE, FLAGS = 2240, 2368


def keep_registers() -> str:
    """A function that loads all registers, flags and the red zone, executes a tile instruction, and stores them."""
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


@pytest.mark.parametrize("flags", [0, FLAGS_SET])
def test_a_tile_instruction_changes_no_other_register(probe: Run, flags: int) -> None:
    contents = np.random.default_rng(flags).integers(256, size=KEPT_BYTES, dtype=np.uint8)
    contents[FLAGS : FLAGS + 8] = np.array([0x202 | flags]).view(np.uint8)
    done = probe("registers", "all", data=contents.tobytes())
    assert done.returncode == 0, done.stderr.decode()
    before, after = done.stdout[:FLAGS], done.stdout[KEPT_BYTES:]
    for _, name, place in places_of_registers():
        size = 64 if name.startswith("zmm") else 8
        assert after[place : place + size] == before[place : place + size], name
    assert after[RED_ZONE:FLAGS] == before[RED_ZONE:FLAGS]
    assert int.from_bytes(after[FLAGS : FLAGS + 8], "little") & FLAGS_SET == flags


# What must not pass.

WRONG = {
    "palette": "ldtilecfg: palette 2",
    "start row": "ldtilecfg: a start row",
    "reserved": "ldtilecfg: reserved bytes",
    "ninth tile": "ldtilecfg: reserved bytes",
    "too many rows": "ldtilecfg: tmm1 of 17 rows of 64 bytes",
    "too wide": "ldtilecfg: tmm1 of 16 rows of 68 bytes",
    "no rows": "ldtilecfg: tmm1 of 0 rows of 64 bytes",
    "no palette": "tdpbf16ps: no tiles are configured",
    "released": "tdpbf16ps: no tiles are configured",
    "product without": "tdpbf16ps: tmm2 is not configured",
    "zero without": "tilezero: tmm3 is not configured",
    "load without": "tileloadd: tmm3 is not configured",
    "store without": "tilestored: tmm3 is not configured",
    "pairs": "tdpbf16ps: A (tmm1) has 15 pairs in a row, B (tmm2) 16 rows",
    "odd bytes": "tdpbf16ps: tmm1 has rows of 62 bytes",
    "rows": "tdpbf16ps: C (tmm0) has 15 rows, A (tmm1) 16",
    "columns": "tdpbf16ps: C (tmm0) has rows of 64 bytes, B (tmm2) of 60",
    "same tiles": "tdpbf16ps: tmm0, tmm1, tmm1 are not three tiles",
}


@pytest.mark.parametrize("what", WRONG)
def test_a_contradiction_ends_the_process(probe: Run, what: str) -> None:
    done = probe("wrong", what)
    assert done.returncode == -signal.SIGABRT
    line = done.stderr.decode()
    assert line.startswith(f"AMX emulator: {WRONG[what]}") and line.count("\n") == 1


def test_nothing_wrong_is_let_pass(probe: Run) -> None:
    assert probe("wrong", "nothing").returncode == 0


@pytest.mark.parametrize("what", ["ud2", "tdpbssd", "tdpfp16ps", "256 bits", "tmm8", "no SIB"])
def test_other_instructions_are_illegal_as_ever(probe: Run, what: str) -> None:
    done = probe("unknown", what)
    assert done.returncode == -signal.SIGILL and done.stderr == b""


# In Python.

KERNEL = """
#include <immintrin.h>
extern "C" __attribute__((weak)) bool pathnet_amx_emulated();
extern "C" bool has_amx() { return pathnet_amx_emulated && pathnet_amx_emulated(); }
extern "C" void multiply(const char* config, const char* a, const char* b, char* c) {
  _tile_loadconfig(config);
  _tile_zero(0);
  _tile_loadd(1, a, 64);
  _tile_stream_loadd(2, b, 64);
  for (int i = 0; i < 3; ++i) _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, c, 64);
  _tile_storeconfig(c);
  _tile_release();
}
extern "C" void unknown() { __builtin_trap(); }
"""

PROGRAM = """
import ctypes, sys
kernel, process = ctypes.CDLL(sys.argv[1]), ctypes.CDLL(None)
kernel.has_amx.restype = ctypes.c_bool
print("AMX:", kernel.has_amx(), flush=True)
config, ones, c = bytes.fromhex(sys.argv[2]), b"\\x80\\x3f" * 512, ctypes.create_string_buffer(1024)
kernel.multiply(config, ones, ones, c)
print(c.raw[:64] == config, c.raw[64:] == b"\\0\\0\\xc0\\x42" * 240)
process.pathnet_amx_executed.restype = process.pathnet_amx_count.restype = ctypes.c_uint64
names = b"ldtilecfg sttilecfg tilerelease tilezero tileloadd tileloaddt1 tilestored tdpbf16ps nothing".split()
print(process.pathnet_amx_executed(), *map(process.pathnet_amx_count, names), flush=True)
kernel.unknown()
"""


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """A Python that calls a library with AMX; with its fault handler, which pytest uses as well."""
    folder = tmp_path_factory.mktemp("kernel")
    source, kernel = folder / "kernel.cpp", folder / "kernel.so"
    source.write_text(KERNEL)
    subprocess.run(["g++", *AMX, "-shared", "-fPIC", source, "-o", kernel], check=True)
    config = configuration([16] * 3, [64] * 3)
    return [sys.executable, "-X", "faulthandler", "-c", PROGRAM, kernel, config.hex()]


def test_a_python_process_has_amx(preloaded: Run, python: list[object]) -> None:
    done = preloaded(*python)
    assert done.stdout.decode().splitlines() == ["AMX: True", "True True", "3 1 1 1 1 1 1 1 3 0"]
    assert done.returncode == -signal.SIGILL
    assert b"Fatal Python error: Illegal instruction" in done.stderr


def test_without_the_emulator_there_is_none(python: list[object]) -> None:
    done = subprocess.run([*map(str, python)], capture_output=True)
    assert done.stdout.decode().splitlines() == ["AMX: False"]
    assert done.returncode == -signal.SIGILL

"""The AMX emulator by itself: a program that uses AMX runs under it, and numpy gives the expected results."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from amx.build import emulator, why_not
from amx.products import ROUND_TO_ZERO, Product, bfloat16, integer_product, normal_product, rows_of
from amx.snippets import (
    AREA,
    CONFIGURED,
    FLAGS,
    FLAGS_SET,
    KEPT_BYTES,
    OTHER,
    RED_ZONE,
    assembly_of,
    configuration,
    places_of_registers,
    snippets,
)

WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")

FOLDER = Path(__file__).parent / "amx"
AMX = ["-O1", "-std=c++17", "-mamx-tile", "-mamx-bf16"]

Run = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulator(tmp_path_factory.mktemp("emulator"))


@pytest.fixture(scope="session")
def preloaded(library: Path) -> Run:
    """Return a function that runs a command under the emulator."""

    def run(*command: object, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        environment = {**os.environ, "LD_PRELOAD": str(library)}
        return subprocess.run([*map(str, command)], input=data, capture_output=True, env=environment, timeout=60)

    return run


@pytest.fixture(scope="session")
def probe(preloaded: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a function that runs the probe, with its snippets, under the emulator."""
    folder = tmp_path_factory.mktemp("probe")
    assembly, program = folder / "snippets.s", folder / "probe"
    assembly.write_text(assembly_of([*snippets()]))
    sources = [FOLDER / "probe.cpp", assembly]
    # Not position-independent, for addresses without any register.
    subprocess.run(["g++", *AMX, "-no-pie", "-pthread", *sources, "-o", program], check=True)
    return lambda *arguments, data=b"": preloaded(program, *arguments, data=data)


# Products.


def compute(probe: Run, *products: Product) -> list[np.ndarray]:
    """Return the products' results, each computed in its own thread."""
    done = probe("products", len(products), data=b"".join(product.data() for product in products))
    assert done.returncode == 0, done.stderr.decode()
    results, output = [], done.stdout
    for product in products:
        result, output = product.parse(output)
        results.append(result)
    assert output == b""
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
    """Rows of 64 bytes every 32 bytes, as neighbouring taps of a convolution read a row of pixels."""
    product = integer_product((16, 16, 16))
    pixels = product.a.reshape(-1)[: 17 * 16]
    product.a = np.lib.stride_tricks.sliding_window_view(pixels, 32)[::16]
    product.gaps = (-32, 0, 0)
    assert np.array_equal(compute(probe, product)[0], product.truth())


def test_all_eight_tiles_hold_their_own(probe: Run) -> None:
    product = integer_product((21, 3 * 16, 19))
    done = probe("eight_tiles", 3, data=rows_of(product.a).tobytes() + rows_of(product.b).tobytes())
    product.c[:] = 0
    assert np.array_equal(product.parse(done.stdout)[0], product.truth())


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


# Addressing modes.


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


# Errors.

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
    """Return the command of a Python that calls a library with AMX, with the fault handler that pytest uses too."""
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

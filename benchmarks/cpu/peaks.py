"""What the processor can do at most, measured: fused multiply-adds and bfloat16 dot products, and torch's products.

The loop of multiply-adds is compiled when it is measured, where there is a compiler: nothing but registers, on as
many threads as torch takes. Without a compiler the fastest of torch's matrix products stands in for it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Peaks", "matrix_product"]

SIDES = (512, 1024, 2048)
SOURCE = r"""
#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
typedef float vector __attribute__((vector_size(BYTES)));

// Nothing is known of a value that went through here: else chains that begin alike would be computed once.
#define UNKNOWN(value) asm volatile("" : "+m"(value))

// 12 chains that do not wait for each other hide the latency of 4 cycles of two units, and fit 16 registers.
enum { CHAINS = 12, STEPS = 1 << 18 };

extern "C" double fma_flops(void) {
  vector sums[CHAINS] = {}, factor = {}, shift = {};
  factor += 0.999f;
  shift += 0.001f;
  UNKNOWN(factor);
  UNKNOWN(shift);
  UNKNOWN(sums);
  vector f = factor, s = shift;
  for (int step = 0; step < STEPS; ++step)
#pragma GCC unroll 12
    for (int chain = 0; chain < CHAINS; ++chain) sums[chain] = sums[chain] * f + s;
  volatile float kept = 0;
  for (int chain = 0; chain < CHAINS; ++chain) kept = kept + sums[chain][0];
  return 2.0 * STEPS * CHAINS * (BYTES / 4);
}

#ifdef __AVX512BF16__
#include <immintrin.h>
extern "C" double dot_flops(void) {
  __m512 sums[CHAINS] = {};
  UNKNOWN(sums);
  unsigned bits = 0x3f803f80;
  UNKNOWN(bits);
  __m512bh left = (__m512bh)_mm512_set1_epi32(bits), right = (__m512bh)_mm512_set1_epi32(bits);
  for (int step = 0; step < STEPS; ++step)
#pragma GCC unroll 12
    for (int chain = 0; chain < CHAINS; ++chain) sums[chain] = _mm512_dpbf16_ps(sums[chain], left, right);
  volatile float kept = 0;
  for (int chain = 0; chain < CHAINS; ++chain) kept = kept + sums[chain][0];
  return 4.0 * STEPS * CHAINS * 16;
}
#endif
"""


@dataclass(frozen=True)
class Peaks:
    """The loops, compiled; None where they are not.

    Attributes:
        why_not: the reason that there is no loop of multiply-adds.
    """

    fma: Callable[[float], float] | None
    dot: Callable[[float], float] | None
    why_not: str = ""

    @classmethod
    def compile(cls) -> Peaks:
        """Both take the seconds to measure for, and return floating-point operations a second."""
        compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
        if compiler is None:
            return cls(None, None, "no C++ compiler")
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder) / "peaks.cpp", Path(folder) / "peaks.so"
            source.write_text(SOURCE)
            command = [
                compiler,
                "-O2",
                "-march=native",
                "-ffp-contract=fast",
                "-shared",
                "-fPIC",
                "-o",
                library,
                source,
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                return cls(None, None, (done.stderr.splitlines() or ["the compiler failed"])[0].removeprefix(folder))
            loaded = ctypes.CDLL(str(library))
        dot = _rate(loaded.dot_flops) if hasattr(loaded, "dot_flops") else None
        return cls(_rate(loaded.fma_flops), dot)


def _rate(loop: Callable[[], float]) -> Callable[[float], float]:
    loop.restype = ctypes.c_double  # type: ignore[attr-defined]

    def work(until: float) -> float:
        done = 0.0
        while time.perf_counter() < until:
            done += loop()
        return done

    def rate(seconds: float) -> float:
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(threads) as pool:
            start = time.perf_counter()
            done = sum(pool.map(work, [start + seconds] * threads))
            return done / (time.perf_counter() - start)

    return rate


def matrix_product(dtype: torch.dtype, seconds: float) -> float:
    """The floating-point operations a second of the fastest square product that torch has, over a few sides."""
    best = 0.0
    for side in SIDES if seconds > 0.1 else SIDES[:1]:
        left, right = (torch.randn(side, side).to(dtype) for _ in range(2))
        left @ right
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            start = time.perf_counter()
            left @ right
            best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best

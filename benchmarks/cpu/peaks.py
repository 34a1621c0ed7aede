"""The peak of the processor, measured: fused multiply-adds, bfloat16 dot products, and torch's matrix products.

The loops are compiled when they are measured, if there is a compiler. They use only registers, on as many threads as
torch. Without a compiler the fastest of torch's matrix products replaces them.
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

// Hides a value from the compiler, which would otherwise compute equal chains once.
#define UNKNOWN(value) asm volatile("" : "+m"(value))

// 12 independent chains hide the latency of two units, 4 cycles each, and fit into 16 registers.
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
  volatile float result = 0;
  for (int chain = 0; chain < CHAINS; ++chain) result = result + sums[chain][0];
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
  volatile float result = 0;
  for (int chain = 0; chain < CHAINS; ++chain) result = result + sums[chain][0];
  return 4.0 * STEPS * CHAINS * 16;
}
#endif
"""


@dataclass(frozen=True)
class Peaks:
    """The compiled loops; None for those that this processor or compiler lacks.

    Attributes:
        why_not: reason that there is no loop of multiply-adds.
    """

    fma: Callable[[float], float] | None
    dot: Callable[[float], float] | None
    why_not: str = ""

    @classmethod
    def compile(cls) -> Peaks:
        """Compile the loops: functions of the seconds to measure for, which return operations a second."""
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
    """Return the operations a second of torch's fastest square product, among a few sides."""
    best = 0.0
    for side in SIDES if seconds > 0.1 else SIDES[:1]:
        a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
        a @ b
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            start = time.perf_counter()
            a @ b
            best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best

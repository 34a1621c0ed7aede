// The convolvers of the instruction set that this file is compiled for: of float32 precision, and with bf16 numbers.
#pragma once

#include "amx.h"
#include "fma.h"

namespace pathnet {
namespace PATHNET_ISA_NAMESPACE {
namespace {

#if defined(__AMX_BF16__)
using Float32 = TileConvolver<2>;
using Bfloat16 = TileConvolver<1>;
#elif defined(__AVX512BF16__)
using Float32 = VectorConvolver<FloatProduct>;
using Bfloat16 = VectorConvolver<Bf16Product>;
#else
// Without products of bf16 numbers the float32 ones serve: nothing is faster here.
using Float32 = VectorConvolver<FloatProduct>;
using Bfloat16 = Float32;
#endif

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet

// The convolvers of the instruction set that this file is compiled for: for forward passes, and for backward passes
// in float32 precision and with bf16 numbers.
#pragma once

#include "amx.h"
#include "fma.h"
#include "winograd.h"
#include "winograd4.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

// Forward in float32 itself: a ReLU bit that rounding flips is worth more than all rounding of the backward passes,
// and one forward serves them all.
using ForwardConvolver = WinogradConvolver<FloatProduct>;

#if defined(__AMX_BF16__)
using Float32 = TileConvolver<2>;
using Bfloat16 = TileConvolver<1>;
#elif defined(__AVX512BF16__)
using Float32 = WinogradConvolver<FloatProduct>;
using Bfloat16 = WinogradConvolver<Bf16Product>;
#else
// Nothing here multiplies bf16 numbers faster than these.
using Float32 = WinogradConvolver<FloatProduct>;
using Bfloat16 = Float32;
#endif

using TrainingFloat32 = Winograd4Convolver;
using TrainingBfloat16 = Winograd4Convolver;

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu

// The convolvers of the instruction set that this file is compiled for: for forward passes, and for backward passes
// in float32 precision and with bf16 numbers.
#pragma once

#include "amx.h"
#include "amx_weight_gradient.h"
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

// On AMX too: tiles take three products of bf16 terms for one of floats, and leave ten times the error or more.
// Computed for a step of ResNet-110, batch 128, on two cores: tiles take 178 ms for 196 GFLOP (1.1 TFLOP/s, the three
// products counted as one) and then copy, F(4x4, 3x3) takes 150 ms for 49 GFLOP (0.7 of 463 GFLOP/s); no processor
// with AMX has timed either yet.
using TrainingFloat32 = Winograd4Convolver;
#if defined(__AMX_BF16__)
using TrainingBfloat16 = TrainingTileConvolver;
#else
// Batches of bf16 numbers, and products of floats: those of AVX-512 with bf16 numbers take F(2x2, 3x3), whose four
// products a pixel at twice the rate are no faster than 2.25. Tried forward, a step took as long (two cores of
// Zen 5), with twice the error.
using TrainingBfloat16 = Winograd4Convolver;
#endif

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu

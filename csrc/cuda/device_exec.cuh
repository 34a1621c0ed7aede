// The execution policy on the device: a thread block of CUDA.
#pragma once

#include <cuda_runtime.h>

#include "execution.h"

namespace pathnet::cuda {

extern __shared__ __align__(128) char shared_memory[];

class DeviceExec {
 public:
  template <class T>
  struct PerLane {
    T value;
    PerLane() = default;
    __device__ __forceinline__ explicit PerLane(const T& start) : value(start) {}
    __device__ __forceinline__ T& operator[](int) { return value; }
  };
  template <class T>
  struct PerWarp {
    T value;
    __device__ __forceinline__ T& operator[](int) { return value; }
  };
  struct Source {
    uint32_t of[4];
  };
  struct Weights {
    uint32_t of[2];
  };

  // `images` are those of all thread blocks, `images_bytes` of each.
  __device__ __forceinline__ DeviceExec(uint8_t* images, int images_bytes)
      : shared_(uint32_t(__cvta_generic_to_shared(shared_memory))),
        images_(images),
        first_image_(int(blockIdx.x) * images_bytes) {}

  __device__ __forceinline__ int block() const { return blockIdx.x; }
  __device__ __forceinline__ int take(int32_t* counter) const { return atomicAdd(counter, 1); }
  __device__ __forceinline__ void barrier() const { __syncthreads(); }

  static __device__ __forceinline__ void hide(int32_t& value) { asm volatile("" : "+r"(value)); }

  // The thread's number is hidden from the compiler at every use. Otherwise it would compute once, ahead of all
  // loops, what each of them derives from the number, and run out of registers.
  template <class F>
  __device__ __forceinline__ void warps(const F& f) {
    const int thread = hidden_thread();
    lane_ = thread % kWarpSize;
    f(thread / kWarpSize);
  }
  template <class F>
  __device__ __forceinline__ void threads(const F& f) const {
    f(hidden_thread());
  }
  template <class F>
  __device__ __forceinline__ void lanes(const F& f) const {
    f(lane_);
  }

  template <class T>
  __device__ __forceinline__ T load(int byte) const {
    return *reinterpret_cast<const T*>(shared_memory + byte);
  }
  template <class T>
  __device__ __forceinline__ T uniform_load(int byte) const {
    return load<T>(byte);
  }
  template <class T>
  __device__ __forceinline__ void store(int byte, T value) const {
    *reinterpret_cast<T*>(shared_memory + byte) = value;
  }
  __device__ __forceinline__ void clear_unit(int byte) const { store(byte, make_uint4(0, 0, 0, 0)); }

  template <class T>
  __device__ __forceinline__ T load_scratch(const float* from) const {
    return *reinterpret_cast<const T*>(from);
  }
  template <class T>
  __device__ __forceinline__ void store_scratch(float* to, const T& value) const {
    *reinterpret_cast<T*>(to) = value;
  }

  __device__ __forceinline__ void raise(int byte, PerLane<float>& values) const {
    const uint32_t largest = __reduce_max_sync(0xffffffffu, __float_as_uint(values.value));
    if (lane_ == 0) raise_one(byte, largest);
  }
  __device__ __forceinline__ void raise_one(int byte, uint32_t value) const {
    atomicMax(reinterpret_cast<uint32_t*>(shared_memory + byte), value);
  }
  __device__ __forceinline__ double sum(PerLane<double>& values) const {
    double total = values.value;
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      total += __shfl_down_sync(0xffffffffu, total, distance);
    }
    return total;
  }

  __device__ __forceinline__ void copy_async(int byte, const uint8_t* from, int bytes) const {
    for (int i = hidden_thread() * kUnitBytes; i < bytes; i += kThreads * kUnitBytes) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_ + byte + i), "l"(from + i) : "memory");
    }
  }
  __device__ __forceinline__ void copy_image_async(int byte, int from, int bytes) const {
    copy_async(byte, images_ + (first_image_ + from), bytes);
  }
  __device__ __forceinline__ uint32_t load_image(int byte) const {
    return *reinterpret_cast<const uint32_t*>(images_ + (first_image_ + byte));
  }
  __device__ __forceinline__ void store_image(int byte, uint32_t value) const {
    *reinterpret_cast<uint32_t*>(images_ + (first_image_ + byte)) = value;
  }
  __device__ __forceinline__ void clear_image_unit(int byte) const {
    *reinterpret_cast<uint4*>(images_ + (first_image_ + byte)) = make_uint4(0, 0, 0, 0);
  }
  __device__ __forceinline__ void commit_copies() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int pending>
  __device__ __forceinline__ void wait_copies() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
  }

  template <class Address>
  __device__ __forceinline__ void load_source(Source& source, const Address& address) const {
    const uint32_t from = shared_ + address(lane_);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(source.of[0]), "=r"(source.of[1]), "=r"(source.of[2]), "=r"(source.of[3])
                 : "r"(from)
                 : "memory");
  }
  template <class Address>
  __device__ __forceinline__ void load_weights(Weights& weights, const Address& address) const {
    const uint2 pair = load<uint2>(address(lane_));
    weights.of[0] = pair.x;
    weights.of[1] = pair.y;
  }
  template <class Result>
  __device__ __forceinline__ void multiply(const Result& result, const Source& a, const Weights& b) const {
    float (&c)[4] = result(0);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.of[0]), "r"(a.of[1]), "r"(a.of[2]), "r"(a.of[3]), "r"(b.of[0]), "r"(b.of[1]));
  }

  template <int bytes>
  static __device__ __forceinline__ uint32_t load_bits(const uint8_t* from) {
    if (bytes == 4) return __ldg(reinterpret_cast<const uint32_t*>(from));
    if (bytes == 2) return __ldg(reinterpret_cast<const uint16_t*>(from));
    return __ldg(from);
  }
  template <int bytes>
  static __device__ __forceinline__ void store_bits(uint8_t* to, uint32_t bits) {
    if (bytes == 4) {
      *reinterpret_cast<uint32_t*>(to) = bits;
    } else if (bytes == 2) {
      *reinterpret_cast<uint16_t*>(to) = uint16_t(bits);
    } else {
      *to = uint8_t(bits);
    }
  }

  static __device__ __forceinline__ uint32_t to_bf16(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
  static __device__ __forceinline__ float low(uint32_t pair) { return __uint_as_float(pair << 16); }
  static __device__ __forceinline__ float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
  static __device__ __forceinline__ float from_bits(uint32_t bits) { return __uint_as_float(bits); }
  static __device__ __forceinline__ uint32_t to_bits(float value) { return __float_as_uint(value); }
  static __device__ __forceinline__ float larger_magnitude(float a, float b) { return fmaxf(a, fabsf(b)); }
  static __device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
  static __device__ __forceinline__ double scaled_root(double square, int exponent) {
    return ldexp(sqrt(square), exponent);
  }

 private:
  static __device__ __forceinline__ int hidden_thread() {
    int thread = int(threadIdx.x);
    hide(thread);
    return thread;
  }

  uint32_t shared_;
  uint8_t* images_;  // an argument of the kernel, which takes no register
  int first_image_;  // byte at which this thread block's images begin
  int lane_ = 0;
};

}  // namespace pathnet::cuda

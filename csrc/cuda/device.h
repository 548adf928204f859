// The only file that names CUDA's runtime: launches, warp primitives and conversions. The kernels
// use what is here and nothing else, so that tests/cuda_build can run them on a CPU under another
// device.h.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/macros/Macros.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <tuple>

namespace pear::cuda {

using DeviceGuard = c10::cuda::CUDAGuard;

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarp = 32;

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Blackwell's data centre cards (sm_100) take a pair of floats in one instruction, and have too few
// special-function units for their bandwidth.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1100
#define PEAR_PAIRS 1
#else
#define PEAR_PAIRS 0
#endif

// Whether every eighth pair of exponentials is a polynomial.
constexpr bool kPolynomialExponentials = PEAR_PAIRS;

#if PEAR_PAIRS
__device__ __forceinline__ uint64_t bits_of(float2 x) {
  return uint64_t(__float_as_uint(x.y)) << 32 | __float_as_uint(x.x);
}
__device__ __forceinline__ float2 pair_of(uint64_t bits) {
  return {__uint_as_float(uint32_t(bits)), __uint_as_float(uint32_t(bits >> 32))};
}
#endif

__device__ __forceinline__ float2 add(float2 a, float2 b) {
#if PEAR_PAIRS
  uint64_t sum;
  asm("add.rn.f32x2 %0, %1, %2;" : "=l"(sum) : "l"(bits_of(a)), "l"(bits_of(b)));
  return pair_of(sum);
#else
  return {a.x + b.x, a.y + b.y};
#endif
}

__device__ __forceinline__ float2 multiply(float2 a, float2 b) {
#if PEAR_PAIRS
  uint64_t product;
  asm("mul.rn.f32x2 %0, %1, %2;" : "=l"(product) : "l"(bits_of(a)), "l"(bits_of(b)));
  return pair_of(product);
#else
  return {a.x * b.x, a.y * b.y};
#endif
}

// a * b + c
__device__ __forceinline__ float2 multiply_add(float2 a, float2 b, float2 c) {
#if PEAR_PAIRS
  uint64_t sum;
  asm("fma.rn.f32x2 %0, %1, %2, %3;"
      : "=l"(sum)
      : "l"(bits_of(a)), "l"(bits_of(b)), "l"(bits_of(c)));
  return pair_of(sum);
#else
  return {fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y)};
#endif
}

// Logits are streamed: they are evicted first from the cache.
__device__ __forceinline__ uint4 load_streaming(const uint4* p) { return __ldcs(p); }
__device__ __forceinline__ void store_streaming(uint4* p, uint4 v) { __stcs(p, v); }

// Two 16-bit numbers in one word, the first in the low half.
__device__ __forceinline__ float2 unpack_pair(uint32_t word, c10::BFloat16) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
__device__ __forceinline__ float2 unpack_pair(uint32_t word, c10::Half) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}
__device__ __forceinline__ uint32_t pack_pair(float2 x, c10::BFloat16) {
  const __nv_bfloat162 pair = __float22bfloat162_rn(x);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t pack_pair(float2 x, c10::Half) {
  const __half2 pair = __float22half2_rn(x);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Waits for every block of a cooperative launch; what they wrote before is seen after.
__device__ __forceinline__ void sync_grid() { cooperative_groups::this_grid().sync(); }

inline int multiprocessors() {
  int device = 0, count = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Runs on torch's current stream; nothing waits for it.
template <bool kCooperative = false, typename... Params, typename... Args>
void launch(void (*kernel)(Params...), int64_t blocks, int threads, Args&&... args) {
  std::tuple<Params...> params(std::forward<Args>(args)...);
  std::apply(
      [&](Params&... param) {
        void* pointers[] = {&param...};
        const void* function = reinterpret_cast<const void*>(kernel);
        const dim3 grid(static_cast<unsigned>(blocks)), block(threads);
        const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
        if constexpr (kCooperative) {
          C10_CUDA_CHECK(cudaLaunchCooperativeKernel(function, grid, block, pointers, 0, stream));
        } else {
          C10_CUDA_CHECK(cudaLaunchKernel(function, grid, block, pointers, 0, stream));
        }
      },
      params);
}

}  // namespace pear::cuda

// The parts of a softmax that the lanes of a warp hold, joined; every lane gets the same bits.
#pragma once

#include "cuda/device.h"
#include "online_softmax.h"

namespace pear::cuda {

__device__ __forceinline__ SoftmaxPart of_lane(SoftmaxPart p, int bits) {
  return {__shfl_xor_sync(kFullWarp, p.max, bits), __shfl_xor_sync(kFullWarp, p.sum, bits)};
}
__device__ __forceinline__ EntropyPart of_lane(EntropyPart p, int bits) {
  return {__shfl_xor_sync(kFullWarp, p.max, bits), __shfl_xor_sync(kFullWarp, p.sum, bits),
          __shfl_xor_sync(kFullWarp, p.weighted, bits)};
}

template <typename Part>
__device__ __forceinline__ Part merge_warp(Part part) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) part = merge(part, of_lane(part, lanes));
  return part;
}

}  // namespace pear::cuda

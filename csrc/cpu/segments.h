// Reading cu_seqlens on CPU, with its contract checked.
#pragma once

#include "checks.h"

namespace pear::cpu {

// The boundaries of the segments of a pack of T tokens.
inline const int32_t* segment_bounds(const Tensor& cu_seqlens, const Tensor& x) {
  check_cu_seqlens(cu_seqlens, x);
  const int32_t* bounds = cu_seqlens.const_data_ptr<int32_t>();
  const int64_t segments = cu_seqlens.size(0) - 1;
  TORCH_CHECK_VALUE(bounds[0] == 0, "cu_seqlens must start at 0, got ", bounds[0]);
  for (int64_t s = 0; s < segments; ++s) {
    TORCH_CHECK_VALUE(bounds[s] <= bounds[s + 1], "cu_seqlens must not decrease, got ", bounds[s],
                      " then ", bounds[s + 1], " at segment ", s);
  }
  TORCH_CHECK_VALUE(bounds[segments] == x.size(0), "cu_seqlens must end at the number of tokens ",
                    x.size(0), ", got ", bounds[segments],
                    "; a padded tail is a segment of its own, masked out");
  return bounds;
}

}  // namespace pear::cpu

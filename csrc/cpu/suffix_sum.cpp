// Segmented suffix sums on CPU: threads over segments, sums in float64.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "cpu/segments.h"
#include "ops.h"

namespace pear::cpu {

Tensor segmented_suffix_sum(const Tensor& x, const Tensor& cu_seqlens, const OptionalTensor& carry,
                            bool exclusive) {
  check_vector(x, "x", x.numel(), at::kFloat);
  const int32_t* bounds = segment_bounds(cu_seqlens, x);
  const int64_t segments = cu_seqlens.size(0) - 1;
  if (carry) check_vector(*carry, "carry", segments, at::kFloat);
  Tensor out = at::empty_like(x);
  const float* in = x.const_data_ptr<float>();
  const float* carries = carry ? carry->const_data_ptr<float>() : nullptr;
  float* sums = out.mutable_data_ptr<float>();
  at::parallel_for(0, segments, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      double sum = carries ? carries[s] : 0.0;
      for (int64_t t = bounds[s + 1] - 1; t >= bounds[s]; --t) {
        const double with_t = sum + in[t];
        sums[t] = static_cast<float>(exclusive ? sum : with_t);
        sum = with_t;
      }
    }
  });
  return out;
}

Tensor segment_sum(const Tensor& x, const Tensor& cu_seqlens) {
  check_vector(x, "x", x.numel(), at::kFloat);
  const int32_t* bounds = segment_bounds(cu_seqlens, x);
  const int64_t segments = cu_seqlens.size(0) - 1;
  Tensor out = at::empty({segments}, x.options());
  const float* in = x.const_data_ptr<float>();
  float* sums = out.mutable_data_ptr<float>();
  at::parallel_for(0, segments, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      double sum = 0.0;
      for (int64_t t = bounds[s + 1] - 1; t >= bounds[s]; --t) sum += in[t];
      sums[s] = static_cast<float>(sum);
    }
  });
  return out;
}

}  // namespace pear::cpu

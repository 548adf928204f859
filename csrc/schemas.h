// The schema of every op, and its kernels per device.
#pragma once

#include <torch/library.h>

#include "ops.h"

namespace pear {

inline void define_ops(torch::Library& m) {
  m.def(
      "statistics_forward(Tensor logits, Tensor target, Tensor? mask, int vocab_start, "
      "int vocab_size, Tensor? topk_ids=None, bool entropy=False) -> Tensor");
  m.def(
      "statistics_combine(Tensor stats, Tensor? mask, int vocab_size, Tensor? topk_ids=None, "
      "Tensor? topk_logprobs=None, bool entropy=False, bool bucket=False) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
#define PEAR_BACKWARD_SCHEMA                                                       \
  "Tensor target, Tensor? mask, Tensor normalizer, Tensor grad, int vocab_start, " \
  "int vocab_size, Tensor? topk_ids=None, Tensor? topk_logprobs=None, "            \
  "Tensor? topk_log_pi=None, Tensor? kl_terms=None, Tensor? kl_grad=None)"
  m.def("statistics_backward(Tensor logits, " PEAR_BACKWARD_SCHEMA " -> Tensor");
  m.def("statistics_backward_(Tensor(a!) logits, " PEAR_BACKWARD_SCHEMA " -> ()");
  m.def(
      "segmented_suffix_sum(Tensor x, Tensor cu_seqlens, Tensor? carry, bool exclusive) -> Tensor");
  m.def("segment_sum(Tensor x, Tensor cu_seqlens) -> Tensor");
  m.def(
      "pear_weights(Tensor logprobs, Tensor behavior_logprobs, Tensor mask, Tensor cu_seqlens, "
      "int variant, float gamma, int block_size, float ratio_low, float ratio_high, "
      "float weight_low, float weight_high, bool subtract_mean, bool normalize, "
      "float? tau=None, Tensor? factor=None) "
      "-> (Tensor, Tensor)");
}

}  // namespace pear

#define PEAR_REGISTER_OPS(m, device)                                   \
  m.impl("statistics_forward", &pear::device::statistics_forward);     \
  m.impl("statistics_combine", &pear::device::statistics_combine);     \
  m.impl("statistics_backward", &pear::device::statistics_backward);   \
  m.impl("statistics_backward_", &pear::device::statistics_backward_); \
  m.impl("segmented_suffix_sum", &pear::device::segmented_suffix_sum); \
  m.impl("segment_sum", &pear::device::segment_sum);                   \
  m.impl("pear_weights", &pear::device::pear_weights);

// The CUDA ops' own source, compiled for the CPU: torch.ops.pear_emulated.*, on CPU tensors.
#include <torch/library.h>

#include "cuda/device.h"
#include "cuda/logprob.cu"
#include "cuda/statistics.cu"
#include "cuda/suffix_sum.cu"
#include "cuda/weights.cu"

TORCH_LIBRARY(pear_emulated, m) {
  using at::Tensor;
  m.def("logprob_forward", &pear::cuda::logprob_forward);
  m.def("logprob_combine", &pear::cuda::logprob_combine);
  m.def("logprob_backward", &pear::cuda::logprob_backward);
  m.def("logprob_backward_inplace",
        [](Tensor logits, const Tensor& target, const std::optional<Tensor>& mask,
           const Tensor& lse, const Tensor& grad, int64_t start, int64_t size) {
          pear::cuda::logprob_backward_(logits, target, mask, lse, grad, start, size);
          return logits;
        });
  m.def("statistics_forward", &pear::cuda::statistics_forward);
  m.def("statistics_combine", &pear::cuda::statistics_combine);
  m.def("topk_kl_backward", &pear::cuda::topk_kl_backward);
  m.def(
      "topk_kl_backward_inplace",
      [](Tensor logits, const Tensor& target, const std::optional<Tensor>& mask, const Tensor& lse,
         const Tensor& grad, const Tensor& ids, const Tensor& logprobs, const Tensor& log_pi,
         const Tensor& terms, const Tensor& kl_grad, int64_t start, int64_t size) {
        pear::cuda::topk_kl_backward_(logits, target, mask, lse, grad, ids, logprobs, log_pi, terms,
                                      kl_grad, start, size);
        return logits;
      });
  m.def("segmented_suffix_sum", &pear::cuda::segmented_suffix_sum);
  m.def("segment_sum", &pear::cuda::segment_sum);
  m.def("pear_weights", &pear::cuda::pear_weights);
  m.def("set_multiprocessors",
        [](int64_t count) { pear::emulator::multiprocessor_count() = static_cast<int>(count); });
}

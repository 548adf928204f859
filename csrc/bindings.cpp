// Table of contents: the schema of every op, its kernels per device, and the Python module.
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include "cpu/simd.h"
#include "ops.h"

TORCH_LIBRARY(pear_megatron, m) {
  m.def(
      "logprob_forward(Tensor logits, Tensor target, Tensor? mask, int vocab_start, "
      "int vocab_size) -> Tensor");
  m.def("logprob_combine(Tensor stats, Tensor? mask) -> (Tensor, Tensor)");
  m.def(
      "logprob_backward(Tensor logits, Tensor target, Tensor? mask, Tensor normalizer, Tensor "
      "grad, "
      "int vocab_start, int vocab_size) -> Tensor");
  m.def(
      "logprob_backward_(Tensor(a!) logits, Tensor target, Tensor? mask, Tensor normalizer, Tensor "
      "grad, "
      "int vocab_start, int vocab_size) -> ()");
  m.def(
      "statistics_forward(Tensor logits, Tensor target, Tensor? mask, Tensor? topk_ids, "
      "int vocab_start, int vocab_size, bool entropy) -> Tensor");
  m.def(
      "statistics_combine(Tensor stats, Tensor? mask, Tensor? topk_ids, Tensor? topk_logprobs, "
      "int vocab_size, bool entropy, bool bucket) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "topk_kl_backward(Tensor logits, Tensor target, Tensor? mask, Tensor normalizer, Tensor "
      "grad, "
      "Tensor topk_ids, Tensor topk_logprobs, Tensor topk_log_pi, Tensor kl_terms, Tensor kl_grad, "
      "int vocab_start, int vocab_size) -> Tensor");
  m.def(
      "topk_kl_backward_(Tensor(a!) logits, Tensor target, Tensor? mask, Tensor normalizer, Tensor "
      "grad, "
      "Tensor topk_ids, Tensor topk_logprobs, Tensor topk_log_pi, Tensor kl_terms, Tensor kl_grad, "
      "int vocab_start, int vocab_size) -> ()");
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

#define PEAR_REGISTER_OPS(m, device)                                   \
  m.impl("logprob_forward", &pear::device::logprob_forward);           \
  m.impl("logprob_combine", &pear::device::logprob_combine);           \
  m.impl("logprob_backward", &pear::device::logprob_backward);         \
  m.impl("logprob_backward_", &pear::device::logprob_backward_);       \
  m.impl("statistics_forward", &pear::device::statistics_forward);     \
  m.impl("statistics_combine", &pear::device::statistics_combine);     \
  m.impl("topk_kl_backward", &pear::device::topk_kl_backward);         \
  m.impl("topk_kl_backward_", &pear::device::topk_kl_backward_);       \
  m.impl("segmented_suffix_sum", &pear::device::segmented_suffix_sum); \
  m.impl("segment_sum", &pear::device::segment_sum);                   \
  m.impl("pear_weights", &pear::device::pear_weights);

TORCH_LIBRARY_IMPL(pear_megatron, CPU, m){PEAR_REGISTER_OPS(m, cpu)}
#ifdef PEAR_MEGATRON_CUDA
TORCH_LIBRARY_IMPL(pear_megatron, CUDA, m){PEAR_REGISTER_OPS(m, cuda)}
#endif

// What setup.py says of this build, as text.
#define PEAR_TEXT(...) #__VA_ARGS__
#define PEAR_TEXT_OF(...) PEAR_TEXT(__VA_ARGS__)

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled ops of pear_megatron; call them as torch.ops.pear_megatron.*";
#ifdef PEAR_MEGATRON_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
  m.attr("torch_version") = PEAR_TEXT_OF(PEAR_TORCH_VERSION);
  m.attr("cuda_version") = PEAR_TEXT_OF(PEAR_CUDA_VERSION);              // empty without CUDA ops
  m.attr("cuda_architectures") = PEAR_TEXT_OF(PEAR_CUDA_ARCHITECTURES);  // sm_80,sm_90,compute_90
  m.def("cpu_instruction_set", &pear::cpu::instruction_set,
        "The instruction set the CPU kernels run with on this machine.");
}

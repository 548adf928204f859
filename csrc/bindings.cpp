// Registers the ops, and makes the Python module.
#include <pybind11/pybind11.h>

#include "cpu/simd.h"
#include "schemas.h"

TORCH_LIBRARY(pear_megatron, m) { pear::define_ops(m); }
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

// The CUDA ops' own source, compiled for the CPU: torch.ops.pear_emulated.*, on CPU tensors.
#include "cuda/device.h"
#include "cuda/logprob.cu"
#include "cuda/statistics.cu"
#include "cuda/suffix_sum.cu"
#include "cuda/weights.cu"
#include "schemas.h"

TORCH_LIBRARY(pear_emulated, m) {
  pear::define_ops(m);
  m.def("set_multiprocessors",
        [](int64_t count) { pear::emulator::multiprocessor_count() = static_cast<int>(count); });
}
TORCH_LIBRARY_IMPL(pear_emulated, CPU, m) { PEAR_REGISTER_OPS(m, cuda) }

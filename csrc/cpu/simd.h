// Which compiled copy of the vectorised CPU kernels this machine runs.
//
// Each copy is the same source (logprob_kernel.inl), compiled for one instruction set; the choice
// is made at run time, so that one wheel runs on every node of a cluster. ATEN_CPU_CAPABILITY,
// which torch's own kernels heed (default, avx2, avx512), can ask for less than the machine has.
#pragma once

#include <cstdlib>
#include <string>

namespace pear::cpu {

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

inline InstructionSet detect_instruction_set() {
#if defined(__x86_64__)
  const char* setting = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string wanted = setting == nullptr ? "" : setting;
  if (wanted == "default") return InstructionSet::kBaseline;
  __builtin_cpu_init();
  if (wanted != "avx2" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) {
    return InstructionSet::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return InstructionSet::kAvx2;
  }
#endif
  return InstructionSet::kBaseline;
}

inline std::string instruction_set() {
  switch (detect_instruction_set()) {
    case InstructionSet::kAvx512:
      return "avx512";
    case InstructionSet::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace pear::cpu

#include "cpu/kernels.h"

namespace locas::cpu {

// One definition per compilation of table.cpp and ffn.cpp; CMakeLists.txt names them.
#define LOCAS_DECLARE(isa)                  \
  namespace isa {                           \
  extern const Kernels table;               \
  extern const GluFfnKernels glu_ffn_table; \
  }
LOCAS_DECLARE(baseline)
#ifdef LOCAS_X86_DISPATCH
LOCAS_DECLARE(avx2)
LOCAS_DECLARE(avx512)
LOCAS_DECLARE(avx512_bf16)
#endif
#undef LOCAS_DECLARE

namespace {

struct Tables {
  const Kernels& kernels;
  const GluFfnKernels* ffn;
};

Tables best_tables() {
#ifdef LOCAS_X86_DISPATCH
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && __builtin_cpu_supports("avx512bf16")) return {avx512_bf16::table, &avx512_bf16::glu_ffn_table};
  if (has_avx512) return {avx512::table, &avx512::glu_ffn_table};
  if (has_avx2) return {avx2::table, nullptr};
#endif
  return {baseline::table, nullptr};
}

const Tables& tables() {
  static const Tables best = best_tables();
  return best;
}

}  // namespace

const Kernels& kernels() { return tables().kernels; }
const GluFfnKernels* glu_ffn_kernels() { return tables().ffn; }

}  // namespace locas::cpu

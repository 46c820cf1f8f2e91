#include "kernels.h"

namespace locas::cpu {

// One definition per compilation of kernels.cpp; CMakeLists.txt names them.
#define LOCAS_DECLARE(isa) \
  namespace isa {          \
  extern const Kernels table; \
  }
LOCAS_DECLARE(baseline)
#ifdef LOCAS_X86_DISPATCH
LOCAS_DECLARE(avx2)
LOCAS_DECLARE(avx512)
#endif
#undef LOCAS_DECLARE

const Kernels& kernels() {
  static const Kernels& best = []() -> const Kernels& {
#ifdef LOCAS_X86_DISPATCH
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (has_avx512) return avx512::table;
    if (has_avx2) return avx2::table;
#endif
    return baseline::table;
  }();
  return best;
}

}  // namespace locas::cpu

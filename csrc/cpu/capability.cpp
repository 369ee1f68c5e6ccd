#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <stdlib.h>
#include <string.h>

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fastbp::cpu {

#define FASTBP_DECLARE(NAME)               \
  namespace NAME {                         \
  void fill_products(Kernels<float>&);     \
  void fill_products(Kernels<double>&);    \
  void fill_elementwise(Kernels<float>&);  \
  void fill_elementwise(Kernels<double>&); \
  void fill_compressed(Kernels<float>&);   \
  }
FASTBP_FOR_EACH_CAPABILITY(FASTBP_DECLARE)
#undef FASTBP_DECLARE

namespace {

// Whether this CPU and its operating system run the instructions of a capability.
bool runs(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!strcmp(name, "avx512_bf16")) return __builtin_cpu_supports("avx512bf16") && runs("avx512");
  if (!strcmp(name, "avx512")) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && runs("avx2");
  }
  if (!strcmp(name, "avx2")) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
#endif
  return !strcmp(name, "generic");
}

bool multiplies_bf16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");  // every CPU with AMX has it too
#else
  return false;
#endif
}

// AMX. Asked of the CPU itself, for not every compiler that builds the rest knows its name; and of the operating
// system, which must keep the tiles. Of a CPU that has AVX-512 only.
bool multiplies_bf16_in_tiles() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1)) return false;
  asm("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  return (a >> 17 & 3) == 3;
#else
  return false;
#endif
}

Capability find() {
  const char* asked = getenv("FASTBP_CPU_CAPABILITY");
  if (asked && !*asked) asked = nullptr;
  std::string known;
#define FASTBP_TRY(NAME)                                                       \
  known += std::string(known.empty() ? "" : ", ") + #NAME;                     \
  if (runs(#NAME) && (!asked || !strcmp(asked, #NAME))) {                      \
    const bool bf16 = !asked && multiplies_bf16();                             \
    Capability found{#NAME, bf16, bf16 && multiplies_bf16_in_tiles(), {}, {}}; \
    NAME::fill_products(found.in_float);                                       \
    NAME::fill_products(found.in_double);                                      \
    NAME::fill_elementwise(found.in_float);                                    \
    NAME::fill_elementwise(found.in_double);                                   \
    NAME::fill_compressed(found.in_float);                                     \
    return found;                                                              \
  }
  FASTBP_FOR_EACH_CAPABILITY(FASTBP_TRY)
#undef FASTBP_TRY
  throw std::runtime_error("fastbp: FASTBP_CPU_CAPABILITY=" + std::string(asked) +
                           " is not a capability of this CPU; there are " + known);
}

}  // namespace

const Capability& capability() {
  static const Capability found = find();
  return found;
}

}  // namespace fastbp::cpu

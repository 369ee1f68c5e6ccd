// A cuBLASLt of the host, as its documentation has it: what csrc/cuda/cublaslt.cpp asks for is computed by loops. Its
// heuristic takes the algorithm that wants the largest alignment it was told of, and 256 bytes where it was told
// nothing; and a product with operands that do not have it is refused.
#include <cuda_bf16.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <map>

namespace {

using Bf16 = __nv_bfloat16;

// Any of its descriptions: attributes by number, and of a matrix its sizes.
struct Description {
  std::map<int, uint64_t> attributes;
  uint64_t rows = 0, columns = 0;
  int64_t leading = 0;
};

struct Algorithm {
  uint64_t alignment[4];
  uint64_t rest[4];
};
struct Found {
  Algorithm algorithm;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

constexpr int kInvalid = 7, kNotSupported = 15;
int created = 0;

float number(const void* data, int64_t at) { return __bfloat162float(static_cast<const Bf16*>(data)[at]); }
float rounded(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }
float gelu(double x) {
  return static_cast<float>(0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))));
}
double gelu_grad(double x) {
  const double t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x));
  return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x);
}
int destroy(void* description) {
  delete static_cast<Description*>(description);
  return 0;
}
int set(void* description, int which, const void* value, size_t bytes) {
  if (bytes > 8) return kInvalid;
  uint64_t number = 0;
  memcpy(&number, value, bytes);
  static_cast<Description*>(description)->attributes[which] = number;
  return 0;
}

}  // namespace

extern "C" {

int handles_created() { return created; }

int cublasLtCreate(void** handle) {
  *handle = &created;
  ++created;
  return 0;
}
int cublasLtMatmulDescCreate(void** out, int compute, int scale) {
  *out = new Description;
  return compute == 68 && scale == 0 ? 0 : kInvalid;
}
int cublasLtMatmulDescDestroy(void* it) { return destroy(it); }
int cublasLtMatmulDescSetAttribute(void* it, int which, const void* value, size_t bytes) {
  return set(it, which, value, bytes);
}
int cublasLtMatrixLayoutCreate(void** out, int type, uint64_t rows, uint64_t columns, int64_t leading) {
  auto* made = new Description;
  made->rows = rows, made->columns = columns, made->leading = leading;
  *out = made;
  return type == 14 && leading >= static_cast<int64_t>(rows) ? 0 : kInvalid;
}
int cublasLtMatrixLayoutDestroy(void* it) { return destroy(it); }
int cublasLtMatmulPreferenceCreate(void** out) {
  *out = new Description;
  return 0;
}
int cublasLtMatmulPreferenceDestroy(void* it) { return destroy(it); }
int cublasLtMatmulPreferenceSetAttribute(void* it, int which, const void* value, size_t bytes) {
  return set(it, which, value, bytes);
}

int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void* preference, int, Found* best,
                                   int* count) {
  auto& told = static_cast<Description*>(preference)->attributes;
  for (int i = 0; i < 4; ++i) best->algorithm.alignment[i] = told.count(5 + i) ? told[5 + i] : 256;
  *count = 1;
  return 0;
}

// By columns: D (rows × columns) = op(A) op(B), then the epilogue.
int cublasLtMatmul(void*, void* product, const void*, const void* a, void* a_layout, const void* b, void* b_layout,
                   const void*, const void* c, void*, void* d, void* d_layout, const Algorithm* algorithm, void*,
                   size_t, void*) {
  auto& told = static_cast<Description*>(product)->attributes;
  const auto &la = *static_cast<Description*>(a_layout), &lb = *static_cast<Description*>(b_layout),
             &ld = *static_cast<Description*>(d_layout);
  const void* pointers[] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) {
    if (reinterpret_cast<uintptr_t>(pointers[i]) % algorithm->alignment[i]) return kNotSupported;
  }
  const bool ta = told[3], tb = told[4];
  const uint64_t k = ta ? la.rows : la.columns;
  if ((ta ? la.columns : la.rows) != ld.rows || (tb ? lb.rows : lb.columns) != ld.columns) return kInvalid;
  if ((tb ? lb.columns : lb.rows) != k) return kInvalid;
  const auto epilogue = told[7];
  auto* bias = reinterpret_cast<Bf16*>(told[8]);
  auto* aux = reinterpret_cast<Bf16*>(told[11]);
  const auto aux_leading = static_cast<int64_t>(told[12]);
  for (uint64_t i = 0; i < ld.rows; ++i) {
    double total = 0;
    for (uint64_t j = 0; j < ld.columns; ++j) {
      double sum = 0;
      for (uint64_t s = 0; s < k; ++s) {
        sum += double{number(a, ta ? s + i * la.leading : i + s * la.leading)} *
               number(b, tb ? j + s * lb.leading : s + j * lb.leading);
      }
      if (epilogue == 36 || epilogue == 164) sum += number(bias, static_cast<int64_t>(i));
      const int64_t at = static_cast<int64_t>(i) + static_cast<int64_t>(j) * aux_leading;
      if (epilogue == 160 || epilogue == 164) aux[at] = __float2bfloat16_rn(static_cast<float>(sum));
      double out = sum;
      if (epilogue == 32 || epilogue == 36 || epilogue == 160 || epilogue == 164) out = gelu(sum);
      if (epilogue == 192 || epilogue == 208) out = sum * gelu_grad(number(aux, at));
      total += out;
      static_cast<Bf16*>(d)[i + j * ld.leading] = __float2bfloat16_rn(rounded(static_cast<float>(out)));
    }
    if (epilogue == 208) bias[i] = __float2bfloat16_rn(static_cast<float>(total));
  }
  return 0;
}
}

#include "cublaslt.h"

#include <dlfcn.h>
#include <library_types.h>

#include <array>
#include <mutex>
#include <string>
#include <type_traits>

#include "capture.h"
#include "errors.h"
#include "numbers.h"

namespace fastbp::cuda {

namespace {

// What of cublasLt.h is needed, as that header has it: its package weighs 400 MB, and the library is found at run time.
enum Attribute : int {
  transpose_a = 3,
  transpose_b = 4,
  epilogue = 7,
  bias_pointer = 8,
  aux_pointer = 11,
  aux_ld = 12
};
enum Of : uint32_t { gelu = 32, gelu_bias = 36, gelu_aux = 160, gelu_aux_bias = 164, dgelu = 192, dgelu_bgrad = 208 };
enum Preference : int { workspace_bytes = 1, alignment_a = 5, alignment_b = 6, alignment_c = 7, alignment_d = 8 };
constexpr int kCompute32F = 68, kNone = 0, kTranspose = 1, kVersions[] = {14, 13, 12};

struct Algorithm {
  uint64_t data[8];
};
struct Found {
  Algorithm algorithm;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

struct Library {
  int (*create)(void**);
  int (*multiply)(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*,
                  void*, void*, const Algorithm*, void*, size_t, cudaStream_t);
  int (*make_product)(void**, int, cudaDataType);
  int (*end_product)(void*);
  int (*set)(void*, int, const void*, size_t);
  int (*make_matrix)(void**, cudaDataType, uint64_t, uint64_t, int64_t);
  int (*end_matrix)(void*);
  int (*make_preference)(void**);
  int (*end_preference)(void*);
  int (*prefer)(void*, int, const void*, size_t);
  int (*find)(void*, void*, void*, void*, void*, void*, void*, int, Found*, int*);
  bool complete = false;
};

// The library that is there already; none is loaded for this.
const Library& library() {
  static const Library found = [] {
    Library l{};
    void* handle = nullptr;
    for (int version : kVersions) {
      const std::string name = "libcublasLt.so." + std::to_string(version);
      if (!handle) handle = dlopen(name.c_str(), RTLD_NOW | RTLD_NOLOAD);
    }
    if (!handle) return l;
    l.complete = true;
    const auto look_up = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(handle, name));
      l.complete = l.complete && function;
    };
    look_up(l.create, "cublasLtCreate");
    look_up(l.multiply, "cublasLtMatmul");
    look_up(l.make_product, "cublasLtMatmulDescCreate");
    look_up(l.end_product, "cublasLtMatmulDescDestroy");
    look_up(l.set, "cublasLtMatmulDescSetAttribute");
    look_up(l.make_matrix, "cublasLtMatrixLayoutCreate");
    look_up(l.end_matrix, "cublasLtMatrixLayoutDestroy");
    look_up(l.make_preference, "cublasLtMatmulPreferenceCreate");
    look_up(l.end_preference, "cublasLtMatmulPreferenceDestroy");
    look_up(l.prefer, "cublasLtMatmulPreferenceSetAttribute");
    look_up(l.find, "cublasLtMatmulAlgoGetHeuristic");
    return l;
  }();
  return found;
}

void expect(int status) { check(status == 0, "cuBLASLt refuses what its documentation allows"); }

// One of cuBLASLt's descriptions, ended with the scope.
class Described {
 public:
  explicit Described(int (*end)(void*)) : end_(end) {}
  ~Described() {
    if (it) end_(it);
  }
  Described(const Described&) = delete;
  Described& operator=(const Described&) = delete;
  void* it = nullptr;

 private:
  int (*end_)(void*);
};

void* handle_of(int32_t device, cudaStream_t stream) {
  constexpr int kMost = 64;
  static std::array<void*, kMost> handles;
  static std::array<std::once_flag, kMost> made;
  check(device >= 0 && device < kMost, "device numbers go up to 63");
  std::call_once(made[device], [device, stream] {
    first_outside_capture(&handles[device], stream);
    expect(library().create(&handles[device]));
  });
  return handles[device];
}

// The largest power of two that divides an address, up to what cuBLASLt assumes where nobody says it.
uint32_t alignment_of(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer) | 256;
  return static_cast<uint32_t>(address & -address);
}

bool at_16_bytes(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

const char* library_refusal(const Activation& activation, const Product& p) {
  if (activation.number != number_of_gelu_tanh) return "of its epilogues tanh-GELU is PyTorch's function";
  if (activation.dtype != Dtype::bfloat16 && activation.dtype != Dtype::float16) return "only 16 bits gain by it";
  if (p.kind != Product::forward && p.kind != Product::dgrad) return "it has no gated epilogue";
  if (p.keeps != Keeps::z) return "it keeps z as it is";
  if (p.m == 0 || p.n == 0 || p.k == 0) return "a size is 0";
  if (p.n % 8 || p.a.stride <= 0 || p.a.stride % 8 || p.b.stride <= 0 || p.b.stride % 8) return "rows of 16 bytes";
  if (!at_16_bytes(p.a.data) || !at_16_bytes(p.b.data) || !at_16_bytes(p.bias)) return "addresses of 16 bytes";
  return library().complete ? nullptr : "PyTorch has loaded no cuBLASLt";
}

bool launch_library_product(const Activation& activation, const Product& p, int32_t device, void* workspace,
                            cudaStream_t stream) {
  const Library& l = library();
  const bool forward = p.kind == Product::forward;
  const cudaDataType type = activation.dtype == Dtype::bfloat16 ? CUDA_R_16BF : CUDA_R_16F;
  // cuBLASLt reads by columns: what lies here as rows of n is its n × m. So B comes first, and A second.
  Described product(l.end_product), b(l.end_matrix), a(l.end_matrix), out(l.end_matrix), preference(l.end_preference);
  expect(l.make_product(&product.it, kCompute32F, CUDA_R_32F));
  const auto set = [&](Attribute attribute, const auto& value) {
    expect(l.set(product.it, attribute, &value, sizeof(value)));
  };
  set(transpose_a, forward ? kTranspose : kNone);
  set(transpose_b, kNone);
  const void* const aux = forward ? p.first : p.gate;  // z
  const void* const bias = forward ? p.bias : p.bias_gradient;
  set(epilogue, forward ? (aux    ? bias ? gelu_aux_bias : gelu_aux
                           : bias ? gelu_bias
                                  : gelu)
                : bias  ? dgelu_bgrad
                        : dgelu);
  if (bias) set(bias_pointer, bias);
  if (aux) set(aux_pointer, aux), set(aux_ld, p.n);
  const auto rows = static_cast<uint64_t>(p.n), columns = static_cast<uint64_t>(p.m), k = static_cast<uint64_t>(p.k);
  expect(l.make_matrix(&b.it, type, forward ? k : rows, forward ? rows : k, p.b.stride));
  expect(l.make_matrix(&a.it, type, k, columns, p.a.stride));
  expect(l.make_matrix(&out.it, type, rows, columns, p.n));
  expect(l.make_preference(&preference.it));
  const auto prefer = [&](Preference which, const auto& value) {
    expect(l.prefer(preference.it, which, &value, sizeof(value)));
  };
  void* const to = forward ? p.y : p.first;
  prefer(workspace_bytes, kLibraryWorkspace);
  prefer(alignment_a, alignment_of(p.b.data));
  prefer(alignment_b, alignment_of(p.a.data));
  prefer(alignment_c, alignment_of(to));
  prefer(alignment_d, alignment_of(to));
  Found best{};
  int count = 0;
  void* const handle = handle_of(device, stream);
  if (l.find(handle, product.it, b.it, a.it, out.it, out.it, preference.it, 1, &best, &count) || !count) return false;
  const float one = 1, zero = 0;
  expect(l.multiply(handle, product.it, &one, p.b.data, b.it, p.a.data, a.it, &zero, to, out.it, to, out.it,
                    &best.algorithm, workspace, kLibraryWorkspace, stream));
  return true;
}

}  // namespace fastbp::cuda

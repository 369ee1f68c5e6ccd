// csrc/cuda/cublaslt.cpp beside a cuBLASLt and a CUDA runtime of the host.
#include <cuda_runtime_api.h>
#include <string.h>

#include <stdexcept>
#include <string>

#include "cuda/cublaslt.h"
#include "cuda/errors.h"
#include "cuda/numbers.h"

static bool capturing = false;
static int current = 0;

extern "C" cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}
extern "C" cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

namespace fastbp::cuda {
void check(bool fine, const char* what) {
  if (!fine) throw std::runtime_error(what);
}
void check_cuda(cudaError_t error) { check(error == cudaSuccess, "CUDA"); }
}  // namespace fastbp::cuda

using namespace fastbp::cuda;

// tanh-GELU of bfloat16: y = f(a bᵀ + bias) with z kept, or dz = (a b) · f'(z) with its column sums in `bias`. An empty
// string, or why not.
extern "C" const char* product(bool backward, int64_t m, int64_t n, int64_t k, const void* a, int64_t a_stride,
                               const void* b, int64_t b_stride, void* bias, void* z, void* out, int device,
                               bool in_capture) {
  static std::string said;
  capturing = in_capture, current = device;
  Product p{};
  p.kind = backward ? Product::dgrad : Product::forward;
  p.a = {a, m, k, a_stride};
  p.b = backward ? Operand{b, k, n, b_stride} : Operand{b, n, k, b_stride};
  p.m = m, p.n = n, p.k = k;
  p.keeps = Keeps::z;
  if (backward) {
    p.gate = z, p.first = out, p.bias_gradient = bias;
  } else {
    p.bias = bias, p.first = z, p.y = out;
  }
  const Activation activation{fastbp::Dtype::bfloat16, number_of_gelu_tanh, {0, 0}};
  if (const char* why = library_refusal(activation, p)) return why;
  try {
    said = launch_library_product(activation, p, device, nullptr, nullptr) ? "" : "knows no way";
  } catch (const std::exception& error) {
    said = error.what();
  }
  return said.c_str();
}

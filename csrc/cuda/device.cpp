#include "device.h"

#include <cuda_runtime.h>

#include <array>
#include <mutex>
#include <stdexcept>

#include "elementwise.h"
#include "shims.h"

#ifndef FASTBP_CUDA_ARCHITECTURES
#error "FASTBP_CUDA_ARCHITECTURES must name what the kernels are compiled for"
#endif

namespace fastbp::cuda {

void check(bool fine, const char* what) {
  if (!fine) throw std::runtime_error(std::string("fastbp_native: ") + what);
}

void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("fastbp_native: CUDA: ") + cudaGetErrorString(error));
}

void check_launches() { check_cuda(cudaGetLastError()); }

const Properties& properties_of(int32_t device) {
  constexpr int kMost = 64;
  static std::array<Properties, kMost> known;
  static std::array<std::once_flag, kMost> asked;
  check(device >= 0 && device < kMost, "device numbers go up to 63");
  std::call_once(asked[device], [device] {
    int major, minor, processors;
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    known[device] = {10 * major + minor, processors};
  });
  return known[device];
}

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  check(shims_resolved(), "this build of PyTorch has no CUDA streams");
  check(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "PyTorch does not name its current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

OnDevice::OnDevice(int32_t device) : guard_(std::in_place, device) {
  // The runtime in this library has its own notion of the current device, and must share PyTorch's.
  check_cuda(cudaSetDevice(device));
}

std::string refusal(int64_t device) {
  if (!shims_resolved()) {
    return "this build of PyTorch exports no CUDA streams to C++; a CUDA build of torch 2.11 or newer does";
  }
  int count = 0;
  const cudaError_t none = cudaGetDeviceCount(&count);
  if (none != cudaSuccess) return std::string("CUDA: ") + cudaGetErrorString(none);
  if (device >= count)
    return "CUDA sees " + std::to_string(count) + " devices, and no number " + std::to_string(device);
  try {
    const OnDevice here(static_cast<int32_t>(device));
    const cudaError_t error = find_kernels();
    if (error == cudaSuccess) return "";
    cudaGetLastError();  // it is told, and no later call shall find it
    int driver = 0;
    cudaDriverGetVersion(&driver);
    std::string words = std::string("CUDA: ") + cudaGetErrorString(error) + "; the kernels are built for " +
                        architectures() + " with CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
                        std::to_string(CUDART_VERSION % 1000 / 10) + ", the driver serves CUDA " +
                        std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10);
    return words + ", the GPU has compute capability " + std::to_string(properties_of(device).capability / 10) + "." +
           std::to_string(properties_of(device).capability % 10);
  } catch (const std::exception& error) {
    return error.what();
  }
}

bool shims_resolved() { return aoti_torch_get_current_cuda_stream && aoti_torch_cuda_addmm_out; }

std::string architectures() { return FASTBP_CUDA_ARCHITECTURES; }

}  // namespace fastbp::cuda

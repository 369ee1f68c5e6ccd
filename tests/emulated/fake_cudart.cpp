// CUDA's runtime, as far as the host code of csrc/cuda calls it, and nvcc's own code around a launch: a library links
// this in the place of libcudart. Kernels are told to the device by their PTX, which nvcc puts into the object.
#include <cuda_runtime_api.h>
#include <string.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "fake_device.h"
#include "faults.h"

namespace {

struct Kernel {
  std::string name;
  const std::string* image;
  uint32_t granted = kSharedUnasked;
};

struct Configuration {
  dim3 grid, block;
  size_t shared;
};

std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> all;
  return all;
}

thread_local std::vector<Configuration> pushed;
cudaError_t last = cudaSuccess;

Kernel* kernel_of(const void* stub) {
  const auto found = kernels().find(stub);
  return found == kernels().end() ? nullptr : &found->second;
}

cudaError_t told(cudaError_t error) {
  if (error != cudaSuccess) last = error;
  return error;
}

// After a fault nothing more is run, as on a GPU, until somebody has asked for it.
cudaError_t launch(const Kernel* kernel, dim3 grid, dim3 block, void** arguments, size_t shared) {
  if (last != cudaSuccess) return last;
  if (!kernel) return told(cudaErrorInvalidDeviceFunction);
  const EmulatedLaunch launch{kernel->image->c_str(),
                              kernel->name.c_str(),
                              {grid.x, grid.y, grid.z},
                              {block.x, block.y, block.z},
                              0,
                              static_cast<uint32_t>(shared),
                              kernel->granted,
                              arguments};
  return told(emulated_launch(&launch) ? cudaErrorLaunchFailure : cudaSuccess);
}

}  // namespace

extern "C" {

// --- what nvcc's code calls

void** __cudaRegisterFatBinary(void* wrapper) {
  // A wrapper, a header, and then entries that say where their text begins and how long it is (fatbinary_section.h).
  struct Wrapper {
    int magic, version;
    const char* data;
  };
  struct Header {
    uint32_t magic;
    uint16_t version, size;
    uint64_t entries;
  };
  struct Entry {
    uint16_t kind, version;
    uint32_t header;
    uint64_t size;
  };
  const char* at = static_cast<Wrapper*>(wrapper)->data;
  Header header;
  memcpy(&header, at, sizeof(header));
  at += header.size;
  for (const char* const end = at + header.entries; at < end;) {
    Entry entry;
    memcpy(&entry, at, sizeof(entry));
    constexpr int kPtx = 1;
    const char* const text = at + entry.header;
    if (entry.kind == kPtx) return reinterpret_cast<void**>(new std::string(text, strnlen(text, entry.size)));
    at = text + entry.size;
  }
  throw std::runtime_error("an object of nvcc's holds no PTX");
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void** binary, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  kernels()[stub] = {name, reinterpret_cast<std::string*>(binary)};
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t) {
  pushed.push_back({grid, block, shared});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.back().grid, *block = pushed.back().block, *shared = pushed.back().shared;
  *static_cast<cudaStream_t*>(stream) = nullptr;
  pushed.pop_back();
  return cudaSuccess;
}

// CUDA 13's way of a launch, and CUDA 12's.
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = reinterpret_cast<cudaKernel_t>(kernel_of(stub));
  return *kernel ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
  return launch(reinterpret_cast<Kernel*>(kernel), grid, block, arguments, shared);
}
cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  return launch(kernel_of(stub), grid, block, arguments, shared);
}

// --- what the tests call

// Nothing is granted yet, and no error is pending.
__attribute__((visibility("default"))) void new_process() {
  for (auto& [stub, kernel] : kernels()) kernel.granted = kSharedUnasked;
  pushed.clear();
  last = cudaSuccess;
}

// --- what fastbp calls

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* stub) {
  *attributes = {};
  return told(kernel_of(stub) ? cudaSuccess : cudaErrorInvalidDeviceFunction);
}

cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  Kernel* kernel = kernel_of(stub);
  if (!kernel) return told(cudaErrorInvalidDeviceFunction);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > kSharedOfBlock) {
    return told(cudaErrorInvalidValue);
  }
  kernel->granted = static_cast<uint32_t>(value);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = FAULT(capturing, cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive);
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t found = last;
  last = cudaSuccess;
  return found;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? emulated_words() : "an error of the emulated runtime";
}

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return told(device ? cudaErrorInvalidDevice : cudaSuccess); }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      return *value = 9, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      return *value = 0, cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      return *value = kEmulatedProcessors, cudaSuccess;
    default:
      return told(cudaErrorNotSupported);
  }
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  const bool known = !strcmp(symbol, "cuTensorMapEncodeTiled");
  *function = known ? reinterpret_cast<void*>(&emulated_encode) : nullptr;
  *status = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

}  // extern "C"

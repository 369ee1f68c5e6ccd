// CUDA's driver, as far as Triton's driver and its launchers call it, under the name libcuda.so.1. A module is PTX. A
// device has the compute capability that Python names; the driver has no say in it.
#include <cuda.h>
#include <string.h>

#include <string>

#include "fake_device.h"

namespace {

struct Module {
  std::string image;
};
struct Function {
  const Module* module;
  std::string name;
  uint32_t granted = kSharedUnasked;
};

int context = 0;  // there is one, and nothing in it
constexpr CUresult kFault = CUDA_ERROR_LAUNCH_FAILED;
constexpr int kThreads = 1024, kRegisters = 64;

Function* at(CUfunction function) { return reinterpret_cast<Function*>(function); }

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

CUresult cuGetErrorString(CUresult error, const char** words) {
  *words = error == kFault ? emulated_words() : "an error of the emulated driver";
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int number) { return *device = number, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      return *value = kSharedOfBlock, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
      return *value = 65536, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      return *value = kEmulatedProcessors, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      return *value = 32, CUDA_SUCCESS;
    default:
      return *value = 1, CUDA_SUCCESS;  // clocks, widths: nobody computes with them
  }
}

CUresult cuCtxGetCurrent(CUcontext* current) {
  *current = reinterpret_cast<CUcontext>(&context);
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* retained, CUdevice) { return cuCtxGetCurrent(retained); }
CUresult cuCtxGetLimit(size_t* value, CUlimit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  if (strncmp(static_cast<const char*>(image), "//", 2)) return CUDA_ERROR_INVALID_IMAGE;
  *module = reinterpret_cast<CUmodule>(new Module{static_cast<const char*>(image)});
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = reinterpret_cast<CUfunction>(new Function{reinterpret_cast<Module*>(module), name});
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? kThreads
           : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS            ? kRegisters
                                                                : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
  if (value < 0 || value > kSharedOfBlock) return CUDA_ERROR_INVALID_VALUE;
  at(function)->granted = static_cast<uint32_t>(value);
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

// Pointers into the memory of the device, and no others.
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_NOT_SUPPORTED;
  size_t size = 0;
  const uint64_t start = emulated_allocation(pointer, &size);
  if (!start || pointer - start >= size) return CUDA_ERROR_INVALID_VALUE;
  memcpy(value, &pointer, sizeof(pointer));
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void**) {
  uint32_t cluster = 0;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const CUlaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) cluster = attribute.value.clusterDim.x;
  }
  const EmulatedLaunch launch{at(function)->module->image.c_str(),
                              at(function)->name.c_str(),
                              {config->gridDimX, config->gridDimY, config->gridDimZ},
                              {config->blockDimX, config->blockDimY, config->blockDimZ},
                              cluster,
                              config->sharedMemBytes,
                              at(function)->granted,
                              arguments};
  return emulated_launch(&launch) ? kFault : CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  return emulated_encode(map, type, rank, address, sizes, strides, box, steps, interleave, swizzle, promotion, fill);
}

}  // extern "C"
#pragma GCC visibility pop

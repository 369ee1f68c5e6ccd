// The device of a call: whether kernels for it are here, and its stream.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>
#include <string>

#include "errors.h"

namespace fastbp::cuda {

struct Properties {
  int capability;  // 90 for 9.0
  int processors;
};
// Of a device, asked for once.
const Properties& properties_of(int32_t device);

// Makes a device the current one, for PyTorch and for the launches here, as long as the object lives.
class OnDevice {
 public:
  explicit OnDevice(int32_t device);

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// PyTorch's current stream on a device.
cudaStream_t current_stream(int32_t device);

// Why these kernels cannot serve a device, or an empty string. Launches nothing.
std::string refusal(int64_t device);

// Whether PyTorch exports what these kernels need of it: true in its CUDA builds.
bool shims_resolved();

// The architectures that were compiled, by spaces.
std::string architectures();

}  // namespace fastbp::cuda

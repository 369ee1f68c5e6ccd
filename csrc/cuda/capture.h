// What a first call does and a CUDA graph capture does not allow: a kernel's code is loaded when it is launched first,
// and cuBLASLt's handle allocates memory.
#pragma once

#include <cuda_runtime_api.h>

namespace fastbp::cuda {

// Before a launch of `kernel`, or before something else that `kernel` stands for. Throws where this is the first on the
// current device and the stream is being captured.
void first_outside_capture(const void* kernel, cudaStream_t stream);

}  // namespace fastbp::cuda

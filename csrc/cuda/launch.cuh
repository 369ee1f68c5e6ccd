// The one launch: every kernel of csrc/cuda goes through here.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "capture.h"

namespace fastbp::cuda {

template <class... Parameters>
void launch_kernel(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared_bytes, cudaStream_t stream,
                   const std::type_identity_t<Parameters>&... arguments) {
  first_outside_capture(reinterpret_cast<const void*>(kernel), stream);
  kernel<<<grid, threads, shared_bytes, stream>>>(arguments...);
}

}  // namespace fastbp::cuda

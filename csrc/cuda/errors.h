// Errors in words.
#pragma once

#include <cuda_runtime_api.h>

namespace fastbp::cuda {

// std::runtime_error with these words, which PyTorch shows as a RuntimeError.
void check(bool fine, const char* what);
// The same with CUDA's own words for an error.
void check_cuda(cudaError_t error);
// After launches: whether one was refused.
void check_launches();

}  // namespace fastbp::cuda

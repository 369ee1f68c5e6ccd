// The epilogues of cuBLASLt, of the library that PyTorch has loaded: tanh-GELU with z beside it, and its slope with the
// bias gradient. ReLU's are not taken: they make 0 of NaN, where PyTorch keeps it.
#pragma once

#include "hopper.h"

namespace fastbp::cuda {

constexpr size_t kLibraryWorkspace = size_t{32} << 20;

// Why they cannot serve, or null: another activation or dtype, what cuBLASLt wants of addresses, or no cuBLASLt.
const char* library_refusal(const Activation& activation, const Product& product);

// Product::forward, or dgrad without h and sums. False where cuBLASLt knows no way to compute this one; nothing has
// been launched then.
bool launch_library_product(const Activation& activation, const Product& product, int32_t device, void* workspace,
                            cudaStream_t stream);

}  // namespace fastbp::cuda

// How a call on a GPU is computed.
#pragma once

#include <string>

#include "../cpu/call.h"

namespace fastbp::cuda {

// library: PyTorch's products and one elementwise kernel each way. fused: products with the elementwise work in the
// epilogue, one by one where they serve. cublaslt: the same with the epilogues that cuBLASLt has. A call takes the
// library's unless something else is asked for: nothing has been measured yet (docs/gpu-status.md).
enum class Route { library, fused, cublaslt };

// What the call asks for.
Route route_of(const cpu::Settings& settings);
// For tests and measurements every call takes this one, by its name above; an empty name ends it. FASTBP_CUDA_ROUTE
// says it for a whole process.
void force_route(std::string name);

}  // namespace fastbp::cuda

// The products by PyTorch's own GEMM (oneDNN, MKL or whatever BLAS it has), the elementwise work in one pass each.
#pragma once

#include <vector>

#include "call.h"

namespace fastbp::cpu {

template <class S>
std::vector<Tensor> forward_library(Call& call, const Tensor& x, const std::vector<Tensor>& weights);

// `weights` holds what backward was given, None elsewhere; x likewise.
template <class S>
std::vector<Maybe> backward_library(Call& call, const Tensor& dy, const Maybe& x, const std::vector<Maybe>& weights,
                                    const std::vector<bool>& needs);

}  // namespace fastbp::cpu

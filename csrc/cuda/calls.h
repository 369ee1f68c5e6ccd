// The functions behind the ops, for tensors on a GPU.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace fastbp::cuda {

using torch::stable::Tensor;

std::vector<Tensor> forward(const Tensor& x, std::vector<Tensor> tensors, int64_t settings, std::vector<double> params);

std::vector<Tensor> backward(const Tensor& dy, std::vector<Tensor> saved, int64_t settings, std::vector<double> params,
                             std::vector<bool> needs);

}  // namespace fastbp::cuda

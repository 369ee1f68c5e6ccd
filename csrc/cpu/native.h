// The functions behind the ops.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

namespace fastbp::cpu {

using torch::stable::Tensor;

std::string build_info();
std::string capability_name();
void set_debug(bool poison, std::string route);
std::string routes();

std::vector<Tensor> forward(const Tensor& x, std::vector<Tensor> tensors, int64_t settings, std::vector<double> params);

std::vector<Tensor> backward(const Tensor& dy, std::vector<Tensor> saved, int64_t settings, std::vector<double> params,
                             std::vector<bool> needs);

// f(z); and dz from dy and z.
Tensor activate(const Tensor& z, int64_t settings, std::vector<double> params);
Tensor activate_backward(const Tensor& dy, const Tensor& z, int64_t settings, std::vector<double> params);

}  // namespace fastbp::cpu

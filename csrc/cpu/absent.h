// What stands for a tensor that is absent: it stands for nothing else, and a copy of it does too. It is of booleans,
// and has more dimensions than any weight or bias.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <iterator>

#include "rows.h"

namespace fastbp::cpu {

constexpr int64_t kAbsent[] = {0, 0, 0, 0, 0};

inline Tensor absent() {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(std::size(kAbsent), kAbsent, kAbsent, aoti_torch_dtype_bool(),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Maybe if_any(const Tensor& tensor) {
  if (tensor.dim() != std::size(kAbsent) || tensor.numel() > 0) return tensor;
  int32_t number;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &number));
  return number == aoti_torch_dtype_bool() ? Maybe() : Maybe(tensor);
}

}  // namespace fastbp::cpu

// The dtypes of a call. The order is that of all tables over them.
#pragma once

#include <stdint.h>

namespace fastbp {

enum class Dtype : int { float64, float32, bfloat16, float16 };
constexpr int kDtypes = 4, kMostActivations = 64;
constexpr int64_t kItemSize[kDtypes] = {8, 4, 2, 2};

}  // namespace fastbp

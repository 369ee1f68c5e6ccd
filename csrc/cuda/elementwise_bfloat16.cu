#include "elementwise.cuh"

namespace fastbp::cuda {

FASTBP_ELEMENTWISE(, Dtype::bfloat16)

}  // namespace fastbp::cuda

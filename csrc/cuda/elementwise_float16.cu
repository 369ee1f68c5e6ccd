#include "elementwise.cuh"

namespace fastbp::cuda {

FASTBP_ELEMENTWISE(, Dtype::float16)

}  // namespace fastbp::cuda

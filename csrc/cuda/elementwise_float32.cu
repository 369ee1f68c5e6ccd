#include "elementwise.cuh"

namespace fastbp::cuda {

FASTBP_ELEMENTWISE(, Dtype::float32)

}  // namespace fastbp::cuda

#include "elementwise.cuh"

namespace fastbp::cuda {

FASTBP_ELEMENTWISE(, Dtype::float64)

}  // namespace fastbp::cuda

#include "hopper_launch.cuh"

namespace fastbp::cuda {

FASTBP_PRODUCT(, gated_forward)

}  // namespace fastbp::cuda

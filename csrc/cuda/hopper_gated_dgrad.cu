#include "hopper_launch.cuh"

namespace fastbp::cuda {

FASTBP_PRODUCT(, gated_dgrad)

}  // namespace fastbp::cuda

#include "hopper_launch.cuh"

namespace fastbp::cuda {

FASTBP_PRODUCT(, forward)

}  // namespace fastbp::cuda

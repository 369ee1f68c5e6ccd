#include "hopper_launch.cuh"

namespace fastbp::cuda {

FASTBP_PRODUCT(, dgrad)

}  // namespace fastbp::cuda

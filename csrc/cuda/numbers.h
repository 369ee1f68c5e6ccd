// The activations by number, in the order of activations.h.
#pragma once

#include "../activations.h"

namespace fastbp::cuda {

#define FASTBP_NUMBER(A) number_of_##A,
enum ActivationNumber : int { FASTBP_FOR_EACH_ACTIVATION(FASTBP_NUMBER) };
#undef FASTBP_NUMBER

}  // namespace fastbp::cuda

// How a call is computed: the written rule, from measurements in docs/decisions/.
#pragma once

#include "call.h"

namespace fastbp::cpu {

enum class Route { narrow, narrow_pairs, wide, library };

Route route_of(const Call& call);

}  // namespace fastbp::cpu

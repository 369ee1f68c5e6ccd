// How a call is computed: the written rule, from measurements in docs/decisions/.
#pragma once

#include <string>

#include "call.h"

namespace fastbp::cpu {

enum class Route { narrow, narrow_pairs, wide, library, row };

// What the call asks for where that can serve it, else by the rule.
Route route_of(const Call& call);

// For tests: take this route, by its name above, wherever it can serve; an empty name ends it.
void force_route(const std::string& name);

// Their names, by spaces.
std::string route_names();

}  // namespace fastbp::cpu

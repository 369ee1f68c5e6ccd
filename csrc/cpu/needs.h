// Which gradients are asked for, and what follows from it.
#pragma once

#include <vector>

#include "call.h"

namespace fastbp::cpu {

class Needs {
 public:
  // `wanted` is about x, then every weight, then every bias.
  Needs(const Call& call, const std::vector<bool>& wanted) : call_(call), wanted_(wanted), below_{wanted[0]} {
    for (int64_t linear = 0; linear < call.linears(); ++linear) {
      const int64_t layer = call.layer_of(linear);
      if (static_cast<int64_t>(below_.size()) < layer + 2) below_.push_back(below_.back());
      if (weight(linear) || bias(linear)) below_.back() = true;
    }
  }

  bool weight(int64_t linear) const { return wanted_[1 + linear]; }
  bool bias(int64_t linear) const { return wanted_[1 + call_.linears() + linear]; }
  // Whether anything beneath a layer takes a gradient.
  bool below(int64_t layer) const { return below_[layer]; }
  // Whether dz of a linear is wanted for anything.
  bool slope(int64_t linear) const { return below(call_.layer_of(linear)) || weight(linear) || bias(linear); }

 private:
  const Call& call_;
  const std::vector<bool>& wanted_;
  std::vector<bool> below_;
};

}  // namespace fastbp::cpu

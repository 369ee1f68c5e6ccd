// Which gradients are asked for, and what follows from it.
#pragma once

#include <vector>

#include "call.h"

namespace fastbp::cpu {

class Needs {
 public:
  // `wanted` is about the inputs, then every weight, then every bias.
  Needs(const Call& call, const std::vector<bool>& wanted)
      : call_(call), wanted_(wanted), below_{!call.settings.given && wanted[0]} {
    for (int64_t linear = 0; linear < call.linears(); ++linear) {
      const int64_t layer = call.layer_of(linear);
      if (static_cast<int64_t>(below_.size()) < layer + 2) below_.push_back(below_.back());
      if (weight(linear) || bias(linear) || input(linear)) below_.back() = true;
    }
  }

  bool weight(int64_t linear) const { return !is_given(linear) && wanted_[call_.weight_place(linear)]; }
  bool bias(int64_t linear) const { return !is_given(linear) && wanted_[call_.bias_place(linear)]; }
  // Whether anything beneath a layer takes a gradient. Beneath the layer of what is given lies nothing.
  bool below(int64_t layer) const { return below_[layer]; }
  // Whether dz of a linear is wanted for anything; and whether as a tensor.
  bool slope(int64_t linear) const { return slope_kept(linear) || bias(linear); }
  bool slope_kept(int64_t linear) const { return below(call_.layer_of(linear)) || weight(linear) || input(linear); }

 private:
  bool is_given(int64_t linear) const { return linear < call_.given(); }
  // Whether dz is the gradient of an input.
  bool input(int64_t linear) const { return is_given(linear) && wanted_[linear]; }

  const Call& call_;
  const std::vector<bool>& wanted_;
  std::vector<bool> below_;
};

}  // namespace fastbp::cpu
